"""The hooks, over the SDK."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID, uuid5

from google.api_core.exceptions import BadRequest, Conflict, NotFound

from dstack_core.plugin import (
    BackendError,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
    hookimpl,
)
from dstack_gcp._account import Account
from dstack_gcp._calls import action_of
from dstack_gcp._catalogue import Catalogue, cache_folder
from dstack_gcp._checks import Checks
from dstack_gcp._config import GcpConfig
from dstack_gcp._errors import SDK_ERRORS, reasons_of, translated
from dstack_gcp._history import failure_of, inserts, is_name, is_over, operations, reason_of
from dstack_gcp._images import Images
from dstack_gcp._instances import instance, is_of, launch, ref_of, whose
from dstack_gcp._network import Networks

T = TypeVar("T")
P = ParamSpec("P")

_PAUSES = (0.0, 0.2, 0.4, 0.8, 1.2)
"""Seconds between the looks at a creation: a shortage usually shows at once, and whoever waits longer would block."""


_TRIES = 8
"""Failed tries that are passed over while the list of operations lags."""

_HARMLESS = ("", "NO_RESULTS_ON_PAGE")
"""What a listing may say of a zone without being partial."""


def _only_looks(hook: Callable[P, T]) -> Callable[P, T]:
    """For hooks that conclude nothing from a refusal: whatever Google refuses, they are asked again later."""

    @wraps(hook)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return hook(*args, **kwargs)
        except (InvalidRequestError, NoCapacityError, QuotaExceededError) as error:
            raise UnknownOutcomeError(str(error)) from error

    return wrapped


class GcpBackend:
    """One project. Safe to use from several threads."""

    def __init__(self, config: GcpConfig) -> None:
        self._config = config
        self._account = Account(config)
        self._catalogue = Catalogue(self._account, config, cache_folder())
        self._networks = Networks(self._account, config)
        self._images = Images(self._account, config)

    def close(self) -> None:
        """Closes the connections."""
        self._account.close()

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """From memory or a file where possible; what is old is read anew in the background."""
        return self._catalogue.offers(requirements)

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """One insert for each intent, unless an earlier one is known to have failed; then a short look at it."""
        zone = _zone_of(request)
        earlier = inserts(operations(self._account, zone, request.name))
        if not earlier or failure_of(earlier[-1], zone) is not None:
            begun = self._insert(request, zone, earlier[-1] if earlier else None)
        else:
            begun = earlier[-1]
        return self._outcome(request, zone, begun)

    @hookimpl
    @_only_looks
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """One call, while the instance is well; what was done to it is looked up when it is not."""
        if not is_name(ref.id) or not is_name(ref.zone) or ref.zone is None:
            return None
        described = self._described(ref.zone, ref.id)
        if described is None:
            return self._absent(ref, ref.zone)
        found = _ours(described)
        if found.state is not InstanceState.STOPPING:
            return found
        return instance(described, reason_of(operations(self._account, ref.zone, ref.id)))

    @hookimpl
    @_only_looks
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All pages of all zones, those included that are configured no longer."""
        return list(self._labelled("owner", str(owner)))

    @hookimpl
    @_only_looks
    def dstack_list_all_instances(self) -> list[Instance]:
        """The same for every owner."""
        return list(self._labelled("managed-by", "dstack"))

    @hookimpl
    @_only_looks
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the deletion of the instance; its disk goes with it."""
        if not is_name(ref.id) or not is_name(ref.zone):
            return
        try:
            self._account.plain_call("instances", "delete_unary", zone=ref.zone, instance=ref.id)
        except NotFound:
            return
        except SDK_ERRORS as error:
            # Its deletion is under way.
            if isinstance(error, BadRequest) and "resourceNotReady" in reasons_of(error):
                return
            raise translated(error, action_of("instances", "delete_unary"), str(ref.zone)) from error

    @hookimpl
    @_only_looks
    def dstack_get_console(self, ref: InstanceRef) -> str | None:
        """The newest megabyte of the first serial port."""
        if not is_name(ref.id) or not is_name(ref.zone):
            return None
        try:
            answer = self._account.plain_call("instances", "get_serial_port_output", zone=ref.zone, instance=ref.id)
        except NotFound:
            return None
        except SDK_ERRORS as error:
            raise translated(error, action_of("instances", "get_serial_port_output"), str(ref.zone)) from error
        return answer.contents or None

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Whether everything that a run needs may be done, and is there."""
        return Checks(self._account, self._config, self._networks, self._images).problems()

    # -- creating ----------------------------------------------------------------------------------------------------

    def _insert(self, request: InstanceRequest, zone: str, failed: Any | None) -> Any | None:
        """Begins a creation: the operation, or `None` where there is an instance of this name already.

        A `requestId` is good for one try: Compute Engine goes on answering with what became of that. So the next try
        has one that follows from the failed one, and whoever else tries again comes to the same. An answer that has
        failed already is that of an earlier try, which the list of operations did not show yet.
        """
        self._networks.make_ready()
        image = self._images.of(request.offer.resources)
        interface = self._networks.interface(request.offer.region)
        body = launch(self._config, request, image, interface, datetime.now(UTC))
        begun = None
        for _ in range(_TRIES):
            this_try = request.request_id if failed is None else uuid5(request.request_id, failed.name)
            begun = self._try(zone, body, this_try)
            if begun is None or failure_of(begun, zone) is None:
                break
            failed = begun
        return begun

    def _try(self, zone: str, body: dict[str, Any], request_id: UUID) -> Any | None:
        """One insert."""
        try:
            return self._account.plain_call(
                "instances", "insert_unary", zone=zone, instance_resource=body, request_id=str(request_id)
            )
        except Conflict:
            return None
        except SDK_ERRORS as error:
            failure = translated(error, action_of("instances", "insert_unary"), zone)
            if isinstance(failure, InvalidRequestError):
                # Perhaps a rule was removed that we remember.
                self._networks.forget()
            raise failure from error

    def _outcome(self, request: InstanceRequest, zone: str, begun: Any | None) -> Instance:
        """What a creation has come to. Does not wait for it: what is under way is pending.

        Raises:
            BackendError: it failed already, so that there is nothing; or something else was asked for.
        """
        seen = None
        for pause in _PAUSES:
            time.sleep(pause)
            seen = self._seen(request, zone)
            if seen is not None and seen.status != "PROVISIONING":
                break
            begun = begun and self._observed(begun, zone)
            if begun is not None and is_over(begun):
                seen = self._seen(request, zone)
                break
        if seen is not None:
            return _ours(seen)
        if begun is None:
            raise UnknownOutcomeError(f"There is an instance {request.name} in {zone}, and it cannot be seen yet")
        return _begun(request, zone, begun, InstanceState.TERMINATED if is_over(begun) else InstanceState.PENDING)

    def _observed(self, begun: Any, zone: str) -> Any:
        """A creation as it is now.

        Raises:
            BackendError: it failed.
        """
        now = self._account.call("zone_operations", "get", zone, zone=zone, operation=begun.name)
        failure = failure_of(now, zone)
        if failure is not None:
            raise failure
        return now

    def _seen(self, request: InstanceRequest, zone: str) -> Any | None:
        """The instance of this request, if it is there.

        Raises:
            InvalidRequestError: it was asked for otherwise.
        """
        described = self._described(zone, request.name)
        if described is not None and not is_of(described, request):
            raise InvalidRequestError(
                f"The intent {request.intent} is {request.name} in {zone} already, which was asked for otherwise. "
                "Another request needs another intent."
            )
        return described

    # -- looking -----------------------------------------------------------------------------------------------------

    def _described(self, zone: str, name: str) -> Any | None:
        try:
            return self._account.plain_call("instances", "get", zone=zone, instance=name)
        except NotFound:
            return None
        except SDK_ERRORS as error:
            raise translated(error, action_of("instances", "get"), zone) from error

    def _absent(self, ref: InstanceRef, zone: str) -> Instance | None:
        """An instance that is not there: not yet, or no more, which its operations tell."""
        known = whose(ref)
        done = operations(self._account, zone, ref.id) if known else []
        created = inserts(done)
        if known is None or not created:
            return None
        last, reason = created[-1], reason_of(done)
        if not is_over(last):
            state = InstanceState.PENDING
        else:
            state = InstanceState.TERMINATED
            reason = reason or _reason_in(failure_of(last, zone))
        return Instance(
            ref=ref_of(*known, ref.id, zone),
            intent=known[1],
            owner=known[0],
            state=state,
            reason=reason if state is InstanceState.TERMINATED else None,
            created_at=datetime.fromisoformat(last.insert_time),
        )

    def _labelled(self, key: str, value: str) -> Iterator[Instance]:
        wanted = f'labels.{key}="{value}"'
        for page in self._account.pages("instances", "aggregated_list", filter=wanted, max_results=500):
            if page.unreachables:
                raise UnknownOutcomeError(f"Google could not list all: {', '.join(page.unreachables)} did not answer")
            for scope, scoped in page.items.items():
                if scoped.warning.code not in _HARMLESS:
                    raise UnknownOutcomeError(f"Google could not list {scope}: {scoped.warning.message}")
                yield from (one for described in scoped.instances if (one := instance(described)) is not None)


