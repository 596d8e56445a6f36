"""The mutants. Each is the reference backend for Nimbus with one realistic fault, and names the case that finds it."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from dstack_nimbus import _backend as nimbus
from dstack_nimbus._backend import NimbusBackend

from dstack_core.plugin import (
    AuthenticationError,
    Availability,
    BackendError,
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
    hookimpl,
)

C = TypeVar("C", bound=type)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mutant:
    """One mutant.

    Attributes:
        name: of its class.
        caught_by: the case that has to fail.
        entry: its entry point.
    """

    name: str
    caught_by: str
    entry: str


MUTANTS: list[Mutant] = []


def caught_by(case: str) -> Callable[[C], C]:
    """Adds a mutant to the list."""

    def add(mutant: C) -> C:
        MUTANTS.append(Mutant(mutant.__name__, case, f"tests.mutants.plugins:{mutant.__name__}"))
        return mutant

    return add


class Reference(NimbusBackend):
    """No fault: what the harness itself must let through."""


def order(request: InstanceRequest) -> dict[str, Any]:
    """The body of the call that creates."""
    return {
        "name": request.name,
        "type": request.offer.instance_type,
        "zone": request.offer.zone,
        "spot": request.offer.spot,
        "labels": request.tags,
        "ssh_keys": list(request.ssh_public_keys),
        "user_data": request.user_data,
        "delete_at": request.expires_at.isoformat() if request.expires_at else None,
    }


class Creates(NimbusBackend):
    """A backend whose creation can be changed in its parts."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """One call."""
        return nimbus._instance(self.make(order(request), self.key(request)))

    def make(self, body: dict[str, Any], key: str) -> Any:
        """The call."""
        return self._call("POST", "/v1/servers", json=body, headers={"Idempotency-Key": key} if key else {})

    def key(self, request: InstanceRequest) -> str:
        """The key of idempotency."""
        return request.token


class LooksFirst(Creates):
    """No fault either, and no key: it looks for the intent before it creates, and compares the request by a tag."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """What there is, if it is of the same request."""
        body = order(request)
        seen = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
        for region in ("north", "south", "west"):
            for server in self._servers(region, f"owner:{request.owner}"):
                if server["labels"]["intent"] == str(request.intent):
                    if server["labels"].get("request") != seen:
                        raise InvalidRequestError("this intent was used for another request")
                    return nimbus._instance(server)
        return nimbus._instance(self.make({**body, "labels": {**body["labels"], "request": seen}}, ""))


# -- creating ---------------------------------------------------------------------------------------------------------


@caught_by("test_create_ten_times_is_one_instance")
class IgnoresTheIntent(Creates):
    """Sends no key of idempotency."""

    def key(self, request: InstanceRequest) -> str:
        """None."""
        return ""


@caught_by("test_a_request_from_the_database_is_the_same_request")
class RemembersKeysInMemory(Creates):
    """Draws a random key for each intent, and remembers it: as long as the process lives."""

    def key(self, request: InstanceRequest) -> str:
        """A random one."""
        self.keys: dict[UUID, str] = getattr(self, "keys", {})
        return self.keys.setdefault(request.intent, uuid4().hex)


@caught_by("test_intents_that_differ_in_their_last_bit_are_two_instances")
class CutsTheName(Creates):
    """Uses the name as the key, cut to what it takes for the limit."""

    def key(self, request: InstanceRequest) -> str:
        """Too little of it."""
        return request.name[:32]


@caught_by("test_tags_are_there_even_if_the_first_answer_is_lost")
class TagsAfterCreate(Creates):
    """Creates first and tags then."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Two calls."""
        made = self.make({**order(request), "labels": {}}, request.token)
        return nimbus._instance(self._call("PUT", f"/v1/servers/{made['id']}/labels", json=request.tags))


