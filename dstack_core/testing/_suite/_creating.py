"""Cases about creation: one intent is one instance, whoever asks, however often, whatever was answered."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest

from dstack_core.plugin import BackendError, Instance, InstanceRequest, InvalidRequestError, NoCapacityError, Offer
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import Outcome, together
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._needs import BOOT, FAULTS, LAG, MARKED, NATIVE, TAGGED, TO_ORDER, TRUTH, needs
from dstack_core.testing._suite._requests import new_intent
from dstack_core.testing._suite._rig import Rig

_SKEW = timedelta(minutes=5)
_AT_ONCE = 5.0
_TAG = "k" * 63
ONE = (
    "send the intent's token with the call that creates (`request.token`, `request.request_id` or `request.name`, as "
    "the cloud takes it); where it has none, look for the intent's tag before creating"
)


class CreateCases(Base):
    """Creation is idempotent by the intent, and marks what it makes from the first moment."""

    def test_create_makes_an_instance(self, rig: Rig) -> None:
        """Does an accepted request make exactly one instance, which the backend then knows?"""
        instance = rig.start()
        known = rig.backend.get(instance.ref)
        expect(
            known is not None and known.intent == instance.intent,
            "create",
            "what was created is not there",
            expected=f"the instance {instance.ref.id} from dstack_get_instance",
            got=known,
            cure="return the cloud's own id in `ref.id`, and what else finds the instance again in `ref`",
        )

    @needs(TRUTH)
    def test_create_returns_when_the_cloud_has_accepted(self, rig: Rig) -> None:
        """Does the server exist in the cloud when the hook returns?"""
        instance = rig.start()
        there = [server.id for server in rig.new_servers()]
        expect(
            len(there) == 1,
            "create",
            "the hook returned, and the cloud has not exactly one new server",
            expected="one server, as soon as the hook returns",
            got=there or "none",
            cure="make the call in the hook and look at its answer; one in the background can fail when nobody looks",
        )
        _expect_marked(rig, rig.new_servers(), instance)

    def test_the_answer_is_about_the_request(self, rig: Rig) -> None:
        """Are intent, owner and backend those of the request?"""
        request = rig.request()
        instance = rig.create(request)
        had = (instance.intent, instance.owner, instance.ref.backend)
        expect(
            had == (request.intent, request.owner, rig.name),
            "instance-intent",
            "the answer is about something else",
            expected=(request.intent, request.owner, rig.name),
            got=had,
            cure="read intent and owner back from what the cloud answers",
        )

    def test_create_ten_times_is_one_instance(self, rig: Rig) -> None:
        """Does the same request, ten times, one after the other, give one instance?"""
        request = rig.request()
        _expect_one(rig, request, [rig.create(request) for _ in range(10)])

    @needs(NATIVE)
    def test_create_ten_times_at_once_is_one_instance(self, rig: Rig) -> None:
        """Does the same request, ten times at once in one object, give one instance?"""
        request = rig.request()
        rig.expect_to_end(request)
        outcomes = together([lambda: rig.backend.create(request)] * 10)
        _expect_one(rig, request, _answers(rig, outcomes))

    @needs(NATIVE)
    def test_two_workers_with_one_intent_make_one_instance(self, rig: Rig) -> None:
        """Does the same request, at once from two objects as two processes would have them, give one instance?"""
        request = rig.request()
        rig.expect_to_end(request)
        workers = [rig.another(), rig.another()] * 3
        outcomes = together([partial(worker.create, request) for worker in workers])
        _expect_one(rig, request, _answers(rig, outcomes))

    def test_a_request_from_the_database_is_the_same_request(self, rig: Rig) -> None:
        """Does a request that was written down and read by another process give the instance of the first call?"""
        request = rig.request()
        first = rig.create(request)
        again = InstanceRequest.model_validate_json(request.model_dump_json())
        _expect_one(rig, request, [first, rig.create(again, rig.another())])

    def test_create_later_gives_the_first_instance(self, rig: Rig) -> None:
        """Does the same request, when the machine runs, still give that one?"""
        request = rig.request()
        first = rig.create(request)
        rig.running(first)
        _expect_one(rig, request, [first, rig.create(request)])

    def test_create_after_the_end_makes_no_second_instance(self, rig: Rig) -> None:
        """Does the same request, after its instance was terminated, return that one, and start nothing?"""
        request = rig.request()
        first = rig.create(request)
        rig.end(first)
        again = rig.create(request)
        alive = [one for one in rig.backend.listed(rig.owner) if one.state.value in ("pending", "running")]
        expect(
            again.ref.id == first.ref.id and not alive,
            "create-once",
            "after the instance of an intent had ended, the same request started another one",
            expected=f"the ended instance {first.ref.id}, stopping or terminated",
            got=f"{again.ref.id} ({again.state.value}); alive: {[one.ref.id for one in alive]}",
            cure=ONE + "; a search for the intent has to find ended instances, too",
        )

    @pytest.mark.parametrize("changed", ["tags", "user_data", "ssh_public_keys"])
    def test_another_body_is_refused(self, rig: Rig, changed: str) -> None:
        """Is the same intent with other tags, user data or keys refused, without a second instance?"""
        request = rig.request()
        first = rig.create(request)
        other = request.model_copy(update=_changes(request)[changed])
        try:
            answer = rig.backend.create(other)
        except InvalidRequestError:
            _expect_one(rig, request, [first, rig.create(request)])
            return
        fail(
            "create-body",
            f"the same intent with other {changed} was accepted",
            expected="InvalidRequestError",
            got=f"the instance {answer.ref.id}",
            cure="send everything of the request, so that the cloud compares it; where it does not compare, write a "
            "hash of the request into a tag and compare that",
        )

    def test_two_intents_are_two_instances(self, rig: Rig) -> None:
        """Do two intents of the same kind give two instances?"""
        first, second = rig.start(), rig.start()
        _expect_two(first, second, "two intents share an instance")

    def test_intents_that_differ_in_their_last_bit_are_two_instances(self, rig: Rig) -> None:
        """Do two intents whose names and tokens look alike at the beginning give two instances?"""
        intent = new_intent()
        near = UUID(int=intent.int ^ 0b111)
        requests = [rig.request(intent=intent), rig.request(intent=near)]
        try:
            first, second = map(rig.create, requests)
        except InvalidRequestError as refusal:
            fail(
                "intent",
                "of two intents that differ at their end, the second was taken for the first",
                expected="two instances",
                got=f"InvalidRequestError: {refusal}",
                cure="use the whole name, token or UUID of the request, and do not cut it",
            )
        _expect_two(first, second, "two intents whose names begin alike share an instance")

    @needs(MARKED)
    def test_the_same_intent_of_another_owner_is_another_instance(self, rig: Rig) -> None:
        """Is an instance of another owner left alone, even if it carries the same intent?"""
        intent = new_intent()
        theirs = rig.create(rig.request(owner=uuid4(), intent=intent))
        ours = rig.create(rig.request(intent=intent))
        _expect_two(theirs, ours, "an instance of another owner was taken for ours")

    def test_eight_threads_get_what_each_asked_for(self, rig: Rig) -> None:
        """Do eight threads that create through one object each get the instance of their own request?"""
        rig.afford(16)
        requests = [rig.request() for _ in range(16 if not rig.info.existing_machines else 8)]
        rig.expect_to_end(*requests)
        outcomes = together([partial(rig.backend.create, request) for request in requests])
        made = _answers(rig, outcomes)
        expect(
            len({one.ref.id for one in made}) == len(requests),
            "threads",
            "dstack_create_instance: threads that create at once share instances",
            expected=f"{len(requests)} instances",
            got=len({one.ref.id for one in made}),
            cure="keep nothing of one call in the object: no request, no page, no 'current' client",
        )
        _expect_all_marked(rig, requests)

    # -- what is asked for ------------------------------------------------------------------------------------------

    @needs(TO_ORDER)
    def test_the_instance_is_where_it_was_bought(self, rig: Rig) -> None:
        """Is the instance in the region and zone of the offer, for the cheapest offer of each region?"""
        for offer in one_in_each_region(rig):
            instance = rig.start(offer)
            had = (instance.ref.region, instance.ref.zone or offer.zone)
            expect(
                had == (offer.region, offer.zone or instance.ref.zone),
                "request-offer",
                "the instance is somewhere else",
                expected=f"{offer.region}, {offer.zone}",
                got=f"{instance.ref.region}, {instance.ref.zone}",
                cure="buy in `request.offer.zone` or `region`, and say in `ref` where the cloud put it",
            )

    @needs(TO_ORDER)
    def test_what_does_not_exist_is_refused_for_certain(self, rig: Rig) -> None:
        """Is a request for a type that does not exist refused by a class that says that nothing was made?"""
        request = rig.request(_changed_offer(rig.offer, instance_type="no-such-type-xyz"))
        rig.expect_to_end(request)
        try:
            instance = rig.backend.create(request)
        except (InvalidRequestError, NoCapacityError):
            return
        except BackendError as error:
            fail(
                "create-invalid",
                "a refusal of the cloud's is not reported as one",
                expected="InvalidRequestError (or NoCapacityError)",
                got=f"{type(error).__name__}: {error}",
                cure="a request that the cloud refuses with 400, 404 or 422 did definitely not create anything",
            )
        fail(
            "request-offer",
            "a type that does not exist was accepted",
            expected="InvalidRequestError",
            got=f"the instance {instance.ref.id}",
            cure="buy what `request.offer` names, and nothing else",
        )

    def test_names_and_tags_of_full_length_are_accepted(self, rig: Rig) -> None:
        """Are a name of 40 characters, and keys and values of tags of 63, accepted and kept whole?"""
        request = rig.request()
        request = request.model_copy(update={"tags": {**request.tags, _TAG: "v" * 63, "run": "r-_" * 21}})
        instance = rig.create(request)
        again = rig.create(request)
        expect(
            len(request.name) == 40 and again.ref == instance.ref,
            "request-name",
            "a request of full length is not the same when it comes again",
            expected=instance.ref.id,
            got=again.ref.id,
            cure="do not shorten the name or the tags",
        )
        _expect_all_marked(rig, [request])

    @needs(TAGGED, TRUTH)
    def test_tags_are_part_of_the_call_that_creates(self, rig: Rig) -> None:
        """Were all tags in the create call itself, so that no crash can leave an instance without them?"""
        request = rig.request()
        rig.create(request)
        for server in rig.new_servers():
            born = server.born_with
            missing = request.tags.items() - (born or {}).items()
            expect(
                born is None or not missing,
                "create-tags",
                "tags were put on the server after it had been created, or not at all",
                expected="all of `request.tags` in the create call",
                got=f"without {sorted(key for key, _ in missing)}",
                cure="pass them in the call that creates; if the cloud cannot, write owner and intent into the name, "
                "and declare ownership='name'",
            )

    @needs(MARKED, FAULTS, TRUTH)
    def test_tags_are_there_even_if_the_first_answer_is_lost(self, rig: Rig) -> None:
        """Does a server whose creation was never answered carry its intent and owner?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing("drop", 20, after=True), pytest.raises(BackendError):
            rig.backend.create(request)
        made = rig.new_servers()
        unmarked = [server.id for server in made if (server.intent, server.owner) != (request.intent, request.owner)]
        expect(
            made and not unmarked,
            "request-tags",
            "a server whose creation was not answered does not carry its intent and owner",
            expected=f"intent {request.intent} and owner {request.owner} from the create call on",
            got=f"unmarked: {unmarked}" if made else "no server at all",
            cure="put all of `request.tags` into the create call, which has to be the first one that changes anything",
        )

    @needs(MARKED)
    def test_intent_and_owner_are_in_the_first_listing(self, rig: Rig) -> None:
        """Do the intent and owner show in the very first listing that has the instance?"""
        instance = rig.start()
        listed = first_listed(rig, instance)
        expect(
            (listed.intent, listed.owner) == (instance.intent, instance.owner),
            "instance-intent",
            "the first listing does not carry the intent",
            expected=(instance.intent, instance.owner),
            got=(listed.intent, listed.owner),
            cure="put the tags into the create call, and read them back",
        )

    # -- when -------------------------------------------------------------------------------------------------------

    @needs(BOOT)
    def test_create_does_not_wait_for_the_boot(self, rig: Rig) -> None:
        """Does the hook return while the machine, which takes an hour, boots?"""
        rig.cloud.boot(3600)
        request = rig.request()
        rig.expect_to_end(request)
        outcome = Outcome(lambda: rig.backend.create(request))
        expect(
            outcome.ended(min(_AT_ONCE, rig.info.hook_timeout)),
            "create-boot",
            "the hook waits for the machine to boot",
            expected=f"an answer within {_AT_ONCE:g} s, for a machine that takes an hour",
            got="none",
            cure="return what the cloud answers at once; the engine asks dstack_get_instance until it runs",
        )
        rig.know(outcome.get())

    def test_created_at_is_now(self, rig: Rig) -> None:
        """Is `created_at` the time at which the cloud accepted the request?"""
        _expect_now(rig.start().created_at)

    def test_created_at_does_not_follow_the_local_time_zone(self, rig: Rig) -> None:
        """Is `created_at` right on a server in another time zone, and is it the same from create, get and list?"""
        with _local_time("XXX-5:30"):
            instance = rig.start()
            _expect_now(instance.created_at)
            known = rig.backend.get(instance.ref)
            expect(
                known is not None and abs(known.created_at - instance.created_at) < timedelta(seconds=2),
                "instance-created",
                "`created_at` changes from one answer to the next",
                expected=instance.created_at,
                got=known and known.created_at,
                cure="take the cloud's time of creation everywhere, and never the time of asking",
            )

    @needs(LAG, NATIVE)
    def test_create_again_while_the_listing_lags_is_one_instance(self, rig: Rig) -> None:
        """Does the same request give one instance, while no listing shows it yet?"""
        rig.cloud.lag(3600)
        request = rig.request()
        try:
            _expect_one(rig, request, [rig.create(request), rig.create(request, rig.another()), rig.create(request)])
        finally:
            rig.cloud.lag(0)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _answers(rig: Rig, outcomes: Sequence[Outcome[Instance]]) -> list[Instance]:
    """What the threads got; all of them are ended when the case is over."""
    __tracebackhide__ = True
    made = []
    for outcome in outcomes:
        if outcome.error is not None and not isinstance(outcome.error, AssertionError):
            fail(
                "create-once",
                "the same request, asked for at once, was answered with an error",
                expected="the instance, from each of the calls",
                got=f"{type(outcome.error).__name__}: {outcome.error}",
                cure="where the cloud says that the name or the key is taken, look the instance up and return it",
            )
        made.append(outcome.get())
    rig.know(*made)
    return made