def _zone_of(request: InstanceRequest) -> str:
    if not is_name(request.offer.zone):
        raise InvalidRequestError(f"{request.offer.zone!r} is no zone of Compute Engine. Take an offer with a zone.")
    return str(request.offer.zone)


def _ours(described: Any) -> Instance:
    """An instance that must have our labels: without them it is billed all the same, so it is not gone."""
    found = instance(described)
    if found is None:
        raise UnknownOutcomeError(
            f"Google describes {described.name} without our labels 'owner' and 'intent' "
            f"({dict(described.labels) or 'none'}). Put them back, or end it by hand."
        )
    return found


def _reason_in(failure: BackendError | None) -> StateReason | None:
    """What the failure of a creation says of the instance that there never was."""
    if isinstance(failure, NoCapacityError):
        return StateReason.NO_CAPACITY
    return StateReason.FAILURE if failure is not None else None


def _begun(request: InstanceRequest, zone: str, begun: Any, state: InstanceState) -> Instance:
    """The instance of a creation that is under way, or whose instance has ended since."""
    return Instance(
        ref=ref_of(request.owner, request.intent, request.name, zone),
        intent=request.intent,
        owner=request.owner,
        state=state,
        reason=StateReason.REQUESTED if state is InstanceState.TERMINATED else None,
        created_at=datetime.fromisoformat(begun.insert_time),
    )