@caught_by("test_tags_are_part_of_the_call_that_creates")
class TagsOnlyWhatItNeeds(Creates):
    """Leaves out the tags that it does not read itself."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """Two tags."""
        return super().make({**body, "labels": {name: body["labels"][name] for name in ("intent", "owner")}}, key)


@caught_by("test_names_and_tags_of_full_length_are_accepted")
class CutsTags(Creates):
    """Shortens the values of tags, for a limit that this cloud does not have."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """Forty characters of each."""
        return super().make({**body, "labels": {name: value[:40] for name, value in body["labels"].items()}}, key)


@caught_by("test_a_lost_answer_is_unknown_and_asked_for_again[server error]")
class RetriesWithAFreshKey(Creates):
    """Tries again when the outcome is unknown, with a new key."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """Twice."""
        try:
            return super().make(body, key)
        except UnknownOutcomeError:
            return super().make(body, uuid4().hex)


@caught_by("test_create_returns_when_the_cloud_has_accepted")
class ReturnsBeforeAccepted(Creates):
    """Makes the call in the background, and answers at once."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Nobody looks at the answer."""
        threading.Thread(target=self._later, args=(request,), daemon=True).start()
        ref = InstanceRef(backend="nimbus", id=request.name, region=request.offer.region)
        state = InstanceState.PENDING
        return Instance(ref=ref, intent=request.intent, owner=request.owner, state=state, created_at=datetime.now(UTC))

    def _later(self, request: InstanceRequest) -> None:
        time.sleep(0.3)
        try:
            self.make(order(request), request.token)
        except (BackendError, RuntimeError):
            log.info("not created")


@caught_by("test_create_does_not_wait_for_the_boot")
class WaitsForTheBoot(Creates):
    """Returns when the machine runs."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """Asks again and again."""
        made = super().make(body, key)
        while made["status"] == "starting":
            time.sleep(0.05)
            made = self._call("GET", f"/v1/servers/{made['id']}")
        return made


@caught_by("test_the_same_intent_of_another_owner_is_another_instance")
class AdoptsWhatIsNotOurs(Creates):
    """Looks for the intent before it creates, and not for the owner."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """The first one with this intent will do."""
        for region in ("north", "south", "west"):
            for server in self._servers(region, f"intent:{request.intent}"):
                return nimbus._instance(server)
        return nimbus._instance(self.make(order(request), request.token))


@caught_by("test_another_body_is_refused[tags]")
class AnyBodyWillDo(Creates):
    """Takes a key that was used for another request for success."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Finds what there is."""
        try:
            return nimbus._instance(self.make(order(request), request.token))
        except InvalidRequestError:
            listed = self.dstack_list_instances(request.owner)
            return next(one for one in listed if one.intent == request.intent)


@caught_by("test_create_after_the_end_makes_no_second_instance")
class StartsAgain(Creates):
    """When the instance of the intent has ended, it starts another one."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """With a second key."""
        made = super().make(body, key)
        return super().make(body, f"{key}-again") if made["status"] == "deleted" else made


@caught_by("test_a_refusal_is_reported_and_not_worked_around[no capacity]")
class TriesTheNextZone(Creates):
    """Chooses another zone by itself when there is no capacity."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """One after the other."""
        try:
            return super().make(body, key)
        except NoCapacityError:
            return super().make({**body, "zone": "north-a"}, f"{key}-north")


@caught_by("test_the_instance_is_where_it_was_bought")
class AlwaysInTheNorth(Creates):
    """Ignores the zone of the offer."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """In one zone."""
        return super().make({**body, "zone": "north-a"}, key)


@caught_by("test_what_does_not_exist_is_refused_for_certain")
class BuysSomethingElse(Creates):
    """Takes the smallest type for one that it does not know."""

    def make(self, body: dict[str, Any], key: str) -> Any:
        """A default."""
        return super().make({**body, "type": body["type"] if "-" not in body["type"] else "small"}, key)


@caught_by("test_eight_threads_get_what_each_asked_for")
class KeepsTheRequest(Creates):
    """Keeps the request of the call in the object, which several threads use."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Looks something up in between."""
        self.current = request
        self._call("GET", "/v1/regions")
        return nimbus._instance(self.make(order(self.current), self.current.token))


# -- errors -----------------------------------------------------------------------------------------------------------


