"""How an instance is moved on: the calls to its cloud, between the intent and the confirmed end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine import journal
from dstack_core._engine.booting import Booter, last_words, way_to
from dstack_core._engine.intents import ORPHAN_GRACE, NewIntent
from dstack_core._engine.leases import Lease, held, lengthen, release, renew, take_job, wake
from dstack_core._engine.orphans import ROUNDS
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.seams import Seams
from dstack_core._engine.shortages import Shortage, Shortages
from dstack_core._engine.transitions import (
    InstanceEvent,
    InstanceObservation,
    InstanceStatus,
    InstanceView,
    step_instance,
)
from dstack_core._models.instances import Endpoint, Instance, InstanceRef, InstanceRequest, InstanceState, StateReason
from dstack_core._models.offers import Offer
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow, JobRow
from dstack_core._transport import AgentConnection, AgentRefused, AgentUnreachable, Transport
from dstack_core._transport.on_machine import MachineBroken
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
)

log = logging.getLogger(__name__)

REFUSALS = (NoCapacityError, QuotaExceededError, AuthenticationError, InvalidRequestError)
"""What a backend raises when the instance was definitely not created."""

MIN_MISSES = 2
"""How often an intent must be looked for in vain before it counts as absent."""

ALARM_AFTER = timedelta(minutes=15)
"""How long a termination may stay unconfirmed before the log raises an alarm. It is tried again for ever."""

CHECK_RUNNING_EVERY = 60.0
_STILL_THERE = (InstanceEvent.SILENT, InstanceEvent.REACHED)
MISSED = "the cloud does not list it any more, and its agent does not answer"
_PROMPTLY = timedelta(seconds=5)
"""How long after it was written down a call to a cloud is still made."""
_REACH_PATIENCE = 3.0
_REACH_PAUSE = 0.004
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_WHILE_STARTING = 0.05, 60.0, 5.0


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One instance at the beginning of a step.

    `noted`: the call that it is about to make is written down already. `unlisted`: in so many rounds of the sweeper
    the listing did not have it.
    """

    id: UUID
    view: InstanceView
    request: InstanceRequest
    create_calls: int
    last_create_at: datetime | None
    created_at: datetime
    noted: bool
    unlisted: int = 0


@dataclass(slots=True)
class _Written:
    """What follows from a written step.

    Attributes:
        after: the instance to go on with at once, if any.
        due: until when it was given back.
        wake: the job that has news, if somebody is at it already.
        adopt: the job that has news, taken together with them, and what its next step needs.
        shortage: what the cloud has run out of.
    """

    after: _Snapshot | None = None
    due: datetime | None = None
    wake: list[UUID] = field(default_factory=list)
    adopt: list[tuple[Lease, object]] = field(default_factory=list)
    shortage: Shortage | None = None


def as_written(intent: NewIntent, now: datetime) -> _Snapshot:
    """An intent whose row was just written, leased and with its first call noted, as the first step needs it."""
    return _Snapshot(
        id=intent.id,
        view=InstanceView(InstanceStatus.INTENT),
        request=intent.request,
        create_calls=0,
        last_create_at=None,
        created_at=now,
        noted=True,
    )


