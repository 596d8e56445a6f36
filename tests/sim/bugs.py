"""Deliberate bugs, put into the real engine one at a time: the simulation has to find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

from dstack_core._engine import instances, jobs, leases, orphans, reconciler, sweeping
from dstack_core._engine.instances import InstanceHandler
from dstack_core._engine.jobs import JobHandler
from dstack_core._engine.orphans import Verdict
from dstack_core._engine.transitions import InstanceEvent
from dstack_core._models.instances import InstanceState
from dstack_core._store import records
from dstack_core._store.store import Store
from dstack_core.errors import BackendError


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    saved = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, saved)


def _ask_before_the_intent() -> AbstractContextManager[None]:
    """The cloud is asked before the intent is written down."""
    real = JobHandler._place

    async def place(self: JobHandler, it: Any) -> Any:
        seen, intent = await real(self, it)
        if intent is not None:
            with suppress(BackendError):
                await self._backends.create_instance(intent.request.offer.backend, intent.request)
        return seen, intent

    return _replaced(JobHandler, "_place", place)


def _no_confirmation() -> AbstractContextManager[None]:
    """A termination counts as done as soon as it was asked for."""

    async def terminate(self: InstanceHandler, it: Any, ref: Any) -> Any:
        try:
            await self._backends.terminate_instance(ref)
        except BackendError as error:
            return self._saw(InstanceEvent.STILL_THERE, message=str(error))
        return self._saw(InstanceEvent.GONE)

    return _replaced(InstanceHandler, "_terminate", terminate)


def _no_token() -> AbstractContextManager[None]:
    """Whoever once had a lease may write, whoever has it now."""

    def held(session: Any, lease: Any, table: Any) -> Any:
        return records.get(session, table, lease.id)

    @contextmanager
    def everywhere() -> Iterator[None]:
        with ExitStack() as all_of_them:
            for module in (instances, jobs, leases, reconciler):
                all_of_them.enter_context(_replaced(module, "held", held))
            yield

    return everywhere()


def _unknown_is_refused() -> AbstractContextManager[None]:
    """A create call of unknown outcome counts as one that certainly did nothing."""
    real = InstanceHandler._ask

    async def ask(self: InstanceHandler, lease: Any, it: Any) -> Any:
        seen = await real(self, lease, it)
        if seen.event is InstanceEvent.UNCLEAR:
            return self._saw(InstanceEvent.REFUSED, message=seen.message)
        return seen

    return _replaced(InstanceHandler, "_ask", ask)


def _one_look_is_enough() -> AbstractContextManager[None]:
    """An instance that is not listed at once counts as absent."""

    async def find(self: InstanceHandler, lease: Any, it: Any) -> Any:
        try:
            listed = await self._backends.list_instances(it.request.offer.backend, it.request.owner)
        except BackendError as error:
            return self._saw(InstanceEvent.UNCLEAR, message=str(error))
        found = [one for one in listed if one.intent == it.id]
        if found:
            return self._accepted(it, found[0])
        return self._saw(InstanceEvent.ABSENT if it.view.wanted else InstanceEvent.WITHDRAWN)

    return _replaced(InstanceHandler, "_find", find)


def _by_provider_id() -> AbstractContextManager[None]:
    """The sweeper looks for an instance's id in the rows, and not for its intent: whatever is in none is swept.

    All of its other guards are in force: age, two rounds, and the look of the owner's tag.
    """

    def judge(instance: Any, grounds: Any) -> Verdict:
        if instance.owner != grounds.owner:
            return Verdict.FOREIGN
        if instance.state is InstanceState.TERMINATED:
            return Verdict.GONE
        claim = next((one for one in grounds.claims.values() if one.instance_id == instance.ref.id), None)
        if claim is not None and not claim.status.is_final:
            return Verdict.OURS
        young = grounds.now - instance.created_at <= grounds.least_age
        return Verdict.YOUNG if young else Verdict.UNKNOWN

    return _replaced(sweeping, "judge", judge)


def _young_ones_too() -> AbstractContextManager[None]:
    """The sweeper waits for nothing: neither for an age nor for a second look."""

    @contextmanager
    def both() -> Iterator[None]:
        with ExitStack() as all_of_them:
            hasty = {"_claimed": _claimed_in_haste, "YOUNGEST": timedelta(0), "WINDOWS": 0, "ROUNDS": 1}
            for name, value in hasty.items():
                all_of_them.enter_context(_replaced(orphans, name, value))
            yield

    return both()


def _claimed_in_haste(instance: Any, claim: Any) -> Verdict:
    return Verdict.OURS if claim.instance_id == instance.ref.id and not claim.status.is_final else Verdict.UNKNOWN


def _lost_after_commit_is_lost_before() -> AbstractContextManager[None]:
    """A transaction whose COMMIT was not answered is taken for one that did not happen."""
    real = Store._failed

    def failed(self: Store, error: Any, *, committing: bool = False) -> Any:
        return real(self, error)

    return _replaced(Store, "_failed", failed)


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "the cloud is asked before the intent is written": _ask_before_the_intent,
    "terminations are not confirmed": _no_confirmation,
    "results are written without the fencing token": _no_token,
    "an unknown outcome counts as a refusal": _unknown_is_refused,
    "the sweeper goes by the cloud's id alone": _by_provider_id,
    "the sweeper is in a hurry": _young_ones_too,
    "a COMMIT without an answer counts as none": _lost_after_commit_is_lost_before,
    "one look is enough to call an instance absent": _one_look_is_enough,
}


def with_bug(name: str) -> AbstractContextManager[None]:
    """The engine with a bug in it."""
    return BUGS[name]()