class Errors(NimbusBackend):
    """A backend whose errors can be changed."""

    def _call(self, method: str, path: str, *, known: bool = True, **options: Any) -> Any:
        try:
            return super()._call(method, path, known=known, **options)
        except BackendError as error:
            raise self.changed(error) from error

    def changed(self, error: BackendError) -> BackendError:
        """What is raised instead."""
        raise NotImplementedError


@caught_by("test_the_error_of_create[no capacity]")
class CapacityIsUnknown(Errors):
    """Looks at the status 503 before the code."""

    def changed(self, error: BackendError) -> BackendError:
        """A server error like any other."""
        return UnknownOutcomeError(str(error)) if isinstance(error, NoCapacityError) else error


@caught_by("test_the_error_of_create[quota]")
class QuotaIsShortage(Errors):
    """Takes a quota for a shortage."""

    def changed(self, error: BackendError) -> BackendError:
        """Which passes by itself, one hopes."""
        return NoCapacityError(str(error)) if isinstance(error, QuotaExceededError) else error


@caught_by("test_a_refusal_is_reported_and_not_worked_around[quota]")
class QuotaIsForbidden(Errors):
    """Looks at the status 403 before the code."""

    def changed(self, error: BackendError) -> BackendError:
        """Credentials that are fine are blamed."""
        return AuthenticationError(str(error)) if isinstance(error, QuotaExceededError) else error


@caught_by("test_the_error_of_create[unauthorized]")
class UnauthorizedIsInvalid(Errors):
    """Takes every 4xx for a bad request."""

    def changed(self, error: BackendError) -> BackendError:
        """Bad requests all of them."""
        return InvalidRequestError(str(error)) if isinstance(error, AuthenticationError) else error


@caught_by("test_the_error_of_create[invalid]")
class InvalidIsUnknown(Errors):
    """Takes a refusal for an unknown outcome, which is repeated for ever."""

    def changed(self, error: BackendError) -> BackendError:
        """Careful, too careful."""
        return UnknownOutcomeError(str(error)) if isinstance(error, InvalidRequestError) else error


@caught_by("test_the_error_of_create[no capacity]")
class ScopeIsTheAccount(Errors):
    """Says that a shortage in one zone reaches everywhere."""

    def changed(self, error: BackendError) -> BackendError:
        """So that nothing is tried elsewhere."""
        if isinstance(error, NoCapacityError):
            return NoCapacityError(str(error), scope="account", retry_after=error.retry_after)
        return error


@caught_by("test_the_error_of_create[throttle]")
class ForgetsRetryAfter(Errors):
    """Does not pass on how long the cloud wants to be left alone."""

    def changed(self, error: BackendError) -> BackendError:
        """The header is lost."""
        return RateLimitedError(str(error)) if isinstance(error, RateLimitedError) else error


@caught_by("test_the_error_of_create[server error]")
class ServerErrorIsShortage(Errors):
    """Takes HTTP 500 for 'none left'."""

    def changed(self, error: BackendError) -> BackendError:
        """The engine goes on to the next offer, while the server may exist."""
        return NoCapacityError(str(error)) if "HTTP 500" in str(error) else error


@caught_by("test_the_error_of_create[drop]")
class DropIsRateLimit(Errors):
    """Says that nothing happened, when the connection broke."""

    def changed(self, error: BackendError) -> BackendError:
        """Nobody knows that."""
        return RateLimitedError(str(error)) if "did not answer" in str(error) else error


@caught_by("test_a_lost_answer_is_unknown_and_asked_for_again[drop]")
class LostAnswerIsInvalid(Errors):
    """Gives a creation up for certain, when its answer was lost."""

    def changed(self, error: BackendError) -> BackendError:
        """The run fails, the server runs on."""
        return InvalidRequestError(str(error)) if "did not answer" in str(error) else error


@caught_by("test_the_error_of_create[quota]")
class LosesTheWords(Errors):
    """Has its own words for everything."""

    def changed(self, error: BackendError) -> BackendError:
        """What the cloud said is gone."""
        error.message = "Could not create the server"
        return error


@caught_by("test_the_error_of_create[unauthorized]")
class TellsTheToken(Errors):
    """Puts the token into the message about the token."""

    def changed(self, error: BackendError) -> BackendError:
        """Helpful, to everybody who reads logs."""
        if isinstance(error, AuthenticationError):
            return AuthenticationError(f"{error} ({self._http.headers['Authorization']})")
        return error