class InstanceHandler:
    """Moves instances on: create, find, reach, terminate, confirm.

    Args:
        look_at_job: what the next step of a job needs, read from its row.
        booter: brings machines that boot to a running agent.
    """

    def __init__(
        self,
        seams: Seams,
        store: Store,
        backends: BackendHub,
        transport: Transport,
        wakeups: journal.Wakeups,
        shortages: Shortages,
        look_at_job: Callable[[Session, JobRow], object],
        booter: Booter,
        orphan_grace: float = ORPHAN_GRACE,
    ) -> None:
        self._clock = seams.clock
        self._rng = seams.rng
        self._store = store
        self._backends = backends
        self._transport = transport
        self._wakeups = wakeups
        self._shortages = shortages
        self._look_at_job = look_at_job
        self._booter = booter
        self._orphan_grace = orphan_grace
        self._next: dict[UUID, tuple[Lease, _Snapshot]] = {}

    async def advance(self, lease: Lease, woken: asyncio.Event) -> bool:
        """Makes one step of one instance. See `Handler`."""
        it = await self._now(lease, woken)
        if it is None:
            return False
        seen = await self._observe(lease, it, woken)
        woken.clear()
        written = await self._store.transact(lambda session: self._write(session, lease, it, seen), quick=True)
        if written.shortage is not None:
            self._shortages.learn(written.shortage)
        if it.view.status is InstanceStatus.STARTING and seen.event is InstanceEvent.REACHED:
            # Not when it is accepted: that it cannot be had may show later.
            await self._shortages.forget(it.request.offer, it.view.accepted_at or it.created_at)
        for job in written.wake:
            self._wakeups.wake("job", job)
        for other, known in written.adopt:
            self._wakeups.adopt(other, known)
        if written.after is None:
            self._wakeups.due(written.due)
            return False
        self._next[it.id] = (lease, written.after)
        return True

    async def _now(self, lease: Lease, woken: asyncio.Event) -> _Snapshot | None:
        """The instance as the last step left it, or as it is in the store."""
        known, it = self._next.pop(lease.id, (None, None))
        if known == lease:
            return it
        woken.clear()
        return await self._store.transact(lambda session: self._load(session, lease), quick=True)

    async def forget(self, row_id: UUID) -> None:
        """Nothing but what the last step left is held."""
        self._next.pop(row_id, None)
        self._booter.forget(row_id)

    def expect(self, lease: Lease, known: _Snapshot) -> None:
        """The next step is that of an intent which was just written."""
        self._next[lease.id] = (lease, known)

    # -- reading and writing -------------------------------------------------------------------------------------

    def _load(self, session: Session, lease: Lease) -> _Snapshot | None:
        row = renew(session, lease, InstanceRow, self._clock.now(), LEASE)
        if InstanceStatus(row.status).is_final:
            release(row, None)
            return None
        return self._snapshot(session, row)

    def _snapshot(self, session: Session, row: InstanceRow) -> _Snapshot:
        """The instance as the next step needs it; what that step knows without asking anybody is written already."""
        view, request = view_of(row), InstanceRequest.model_validate_json(row.request)
        if not view.wanted and view.status in (InstanceStatus.STARTING, InstanceStatus.RUNNING):
            self._step(session, row, request.offer, self._saw(InstanceEvent.UNWANTED))
            view = view_of(row)
        calls = row.create_calls
        # Any call but the first one is noted by the step that is certain of making it.
        noted = view.status is InstanceStatus.INTENT and view.wanted and not calls
        if noted:
            note_call(row, self._clock.now())
        return _Snapshot(
            id=row.id,
            view=view,
            request=request,
            create_calls=calls,
            last_create_at=row.last_create_at,
            created_at=row.created_at,
            noted=noted,
            unlisted=row.unlisted,
        )

    def _write(self, session: Session, lease: Lease, it: _Snapshot, seen: InstanceObservation) -> _Written:
        """Writes a step, wakes the job if it has something to look at, and gives the row back if there is time to."""
        row = held(session, lease, InstanceRow)
        # `wanted` may have changed while the cloud was asked.
        written = _Written()
        after = self._step(session, row, it.request.offer, seen, written)
        if seen.error is not None:
            written.shortage = self._shortage(session, it.request.offer, seen)
        pause = self._pause(row, after, seen)
        if pause == 0:
            lengthen(row, seen.at + LEASE)
            written.after = self._snapshot(session, row)
            return written
        release(row, None if pause is None else seen.at + timedelta(seconds=pause))
        written.due = row.due_at
        return written

    def _shortage(self, session: Session, offer: Offer, seen: InstanceObservation) -> Shortage | None:
        """Remembers what a cloud has run out of. A machine that exists says for itself what it has left."""
        if self._backends.info(offer.backend).existing_machines:
            return None
        return self._shortages.note(session, offer, seen)

    def _step(
        self,
        session: Session,
        row: InstanceRow,
        offer: Offer,
        seen: InstanceObservation,
        written: _Written | None = None,
    ) -> InstanceView:
        """Applies an observation to a row, and tells the job: how the instance is now."""
        view = view_of(row)
        after, actions = step_instance(view, seen)
        apply_view(row, after)
        if after.status is InstanceStatus.INTENT and view.status is InstanceStatus.UNKNOWN:
            row.create_calls = 0
        if after.status is not view.status:
            journal.instance_moved(session, row, offer, view.status, seen)
        # A job has nothing to look at while its instance starts.
        if actions and row.job_id is not None and after.status is not InstanceStatus.STARTING:
            self._tell(session, row.job_id, seen.at, written)
        return after

    def _tell(self, session: Session, job_id: UUID, now: datetime, written: _Written | None) -> None:
        """Goes on with the job at once, or wakes who is at it."""
        if written is None:
            wake(session, "job", job_id, now)
            return
        job = take_job(session, job_id, self._wakeups.server, now + LEASE)
        if job is not None:
            lease = Lease("job", job_id, job.lease_token)
            written.adopt.append((lease, self._look_at_job(session, job)))
        elif wake(session, "job", job_id, now):
            written.wake.append(job_id)

    def _pause(self, row: InstanceRow, view: InstanceView, seen: InstanceObservation) -> float | None:
        """Seconds until the next step; 0 for at once, `None` for never."""
        if view.status.is_final:
            return None
        unwanted = not view.wanted and view.status in (InstanceStatus.STARTING, InstanceStatus.RUNNING)
        if unwanted:
            return 0
        if view.failures == 0:
            return CHECK_RUNNING_EVERY if view.status is InstanceStatus.RUNNING else 0
        pause = self._growing_pause(view)
        if view.status is InstanceStatus.UNKNOWN:
            pause = max(pause, self._backends.info(row.backend).visibility_window / 8)
        return max(pause, seen.retry_after or 0.0)

    def _growing_pause(self, view: InstanceView) -> float:
        """Twice as long with each failure in a row, spread by a quarter so that a crowd does not come back together."""
        longest = _LONGEST_WHILE_STARTING if view.status is InstanceStatus.STARTING else _LONGEST_PAUSE
        pause = min(longest, _FIRST_PAUSE * 2 ** min(view.failures - 1, 20))
        return float(pause * (0.75 + 0.5 * self._rng.random()))

    # -- observing -----------------------------------------------------------------------------------------------

    async def _observe(self, lease: Lease, it: _Snapshot, woken: asyncio.Event) -> InstanceObservation:
        """Looks at (or acts on) the cloud as the status asks for."""
        if it.view.status is InstanceStatus.INTENT:
            return await self._create(lease, it)
        if it.view.status is InstanceStatus.UNKNOWN:
            return await self._find(lease, it)
        if it.view.ref is None:
            raise RuntimeError(f"Instance {it.id} is {it.view.status.value} without a reference")
        if it.view.status is InstanceStatus.STARTING:
            return await self._start_up(lease, it, it.view.ref, woken)
        look = {
            InstanceStatus.RUNNING: self._check,
            InstanceStatus.TERMINATING: self._terminate,
        }[it.view.status]
        return await look(it, it.view.ref)

    def _saw(self, event: InstanceEvent, **facts: object) -> InstanceObservation:
        return InstanceObservation(event, self._clock.now(), **facts)  # type: ignore[arg-type]  # fields by name

    async def _create(self, lease: Lease, it: _Snapshot) -> InstanceObservation:
        """Asks the cloud for the instance, having written down that it is about to."""
        if it.create_calls:
            # An earlier call was cut short by a crash: what came of it is not known.
            return self._saw(InstanceEvent.UNCLEAR, message="the server stopped while the cloud was being asked")
        if not it.view.wanted:
            return self._saw(InstanceEvent.WITHDRAWN)
        return await self._ask(lease, it)

    async def _ask(self, lease: Lease, it: _Snapshot) -> InstanceObservation:
        noted_at = (it.last_create_at or it.created_at) if it.noted else None
        while noted_at is None or self._clock.now() - noted_at > _PROMPTLY:
            # After standing still, too: others may have waited for that call, and found that it came to nothing.
            noted_at = await self._store.transact(lambda session: self._note_call(session, lease), quick=True)
        try:
            instance = await self._backends.create_instance(it.request.offer.backend, it.request)
        except RateLimitedError as error:
            await self._store.transact(lambda session: self._note_no_call(session, lease), quick=True)
            return self._saw(InstanceEvent.POSTPONED, message=str(error), retry_after=error.retry_after)
        except REFUSALS as error:
            return self._refused(it, error)
        except BackendError as error:
            return self._saw(InstanceEvent.UNCLEAR, message=str(error))
        return self._accepted(it, instance)

    def _refused(self, it: _Snapshot, error: BackendError) -> InstanceObservation:
        """A refusal settles the matter only if no earlier call may have gone through."""
        if it.create_calls:
            return self._saw(InstanceEvent.UNCLEAR, message=str(error))
        return self._saw(
            InstanceEvent.REFUSED,
            error=type(error).__name__,
            error_scope=getattr(error, "scope", None),
            message=str(error),
            retry_after=getattr(error, "retry_after", None),
        )

    def _note_call(self, session: Session, lease: Lease) -> datetime:
        now = self._clock.now()
        note_call(renew(session, lease, InstanceRow, now, LEASE), now)
        return now

    def _note_no_call(self, session: Session, lease: Lease) -> None:
        """Takes the note back: the cloud said for certain that this call did nothing."""
        row = held(session, lease, InstanceRow)
        row.create_calls -= 1

    def _accepted(self, it: _Snapshot, instance: Instance) -> InstanceObservation:
        if instance.state is InstanceState.TERMINATED:
            return self._ended(InstanceEvent.GONE, it, instance, ref=instance.ref, endpoint=instance.endpoint)
        return self._saw(InstanceEvent.ACCEPTED, ref=instance.ref, endpoint=instance.endpoint)

    def _ended(self, event: InstanceEvent, it: _Snapshot, instance: Instance, **facts: object) -> InstanceObservation:
        """It is gone or leaves. One that could not be made for want of capacity counts as refused, once."""
        if _came_short(it.view, instance):
            facts |= {"error": NoCapacityError.__name__, "error_scope": "zone"}
        return self._saw(event, message=_why_gone(instance), **facts)

    async def _find(self, lease: Lease, it: _Snapshot) -> InstanceObservation:
        """Finds out what became of a call of unknown outcome: adopt it, or be certain that there is nothing."""
        backend = it.request.offer.backend
        info = self._backends.info(backend)
        if info.native_idempotency and it.view.wanted and it.view.failures <= 1:
            # The cloud itself guarantees that the same token is the same instance.
            return await self._ask(lease, it)
        try:
            listed = await self._backends.list_instances(backend, it.request.owner)
        except BackendError as error:
            return self._saw(InstanceEvent.UNCLEAR, message=str(error))
        found = sorted((one for one in listed if one.intent == it.id), key=lambda one: one.created_at)
        if found:
            await self._terminate_doubles(found[1:])
            return self._accepted(it, found[0])
        waited = (self._clock.now() - (it.last_create_at or it.created_at)).total_seconds()
        if it.view.misses + 1 < MIN_MISSES or waited < info.visibility_window + info.hook_timeout:
            return self._saw(InstanceEvent.NOT_SEEN, message="the cloud does not list it (yet)")
        return self._saw(InstanceEvent.ABSENT if it.view.wanted else InstanceEvent.WITHDRAWN)

    async def _terminate_doubles(self, doubles: list[Instance]) -> None:
        """One intent, one instance: the oldest stays. That there are more is a bug of the backend, said aloud."""
        for double in doubles:
            log.error("Intent %s became more than one instance; terminating %s", double.intent, double.ref.id)
            await self._backends.terminate_instance(double.ref)

    async def _start_up(
        self, lease: Lease, it: _Snapshot, ref: InstanceRef, woken: asyncio.Event
    ) -> InstanceObservation:
        """Waits a little for an accepted instance; of a machine that comes to nothing the last words are kept."""
        if not self._backends.info(it.request.offer.backend).boots_machines:
            return await self._reach(it, ref, it.view.endpoint)
        try:
            seen = await self._reach(it, ref, await self._boot(lease, it, woken))
        except MachineBroken as broken:
            seen = self._saw(InstanceEvent.BROKEN, message=str(broken))
        if seen.event is InstanceEvent.SILENT:
            return seen
        self._booter.forget(it.id)
        if seen.event is not InstanceEvent.REACHED:
            await self._note_console(lease, ref)
        return seen

    async def _reach(self, it: _Snapshot, ref: InstanceRef, way: Endpoint | None) -> InstanceObservation:
        """Waits a little for the agent of an accepted instance to answer."""
        if way is not None and await self._answers(it, way):
            return self._saw(InstanceEvent.REACHED)
        return await self._ask_about_starting(it, ref)

    async def _boot(self, lease: Lease, it: _Snapshot, woken: asyncio.Event) -> Endpoint | None:
        """Brings a machine to a running agent: the way to it, or `None` after some patience."""
        if it.view.endpoint is None:
            return None

        async def keep(key: str) -> None:
            await self._store.transact(lambda session: self._note_host_key(session, lease, key), quick=True)

        return await self._booter.bring_up(it.id, it.request.user_data, it.view.endpoint, it.view.host_key, keep, woken)

    def _note_host_key(self, session: Session, lease: Lease, key: str) -> None:
        held(session, lease, InstanceRow).host_key = key

    async def _note_console(self, lease: Lease, ref: InstanceRef) -> None:
        """Adds what the machine's console said last to the account of its run."""
        try:
            said = await self._backends.get_console(ref)
        except BackendError as error:
            said = f"(the console cannot be read: {error})"
        if said:
            lines = last_words(said)
            await self._store.transact(lambda session: self._note_lines(session, lease, lines))

    def _note_lines(self, session: Session, lease: Lease, lines: list[str]) -> None:
        row = held(session, lease, InstanceRow)
        if row.run_id is not None:
            for line in lines:
                journal.note(session, row.run_id, row.job_id, self._clock.now(), f"console of {row.name}: {line}")

    async def _answers(self, it: _Snapshot, endpoint: Endpoint) -> bool:
        """True as soon as the agent answers, False after some patience."""
        connection = self._transport.connect(endpoint)
        begin = self._clock.now()
        while not await self._is_agent(it, connection):
            waited = (self._clock.now() - begin).total_seconds()
            if waited >= _REACH_PATIENCE:
                return False
            await self._clock.sleep(max(_REACH_PAUSE, waited / 12))
        return True

    async def _is_agent(self, it: _Snapshot, connection: AgentConnection) -> bool:
        """Whether this instance's agent answers now, and not one that has got its address since."""
        try:
            return (await connection.health()).instance in (None, str(it.id))
        except AgentUnreachable:
            return False
        finally:
            await connection.aclose()

    async def _ask_about_starting(self, it: _Snapshot, ref: InstanceRef) -> InstanceObservation:
        """The agent is silent: is the instance still coming, gone, or too late?"""
        info = self._backends.info(it.request.offer.backend)
        since = (self._clock.now() - (it.view.accepted_at or it.created_at)).total_seconds()
        seen = await self._describe(it, ref, self._is_fresh(it))
        if seen.event is InstanceEvent.SILENT and since > info.provisioning_timeout:
            return self._saw(
                InstanceEvent.TIMED_OUT,
                message=f"the agent did not answer within {info.provisioning_timeout:g} s of the instance's start"
                + self._booter.why(it.id),
            )
        return seen

    def _is_fresh(self, it: _Snapshot) -> bool:
        """So young that the cloud may not know it yet."""
        since = (self._clock.now() - (it.view.accepted_at or it.created_at)).total_seconds()
        return since < self._backends.info(it.request.offer.backend).visibility_window

    async def _check(self, it: _Snapshot, ref: InstanceRef) -> InstanceObservation:
        """Looks whether a running instance is still there. One whose agent answers is, whatever the cloud forgets.

        One that is so young that the cloud may not know it yet is, too: its agent may have lost its network.
        """
        expires_at = it.request.expires_at
        if expires_at is not None and self._clock.now() > expires_at:
            return self._saw(InstanceEvent.LEAVING, message=f"it was to be gone at {expires_at:%Y-%m-%d %H:%M} UTC")
        is_heard = await self._is_heard(it)
        try:
            instance = await self._backends.get_instance(ref)
            endpoint = await self._endpoint(instance)
        except BackendError as error:
            seen = self._saw(InstanceEvent.SILENT, message=str(error))
        else:
            seen = self._described(it, instance, endpoint, fresh=is_heard or self._is_fresh(it))
        if it.unlisted >= ROUNDS and seen.event in _STILL_THERE and not is_heard and await self._is_silent(it):
            # Its end is asked for all the same: what is not listed may cost money.
            return self._saw(InstanceEvent.LEAVING, message=MISSED)
        return seen

    async def _is_heard(self, it: _Snapshot) -> bool:
        """Whether the agent answers now. Renews its lease, as somebody cares for it whether it has a job or not."""
        if it.view.endpoint is None:
            return False
        connection = self._transport.connect(way_to(it.view.endpoint, it.view.host_key))
        try:
            await connection.renew_lease(self._orphan_grace)
        except AgentUnreachable:
            return False
        except AgentRefused:
            return True
        finally:
            await connection.aclose()
        return True

    async def _is_silent(self, it: _Snapshot) -> bool:
        """Whether the agent does not answer even after some patience."""
        endpoint = it.view.endpoint
        return endpoint is None or not await self._answers(it, way_to(endpoint, it.view.host_key))

    async def _describe(self, it: _Snapshot, ref: InstanceRef, fresh: bool) -> InstanceObservation:
        """Asks the cloud about one instance. `fresh`: so young that "unknown" means nothing yet."""
        try:
            instance = await self._backends.get_instance(ref)
            endpoint = await self._endpoint(instance)
        except BackendError as error:
            return self._saw(InstanceEvent.SILENT, message=str(error))
        return self._described(it, instance, endpoint, fresh=fresh)

    def _described(
        self, it: _Snapshot, instance: Instance | None, endpoint: Endpoint | None, *, fresh: bool
    ) -> InstanceObservation:
        """What the cloud's answer means."""
        if instance is None:
            return self._saw(
                InstanceEvent.SILENT if fresh else InstanceEvent.GONE, message="the cloud does not know it"
            )
        if instance.state is InstanceState.TERMINATED:
            return self._ended(InstanceEvent.GONE, it, instance)
        if instance.state is InstanceState.STOPPING:
            return self._ended(InstanceEvent.LEAVING, it, instance)
        if it.view.status is InstanceStatus.RUNNING:
            return self._saw(InstanceEvent.REACHED, endpoint=endpoint)
        return self._saw(InstanceEvent.SILENT, endpoint=endpoint)

    async def _endpoint(self, instance: Instance | None) -> Endpoint | None:
        """How the agent is reached, asking the backend to connect if it has a way of its own."""
        if instance is None or instance.endpoint is not None or instance.state is not InstanceState.RUNNING:
            return instance.endpoint if instance else None
        return await self._backends.connect(instance)

    async def _terminate(self, it: _Snapshot, ref: InstanceRef) -> InstanceObservation:
        """Asks for the end, and whether it has come. Only the cloud's word counts."""
        try:
            await self._backends.terminate_instance(ref)
            instance = await self._backends.get_instance(ref)
        except BackendError as error:
            self._alarm(it, str(error))
            return self._saw(InstanceEvent.STILL_THERE, message=str(error))
        if instance is None and self._is_fresh(it):
            # Both calls may have met a part of the cloud that does not know it yet.
            return self._saw(InstanceEvent.STILL_THERE, message="the cloud does not know it (yet)")
        if instance is not None and instance.state is InstanceState.TERMINATED and _came_short(it.view, instance):
            return self._ended(InstanceEvent.GONE, it, instance)
        if instance is None or instance.state is InstanceState.TERMINATED:
            return self._saw(InstanceEvent.GONE)
        self._alarm(it, f"the cloud says '{instance.state.value}'")
        return self._saw(InstanceEvent.STILL_THERE, message=f"the cloud says '{instance.state.value}'")

    def _alarm(self, it: _Snapshot, what: str) -> None:
        """Says aloud that a termination takes suspiciously long."""
        since = it.view.terminating_at
        if since is not None and self._clock.now() - since > ALARM_AFTER:
            ref: InstanceRef | None = it.view.ref
            log.critical("Instance %s is not terminated since %s and may cost money: %s", ref and ref.id, since, what)