def _expect_one(rig: Rig, request: InstanceRequest, answers: Sequence[Instance]) -> None:
    __tracebackhide__ = True
    ids = list(dict.fromkeys(one.ref.id for one in answers))
    expect(
        len(ids) == 1,
        "create-once",
        "the same request was answered with different instances",
        expected=f"{ids[0]} each time",
        got=", ".join(ids),
        cure=ONE,
    )
    listed = [one.ref.id for one in rig.backend.listed(request.owner) if one.intent == request.intent]
    expect(
        len(listed) <= 1,
        "intent",
        "the listing has several instances of one intent",
        expected=ids[0],
        got=", ".join(listed),
        cure=ONE,
    )
    if any(need.met(rig) for need in (TRUTH,)):
        there = [server.id for server in rig.new_servers() if server.intent in (None, request.intent)]
        expect(
            len(there) == 1,
            "intent",
            "the cloud has more or fewer servers than one for one intent",
            expected="one server",
            got=", ".join(there) or "none",
            cure=ONE,
        )


def _expect_two(first: Instance, second: Instance, what: str) -> None:
    __tracebackhide__ = True
    expect(
        first.ref.id != second.ref.id,
        "intent",
        what,
        expected="two instances",
        got=f"{first.ref.id} twice",
        cure="find instances by the whole intent and the owner, and by nothing that two intents could share",
    )