@caught_by("test_logs_hold_no_secret")
class LogsTheToken(NimbusBackend):
    """Logs what it sends, with headers."""

    def _call(self, method: str, path: str, *, known: bool = True, **options: Any) -> Any:
        log.debug("%s %s %s", method, path, self._http.headers.raw)
        return super()._call(method, path, known=known, **options)


class Raw(NimbusBackend):
    """A backend whose HTTP calls can be changed."""

    def _call(self, method: str, path: str, *, known: bool = True, **options: Any) -> Any:
        answer = self.sent(method, path, **options)
        if answer.status_code == 404 and not known:
            return None
        if answer.is_success:
            return answer.json()
        raise nimbus._error(answer, making=method == "POST")

    def sent(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The call."""
        raise NotImplementedError


@caught_by("test_the_error_of_create[drop]")
class LetsHttpxOut(Raw):
    """Lets the errors of its HTTP client out."""

    def sent(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As they are."""
        return self._http.request(method, path, **options)


@caught_by("test_every_hook_gives_up_in_time")
class NeverGivesUp(Raw):
    """Has no time limit."""

    def sent(self, method: str, path: str, **options: Any) -> httpx.Response:
        """However long it takes."""
        try:
            return self._http.request(method, path, timeout=None, **options)
        except httpx.HTTPError as error:
            raise UnknownOutcomeError(str(error)) from error


@caught_by("test_every_hook_gives_up_in_time")
class TimeoutIsShortage(Raw):
    """Takes a time-out for 'none left'."""

    def sent(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The server may exist."""
        try:
            return self._http.request(method, path, timeout=1, **options)
        except httpx.TimeoutException as error:
            if method == "POST":
                raise NoCapacityError(f"timed out: {error}") from error
            raise UnknownOutcomeError(f"timed out: {error}") from error
        except httpx.HTTPError as error:
            raise UnknownOutcomeError(f"{error!r}") from error


@caught_by("test_a_throttled_call_is_not_repeated_at_once")
class HammersTheCloud(NimbusBackend):
    """Repeats what was throttled, at once."""

    def _call(self, method: str, path: str, *, known: bool = True, **options: Any) -> Any:
        for _ in range(20):
            try:
                return super()._call(method, path, known=known, **options)
            except RateLimitedError:
                continue
        return super()._call(method, path, known=known, **options)


# -- looking ----------------------------------------------------------------------------------------------------------


@caught_by("test_get_of_the_unknown_is_none[a plausible id]")
class GetRaises(NimbusBackend):
    """Raises for what is unknown."""

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Instead of None."""
        return nimbus._instance(self._call("GET", f"/v1/servers/{quote(ref.id, safe='')}"))


@caught_by("test_the_error_of_a_call[get-server error]")
class GetSwallows(NimbusBackend):
    """Takes an error for an instance that is gone."""

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """None, whatever it is."""
        try:
            return super().dstack_get_instance(ref)
        except BackendError:
            return None


@caught_by("test_lost_tags_are_no_end")
class MissesTags(NimbusBackend):
    """Takes a server that has lost its labels for one that is gone."""

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """None for what is not ours."""
        try:
            return super().dstack_get_instance(ref)
        except UnknownOutcomeError as error:
            if "lost its labels" in str(error):
                return None
            raise


@caught_by("test_a_stored_reference_is_enough")
class KnowsItsOwn(NimbusBackend):
    """Keeps the ids of its instances in memory, and knows no others."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Remembers it."""
        made = super().dstack_create_instance(request)
        self.ids: set[str] = getattr(self, "ids", set()) | {made.ref.id}
        return made

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Only what this process made."""
        return super().dstack_get_instance(ref) if ref.id in getattr(self, "ids", ()) else None


@caught_by("test_an_instance_that_is_not_listed_yet_is_known")
class LooksInTheListing(NimbusBackend):
    """Looks for an instance in the listing of its region."""

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Which may lag."""
        found = (server for server in self._servers(ref.region, "managed-by:dstack") if server["id"] == ref.id)
        return next(map(nimbus._instance, found), None)


@caught_by("test_get_agrees_with_create")
class BlocksForAMinute(NimbusBackend):
    """Waits until something changes, as long polling does."""

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """A minute."""
        time.sleep(60)
        return super().dstack_get_instance(ref)


class Lists(NimbusBackend):
    """A backend whose listing can be changed in its parts."""

    regions: Sequence[str] = ("north", "south", "west")

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Region by region."""
        return [nimbus._instance(one) for region in self.regions for one in self._servers(region, self.label(owner))]

    def label(self, owner: UUID) -> str:
        """What is listed."""
        return f"owner:{owner}"


@caught_by("test_many_instances_are_listed_all")
class ListsOnePage(Lists):
    """Reads the first page."""

    def _servers(self, region: str, label: str) -> Iterator[dict[str, Any]]:
        yield from self._call("GET", "/v1/servers", params={"region": region, "label": label})["servers"]


@caught_by("test_many_instances_are_listed_all")
class ListsPagesTwice(Lists):
    """Asks for one page after the last one, and gets the last again."""

    def _servers(self, region: str, label: str) -> Iterator[dict[str, Any]]:
        listed = list(super()._servers(region, label))
        yield from listed
        yield from listed[50:]


@caught_by("test_every_region_is_listed")
class ListsOneRegion(Lists):
    """Lists the first region."""

    regions = ("north",)


@caught_by("test_a_region_that_is_no_longer_configured_is_listed")
class ListsConfiguredRegions(Lists):
    """Lists the regions that are configured now."""

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Those alone."""
        self.regions = self._regions or Lists.regions
        return super().dstack_list_instances(owner)


@caught_by("test_other_owners_are_left_out")
class ListsOtherOwners(Lists):
    """Lists all that dstack made."""

    def label(self, owner: UUID) -> str:
        """Whoever's dstack it was."""
        return "managed-by:dstack"


@caught_by("test_servers_of_others_do_no_harm")
class StumblesOverOthers(Lists):
    """Reads the tags of all servers of the account, and expects its own on each."""

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Filters too late."""
        listed: list[dict[str, Any]] = []
        for region in self.regions:
            listed += self._call("GET", "/v1/servers", params={"region": region})["servers"]
        return [one for one in map(nimbus._instance, listed) if one.owner == owner]


@caught_by("test_a_partial_listing_is_no_listing[server error]")
class ListsWhatItGets(Lists):
    """Passes over the regions that do not answer."""

    def _servers(self, region: str, label: str) -> Iterator[dict[str, Any]]:
        try:
            yield from super()._servers(region, label)
        except UnknownOutcomeError:
            log.warning("region %s does not answer", region)


@caught_by("test_the_error_of_a_call[list-unauthorized]")
class ListsNothingOnErrors(Lists):
    """Returns an empty listing when it may not look."""

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Nothing there, it says."""
        try:
            return super().dstack_list_instances(owner)
        except AuthenticationError:
            return []


# -- ending -----------------------------------------------------------------------------------------------------------


class Ends(NimbusBackend):
    """A backend whose termination can be changed in its parts."""

    options: dict[str, Any] = {"known": False, "params": {"delete_disks": "true"}}  # noqa: RUF012  # never changed

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """One call."""
        self._call("DELETE", f"/v1/servers/{quote(ref.id, safe='')}", **self.options)


@caught_by("test_terminate_of_the_unknown_is_fine[a plausible id]")
class TerminateRaises(Ends):
    """Fails for what is unknown."""

    options = {"params": {"delete_disks": "true"}}  # noqa: RUF012  # never changed


@caught_by("test_terminate_takes_everything_along")
class LeavesTheDisk(Ends):
    """Forgets the disk."""

    options = {"known": False}  # noqa: RUF012  # never changed


@caught_by("test_terminate_leaves_the_others_alone")
class EndsTheWholeOwner(Ends):
    """Ends by the owner's tag."""

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """All of them."""
        found = self.dstack_get_instance(ref)
        for one in self.dstack_list_instances(found.owner) if found else []:
            super().dstack_terminate_instance(one.ref)


@caught_by("test_the_error_of_a_call[terminate-server error]")
class TerminateSwallows(Ends):
    """Says that it was done, whatever the cloud says."""

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Best effort."""
        try:
            super().dstack_terminate_instance(ref)
        except BackendError:
            log.warning("not terminated")


@caught_by("test_terminate_while_pending_ends_it")
class LeavesThePending(Ends):
    """Ends only what runs."""

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """What is starting is left alone."""
        found = self.dstack_get_instance(ref)
        if found is not None and found.state is InstanceState.RUNNING:
            super().dstack_terminate_instance(ref)


@caught_by("test_terminate_again_after_a_lost_answer[drop]")
class DisksInASecondCall(Ends):
    """Deletes the server first, and the disk only if the server was there to be deleted."""

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Two calls, of which the second one may never be made."""
        found = self.dstack_get_instance(ref)
        if found is None or found.state in (InstanceState.STOPPING, InstanceState.TERMINATED):
            return
        path = f"/v1/servers/{quote(ref.id, safe='')}"
        self._call("DELETE", path, known=False)
        self._call("DELETE", path, known=False, params={"delete_disks": "true"})


# -- states -----------------------------------------------------------------------------------------------------------


class Describes(NimbusBackend):
    """A backend whose descriptions can be changed."""

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Described anew."""
        return self.described(super().dstack_create_instance(request))

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Described anew."""
        found = super().dstack_get_instance(ref)
        return found and self.described(found)

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Described anew."""
        return [self.described(one) for one in super().dstack_list_instances(owner)]

    def described(self, instance: Instance) -> Instance:
        """What is said instead."""
        raise NotImplementedError


@caught_by("test_stopped_is_not_terminated")
class StoppedIsTerminated(Describes):
    """Takes a server that is switched off for gone."""

    def described(self, instance: Instance) -> Instance:
        """It is still billed."""
        if instance.state is InstanceState.STOPPING and instance.reason is None:
            return instance.model_copy(update={"state": InstanceState.TERMINATED})
        return instance


@caught_by("test_pending_becomes_running")
class StartingIsRunning(Describes):
    """Takes a server that boots for one that runs."""

    def described(self, instance: Instance) -> Instance:
        """Nearly there."""
        if instance.state is InstanceState.PENDING:
            return instance.model_copy(update={"state": InstanceState.RUNNING})
        return instance


@caught_by("test_the_reason_is_the_right_one[spot interruption]")
class InterruptionsAreRequested(Describes):
    """Says that each end was asked for."""

    def described(self, instance: Instance) -> Instance:
        """So nothing is tried again."""
        gone = instance.state is InstanceState.TERMINATED
        return instance.model_copy(update={"reason": StateReason.REQUESTED}) if gone else instance


@caught_by("test_get_agrees_with_create")
class NaiveTimes(Describes):
    """Has times without a zone."""

    def described(self, instance: Instance) -> Instance:
        """UTC, one assumes."""
        return instance.model_copy(update={"created_at": instance.created_at.replace(tzinfo=None)})


@caught_by("test_created_at_does_not_follow_the_local_time_zone")
class LocalTimes(Describes):
    """Takes the cloud's times for local ones."""

    def described(self, instance: Instance) -> Instance:
        """Right where the server's clock is on UTC."""
        return instance.model_copy(update={"created_at": instance.created_at.replace(tzinfo=None).astimezone()})


@caught_by("test_list_agrees_with_get")
class AlwaysNew(Describes):
    """Says that each instance was created just now."""

    def described(self, instance: Instance) -> Instance:
        """So nothing is ever old enough to be swept."""
        return instance.model_copy(update={"created_at": datetime.now(UTC)})


@caught_by("test_a_running_instance_can_be_reached")
class NeverReachable(Describes):
    """Has no address."""

    def described(self, instance: Instance) -> Instance:
        """The agent is never reached."""
        return instance.model_copy(update={"endpoint": None})


class Connects(Describes):
    """No fault either: its machines have no address, and are reached by a way that is made when it is asked for."""

    def described(self, instance: Instance) -> Instance:
        """No address is shown."""
        return instance.model_copy(update={"endpoint": None})

    @hookimpl
    def dstack_connect(self, instance: Instance) -> Endpoint | None:
        """The way to this instance, the same one each time."""
        found = NimbusBackend.dstack_get_instance(self, instance.ref)
        return found.endpoint if found else None


@caught_by("test_connecting_twice_is_the_same")
class ConnectsAnew(Connects):
    """Opens another way each time."""

    @hookimpl
    def dstack_connect(self, instance: Instance) -> Endpoint | None:
        """A port that grows."""
        self.port = getattr(self, "port", 2200) + 1
        return Endpoint(ssh_host="127.0.0.1", ssh_port=self.port)


@caught_by("test_get_agrees_with_create")
class OneIntentForAll(Describes):
    """Reads the intent from somewhere else."""

    def described(self, instance: Instance) -> Instance:
        """From nowhere."""
        return instance.model_copy(update={"intent": UUID(int=0)})


# -- offers -----------------------------------------------------------------------------------------------------------


class Offers(NimbusBackend):
    """A backend whose offers can be changed."""

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """Each changed."""
        return [self.changed(offer) for offer in super().dstack_list_offers(requirements) if self.kept(offer)]

    def changed(self, offer: Offer) -> Offer:
        """What is offered instead."""
        return offer

    def kept(self, offer: Offer) -> bool:
        """Whether it is offered at all."""
        return True


def with_resources(offer: Offer, **changes: Any) -> Offer:
    """The same offer of another machine."""
    return replace(offer, resources=replace(offer.resources, **changes))


@caught_by("test_memory_is_in_mib")
class MemoryInGib(Offers):
    """Passes the cloud's number on."""

    def changed(self, offer: Offer) -> Offer:
        """GiB."""
        return with_resources(offer, memory_mib=offer.resources.memory_mib // 1024)


@caught_by("test_machines_are_those_of_the_cloud")
class MemoryInMegabytes(Offers):
    """Multiplies by 1000."""

    def changed(self, offer: Offer) -> Offer:
        """MB."""
        return with_resources(offer, memory_mib=offer.resources.memory_mib // 1024 * 1000)


@caught_by("test_disk_is_in_mib")
class DiskInGib(Offers):
    """Passes the cloud's number on."""

    def changed(self, offer: Offer) -> Offer:
        """GiB."""
        return with_resources(offer, disk_mib=offer.resources.disk_mib // 1024)


@caught_by("test_machines_are_those_of_the_cloud")
class GpuMemoryTogether(Offers):
    """Gives each GPU the memory of all."""

    def changed(self, offer: Offer) -> Offer:
        """Eight times too much."""
        gpus = offer.resources.gpus
        return with_resources(offer, gpus=tuple(replace(one, memory_mib=one.memory_mib * len(gpus)) for one in gpus))


@caught_by("test_gpus_are_named_as_users_write_them")
class GpusAsTheCloudSays(Offers):
    """Names GPUs as the cloud does."""

    def changed(self, offer: Offer) -> Offer:
        """With vendor and memory."""
        gpus = offer.resources.gpus
        return with_resources(offer, gpus=tuple(replace(one, name=f"NVIDIA {one.name} 80GB") for one in gpus))


@caught_by("test_prices_are_usd_per_hour")
class PricePerMinute(Offers):
    """Forgets the 60."""

    def changed(self, offer: Offer) -> Offer:
        """USD per minute."""
        return replace(offer, price=offer.price / 60)


@caught_by("test_prices_are_usd_per_hour")
class PriceInCents(Offers):
    """Forgets the 100."""

    def changed(self, offer: Offer) -> Offer:
        """Cents."""
        return replace(offer, price=offer.price * 100)


@caught_by("test_prices_are_those_of_the_cloud")
class PriceOfAnotherRegion(Offers):
    """Takes the price of the first region for all."""

    def changed(self, offer: Offer) -> Offer:
        """Dearer than it says, in the south."""
        return replace(offer, price=offer.price / 1.1 if offer.region == "south" else offer.price)


@caught_by("test_nothing_is_offered_twice")
class OffersTwice(Offers):
    """Reads a page twice."""

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """The beginning comes again."""
        offers = super().dstack_list_offers(requirements)
        return offers + offers[:10]


@caught_by("test_spot_is_not_dearer")
class SpotTheWrongWayRound(Offers):
    """Reads the flag as its opposite."""

    def changed(self, offer: Offer) -> Offer:
        """On demand is spot."""
        return replace(offer, spot=not offer.spot)


@caught_by("test_what_is_sold_out_is_shown")
class HidesTheSoldOut(Offers):
    """Leaves out what cannot be had now."""

    def kept(self, offer: Offer) -> bool:
        """So nobody is told why nothing fits."""
        return offer.availability is Availability.AVAILABLE


@caught_by("test_what_cannot_be_had_says_why")
class GivesNoReason(Offers):
    """Marks what cannot be had, and does not say why."""

    def changed(self, offer: Offer) -> Offer:
        """Silence."""
        return replace(offer, reason=None)


@caught_by("test_availability_is_that_of_the_cloud")
class EverythingIsAvailable(Offers):
    """Does not look at what the cloud says about availability."""

    def changed(self, offer: Offer) -> Offer:
        """One will see."""
        return replace(offer, availability=Availability.AVAILABLE, reason=None)


@caught_by("test_everything_that_is_sold_is_offered")
class OneZoneOfEach(Offers):
    """Offers the first zone of each region."""

    def kept(self, offer: Offer) -> bool:
        """The others are forgotten."""
        return (offer.zone or "").endswith("-a")


@caught_by("test_sizes_hide_nothing_that_fits[memory]")
class MoreThanTheMinimum(NimbusBackend):
    """Filters by more than the minimum, and not by at least."""

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """The one that fits exactly is hidden."""
        least = requirements.memory_mib.min or 0
        return [one for one in super().dstack_list_offers(requirements) if one.resources.memory_mib > least]


@caught_by("test_places_and_prices_hide_nothing_that_fits[price]")
class BelowTheLimit(NimbusBackend):
    """Filters by less than the price limit, which is inclusive."""

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """The one at the limit is hidden."""
        limit = requirements.max_price if requirements.max_price is not None else float("inf")
        return [one for one in super().dstack_list_offers(requirements) if one.price < limit]


# -- package and configuration ----------------------------------------------------------------------------------------

MUTANTS.append(Mutant("LoadsItsSdkAtOnce", "test_registration_loads_no_sdk", "tests.mutants.eager"))
MUTANTS.append(Mutant("AsksTheNetworkAtOnce", "test_registration_touches_no_network", "tests.mutants.eager"))


class TokenAsText(NimbusBackend):
    """Reads a token that is plain text."""

    def __init__(self, config: Any) -> None:
        from pydantic import SecretStr

        super().__init__(config.model_copy(update={"token": SecretStr(config.token)}))


@caught_by("test_secrets_are_declared_as_secrets")
class TokenInTheOpen(TokenAsText):
    """Declares the token as text."""


@caught_by("test_an_unknown_key_is_refused")
class AcceptsAnyKey(NimbusBackend):
    """Ignores keys that it does not know."""


@caught_by("test_the_plugin_api_is_one_that_the_core_speaks")
class WrittenForAnotherApi(NimbusBackend):
    """Declares another version of the hook specification."""


@caught_by("test_the_title_is_for_people")
class Nameless(NimbusBackend):
    """Has no title."""


@caught_by("test_the_factory_makes_an_object_with_the_five_hooks")
class ForgetsAMark(NimbusBackend):
    """Leaves @hookimpl away."""

    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """The core does not see it."""


@caught_by("test_hooks_are_spelt_right")
class Misspells(NimbusBackend):
    """Has a hook that there is not."""

    @hookimpl
    def dstack_check_configuration(self) -> list[str]:
        """Nobody calls it."""
        return []


@caught_by("test_wrong_credentials_are_found")
class ChecksNothing(NimbusBackend):
    """Says that all is well."""

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Without looking."""
        return []


@caught_by("test_the_backend_shows_no_secret")
class ShowsItself(NimbusBackend):
    """Has a repr for debugging."""

    def __repr__(self) -> str:
        return f"Nimbus({self._http.headers['Authorization']})"
