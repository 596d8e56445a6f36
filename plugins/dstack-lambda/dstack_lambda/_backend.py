"""The hooks, over Lambda's API."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import ParamSpec, TypeVar
from uuid import UUID

from dstack_core.plugin import (
    Instance,
    InstanceRef,
    InstanceRequest,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
    hookimpl,
)
from dstack_lambda._api import Api
from dstack_lambda._checks import problems
from dstack_lambda._config import LambdaConfig
from dstack_lambda._instances import accepted, instance, is_gone, is_of, order
from dstack_lambda._keys import Keys
from dstack_lambda._offers import offers_of
from dstack_lambda._sharing import Gathered, Outcome, Shared

T = TypeVar("T")
P = ParamSpec("P")

_PREPARING = 20.0
"""Seconds that may pass before a launch is sent; one that is sent later might be answered to nobody."""


def _only_looks(hook: Callable[P, T]) -> Callable[P, T]:
    """For hooks that conclude nothing from a refusal: whatever Lambda refuses, they are asked again later."""

    @wraps(hook)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return hook(*args, **kwargs)
        except (InvalidRequestError, NoCapacityError, QuotaExceededError) as error:
            raise UnknownOutcomeError(str(error)) from error

    return wrapped


class LambdaBackend:
    """One account. Safe to use from several threads.

    Args:
        config: which account, and how.
        clock: now, as an aware datetime.
        seconds: for durations, from any beginning.
    """

    def __init__(
        self,
        config: LambdaConfig,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._seconds = seconds
        self._api = Api(config)
        self._keys = Keys(self._api, config.ssh_key)
        self._listing = Shared(self._api.instances, config.request_interval)
        self._endings = Gathered(self._end)

    def close(self) -> None:
        """Closes the connections."""
        self._api.close()

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    @_only_looks
    def dstack_list_offers(self) -> list[Offer]:
        """All of it: Lambda sells some dozen types, and says in one answer what they cost and where they are."""
        return list(offers_of(self._api.instance_types(), self._config.regions))

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Looks for the instance of this intent, and launches one if there is none."""
        began = self._seconds()
        found = self._of_intent(request)
        if found is not None:
            return found
        ssh_key = self._keys.name_of(request.ssh_public_keys)
        if self._seconds() - began > _PREPARING:
            raise RateLimitedError("Lambda is too slow to launch anything in time")
        now = self._clock()
        try:
            made = self._api.launch(order(self._config, request, ssh_key, now))
        except InvalidRequestError:
            # Perhaps the key was removed.
            self._keys.forget()
            raise
        self._listing.forget()
        return accepted(request, made, now)

    @hookimpl
    @_only_looks
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Out of a listing that all share who ask now; what it does not show is asked for by itself."""
        described = next((one for one in self._listing.lately() if one.get("id") == ref.id), None)
        if described is None:
            described = self._api.instance(ref.id)
        if described is None:
            return None
        found = instance(described)
        if found is None and not is_gone(described):
            # It is there and costs money, whatever became of its tags: nobody may take it for gone.
            raise UnknownOutcomeError(
                f"The instance {ref.id} has lost its tags 'owner' and 'intent'. End it at https://cloud.lambda.ai."
            )
        return found

    @hookimpl
    @_only_looks
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """One answer has all regions of the account."""
        return [one for one in self._listed() if one.owner == owner]

    @hookimpl
    @_only_looks
    def dstack_list_all_instances(self) -> list[Instance]:
        """The same for every owner."""
        return self._listed()

    @hookimpl
    @_only_looks
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the end of the instance, together with others that are to end now. Its disk goes with it."""
        self._endings.wish(ref.id)

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """The key, the regions, the image and the SSH key."""
        return list(problems(self._api, self._config))

    # ----------------------------------------------------------------------------------------------------------------

    def _listed(self) -> list[Instance]:
        return [one for one in map(instance, self._listing.now()) if one is not None]

    def _of_intent(self, request: InstanceRequest) -> Instance | None:
        """The instance that this intent has already become.

        Raises:
            InvalidRequestError: something else was asked for.
        """
        for described in self._listing.now():
            found = instance(described)
            if found is None or (found.owner, found.intent) != (request.owner, request.intent):
                continue
            if not is_of(described, request):
                raise InvalidRequestError(
                    f"The intent {request.intent} is {found.ref.id} already, which was asked for otherwise. "
                    "Another request needs another intent."
                )
            return found
        return None

    def _end(self, ids: Sequence[str]) -> list[Outcome[None]]:
        """All at once; if one of them is unknown, which Lambda refuses as a whole, one by one."""
        known = self._api.terminate(ids)
        self._listing.forget()
        if known or len(ids) == 1:
            return [Outcome()] * len(ids)
        return [self._end_one(one) for one in ids]

    def _end_one(self, id: str) -> Outcome[None]:
        def end() -> None:
            self._api.terminate([id])

        return Outcome.of(end)