def _expect_marked(rig: Rig, servers: Sequence[Any], instance: Instance) -> None:
    __tracebackhide__ = True
    if rig.info.ownership == "none":
        return
    for server in servers:
        expect(
            (server.intent, server.owner) == (instance.intent, instance.owner),
            "request-tags",
            "the server in the cloud does not carry its intent and owner",
            expected=f"intent {instance.intent}, owner {instance.owner}",
            got=f"intent {server.intent}, owner {server.owner}",
            cure="put all of `request.tags` into the create call",
        )


def _expect_all_marked(rig: Rig, requests: Sequence[InstanceRequest]) -> None:
    """In the cloud, each request has its one server with all of its tags."""
    __tracebackhide__ = True
    if not TRUTH.met(rig) or not TAGGED.met(rig):
        return
    for request in requests:
        servers = rig.servers_of(request.intent)
        kept = [one for one in servers if one.labels is None or request.tags.items() <= dict(one.labels).items()]
        expect(
            len(servers) == len(kept) == 1,
            "request-tags",
            "the cloud has not one server with all the tags of a request",
            expected=f"one server with {dict(request.tags)}",
            got=[server.labels for server in servers],
            cure="send the tags of this very request, whole",
        )


def _changes(request: InstanceRequest) -> dict[str, dict[str, Any]]:
    return {
        "tags": {"tags": {**request.tags, "run": "another"}},
        "user_data": {"user_data": "#cloud-config\nruncmd: [date]\n"},
        "ssh_public_keys": {"ssh_public_keys": ()},
    }