def first_call(now: datetime) -> dict[str, Any]:
    """The columns of a new row whose first call is about to be made."""
    return {"create_calls": 1, "last_create_at": now}


def note_call(row: InstanceRow, now: datetime) -> None:
    """Writes down that the cloud is about to be asked."""
    row.create_calls += 1
    row.last_create_at = now


def _came_short(view: InstanceView, instance: Instance) -> bool:
    """Whether this is news of a shortage. What ran was had, and what was said on its way out is known."""
    return instance.reason is StateReason.NO_CAPACITY and view.running_at is None and view.error is None


def _why_gone(instance: Instance) -> str:
    """For people: why the cloud says an instance is gone."""
    reason = instance.reason.value.replace("_", " ") if instance.reason else "no reason given"
    state = "gone" if instance.state is InstanceState.TERMINATED else "on its way out"
    return f"the instance is {state} ({reason})"


def view_of(row: InstanceRow) -> InstanceView:
    """The part of a row that a step looks at."""
    return InstanceView(
        status=InstanceStatus(row.status),
        wanted=row.wanted,
        ref=InstanceRef.model_validate_json(row.ref) if row.ref else None,
        endpoint=Endpoint.model_validate_json(row.endpoint) if row.endpoint else None,
        host_key=row.host_key,
        error=row.error,
        error_scope=row.error_scope,
        message=row.message,
        misses=row.misses,
        failures=row.failures,
        accepted_at=row.accepted_at,
        running_at=row.running_at,
        terminating_at=row.terminating_at,
        terminated_at=row.terminated_at,
    )


def apply_view(row: InstanceRow, view: InstanceView) -> None:
    """Writes a view back to its row. `wanted` is not a step's to change."""
    row.status = view.status.value
    row.ref = view.ref.model_dump_json() if view.ref else None
    row.endpoint = view.endpoint.model_dump_json() if view.endpoint else None
    for column in ("host_key", "error", "error_scope", "message", "misses", "failures"):
        setattr(row, column, getattr(view, column))
    for column in ("accepted_at", "running_at", "terminating_at", "terminated_at"):
        setattr(row, column, getattr(view, column))