def _changed_offer(offer: Offer, **changes: Any) -> Offer:
    from dataclasses import replace

    return replace(offer, **changes)


def one_in_each_region(rig: Rig) -> Iterator[Offer]:
    seen = set()
    for offer in rig.offers:
        if offer.region not in seen and not offer.spot:
            seen.add(offer.region)
            yield offer


def first_listed(rig: Rig, instance: Instance) -> Instance:
    __tracebackhide__ = True

    def listed() -> Instance | None:
        return next((one for one in rig.backend.listed(rig.owner) if one.ref.id == instance.ref.id), None)

    return rig.until(
        listed,
        "visible",
        "dstack_list_instances: a new instance does not appear in the listing",
        expected=f"{instance.ref.id} within {rig.info.visibility_window:g} s, as `visibility_window` says",
        cure="list all pages of all regions by the owner's tag; or declare a longer `visibility_window`",
        within=rig.info.visibility_window + 1,
    )


def _expect_now(created_at: datetime) -> None:
    __tracebackhide__ = True
    now = datetime.now(UTC)
    expect(
        abs(created_at - now) < _SKEW,
        "instance-created",
        "`created_at` is not the time of creation",
        expected=f"about {now.isoformat(timespec='seconds')}",
        got=created_at.isoformat(timespec="seconds"),
        cure="the cloud's time is usually UTC: parse it with `tzinfo=UTC`, and never with the local time zone",
    )


@contextmanager
def _local_time(zone: str) -> Iterator[None]:
    """This process is in another time zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ")
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()
