"""Ends what nobody claims: looks through each backend, every two minutes, for instances of ours that no row knows.

One server of a database does so for each backend, under a lease with a fencing token. The cloud is listed first and the
database read afterwards, so that what was made meanwhile is known. What is to be ended is written down before its end
is asked for, and asked for in each round until the cloud confirms it. The rules are in `orphans`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine import restoring, sweeping
from dstack_core._engine.instances import ALARM_AFTER
from dstack_core._engine.journal import Wakeups
from dstack_core._engine.leases import LeaseLost
from dstack_core._engine.orphans import MOST, Sightings, Verdict, least_age, too_many
from dstack_core._engine.seams import Seams
from dstack_core._engine.sweeping import Judged, Term
from dstack_core._engine.tasks import end_tasks
from dstack_core._models.instances import Instance, InstanceRef, InstanceState
from dstack_core._store.store import Store
from dstack_core._store.tables import OrphanRow, SweepRow
from dstack_core.errors import BackendError

log = logging.getLogger(__name__)

EVERY, AT_FIRST = 120.0, 10.0
"""Seconds between rounds; and between the first ones after a start, when there is most to find."""
FIRST_ROUNDS = 20
UNUSED_EVERY = timedelta(minutes=30)
"""How often a cloud is looked at of which this database never bought anything."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round came to.

    Attributes:
        ending: orphans whose end is written down, and to be asked for.
        sightings: what looked like an orphan, and how often.
        quiet: there was nothing at all.
        wake: rows of instances that have something to look at.
        alarms: what a person must be told now.
    """

    ending: tuple[InstanceRef, ...]
    sightings: Sightings
    quiet: bool
    wake: tuple[UUID, ...]
    alarms: tuple[str, ...]


class Sweeper:
    """Sweeps all backends of one database, or waits while another server does.

    Args:
        seams: clock, chance, ids.
        store: the database.
        backends: the configured backends.
        wakeups: who is told of rows that have something to look at; its `server` names this process in leases.
        owner: whose instances are ours.
        report_only: end nothing; only say what would be ended.
    """

    def __init__(
        self, seams: Seams, store: Store, backends: BackendHub, wakeups: Wakeups, owner: UUID, *, report_only: bool
    ) -> None:
        self._clock = seams.clock
        self._store = store
        self._backends = backends
        self._wakeups = wakeups
        self._owner = owner
        self._report_only = report_only
        self._sightings: dict[str, Sightings] = {}
        self._looked: dict[str, datetime] = {}
        self._quiet: dict[str, bool] = {}
        self._rounds: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None
        self._removed: frozenset[str] = frozenset()

    async def start(self, *, alone: bool) -> None:
        """Starts the rounds. `alone`: no other server can be on this database, so leases left behind are void."""
        if alone:
            await self._store.transact(sweeping.free)
        self._loop = asyncio.create_task(self._keep_sweeping(), name="sweeper")

    async def stop(self) -> None:
        """Ends the rounds, and lets another server begin at once."""
        if self._loop is not None:
            await end_tasks([self._loop, *self._rounds.values()])
            ours = SweepRow.lease_owner == self._wakeups.server
            await self._store.transact(lambda session: sweeping.free(session, ours))

    async def _keep_sweeping(self) -> None:
        ticks = 0
        while True:
            # Not at once: a start has more urgent things to do.
            await self._clock.sleep(AT_FIRST if ticks < FIRST_ROUNDS else EVERY)
            ticks += 1
            try:
                counts = await self._store.read(sweeping.open_counts)
            except Exception:
                log.exception("Cannot see what there is to sweep; trying again")
                continue
            self._warn_of_removed(counts)
            for backend in self._backends.reachable():
                # A slow backend delays nobody but itself.
                if backend not in self._rounds or self._rounds[backend].done():
                    round_ = self._guarded(backend, counts.get(backend, 0))
                    self._rounds[backend] = asyncio.create_task(round_, name=f"sweep {backend}")

    def _warn_of_removed(self, counts: Mapping[str, int]) -> None:
        """Says of each backend that was taken away while it has instances that it must be put back, once."""
        told = {name: left_alone(self._backends, name, count) for name, count in counts.items()}
        for name, text in told.items():
            if text is not None and name not in self._removed:
                log.critical("%s", text)
        self._removed = frozenset(name for name, text in told.items() if text is not None)

    async def _guarded(self, backend: str, alive: int) -> None:
        try:
            if await self._is_due(backend, alive):
                await self.sweep(backend)
        except LeaseLost as lost:
            log.warning("Lease lost: %s", lost)
        except Exception:
            log.exception("A round through backend '%s' failed; the next one comes", backend)

    async def _is_due(self, backend: str, alive: int) -> bool:
        """Whether there may be something to find. `alive`: how many instances are not known to have ended.

        A listing of a cloud costs something, and that of this computer would keep it awake. Where nothing was found and
        nothing was bought since, the former is rarely listed if nothing was ever bought there, and the latter never.
        """
        if alive or not self._quiet.get(backend, False):
            return True
        if self._backends.info(backend).existing_machines:
            return False
        if self._clock.now() - self._looked[backend] >= UNUSED_EVERY:
            return True
        return await self._store.read(lambda session: sweeping.was_used(session, backend))

    # -- one round ---------------------------------------------------------------------------------------------------

    async def sweep(self, backend: str) -> Round | None:
        """Makes one round through a backend; `None` if another server does so, or the cloud did not answer.

        Raises:
            LeaseLost: another server has taken over meanwhile; nothing was written.
        """
        begun = self._looked[backend] = self._clock.now()
        term = await self._take(backend)
        if term is None:
            self._sightings.pop(backend, None)
            return None
        try:
            listed = await self._backends.list_instances(backend, self._owner)
        except BackendError as error:
            log.warning("Backend '%s' cannot be swept now: %s", backend, error)
            return None
        found = await self._store.transact(lambda session: self._settle(session, term, listed, begun))
        self._sightings[backend], self._quiet[backend] = found.sightings, found.quiet
        for alarm in found.alarms:
            log.critical("%s", alarm)
        for row_id in found.wake:
            self._wakeups.wake("instance", row_id)
        await self._end(term, found.ending)
        return found

    async def _take(self, backend: str) -> Term | None:
        server = self._wakeups.server
        try:
            return await self._store.transact(lambda s: sweeping.take(s, backend, server, self._clock.now()))
        except IntegrityError:
            # Another server wrote the very first row at the same time.
            return None

    def _settle(self, session: Session, term: Term, listed: Sequence[Instance], begun: datetime) -> Round:
        """Judges a listing by what the database says now, and writes down what follows. May be run more than once."""
        row = sweeping.held(session, term)
        now = self._clock.now()
        age = least_age(self._backends.info(term.backend))
        found = sweeping.judged(session, self._owner, listed, now, age, term.backend)
        alarms = _look_for_losses(session, row, found, begun)
        sightings = self._sightings.get(term.backend, Sightings()).again(found.orphans)
        fresh = _fresh(session, term.backend, found, sightings)
        problem = self._objection(session, term.backend, len(fresh), found.alive)
        if problem is None:
            sweeping.write_down(session, fresh, now)
        elif problem != row.problem:
            alarms.append(problem)
        row.swept_at, row.problem = begun, problem
        ending = sweeping.open_orphans(session, term.backend)
        return Round(
            ending=tuple(InstanceRef.model_validate_json(one.ref) for one in ending),
            sightings=sightings,
            quiet=not found.alive and not ending,
            wake=(*sweeping.wake_finders(session, found), *sweeping.miss(session, term.backend, found)),
            alarms=(*alarms, *_overdue(ending, now)),
        )

    def _objection(self, session: Session, backend: str, orphans: int, listed: int) -> str | None:
        """Why what was found is not to be ended; `None` if it is."""
        if not orphans:
            return None
        what = f"{orphans} instance{'s' if orphans > 1 else ''} of backend '{backend}' should not be there"
        if restoring.suspicion(session) is not None:
            return f"{what}, but this database seems to be restored from a copy, so nothing is ended. {restoring.CURE}"
        if self._report_only:
            return f"{what}. This server only reports such; `dstack doctor --fix` ends them"
        if too_many(orphans, listed):
            return (
                f"{what}, of {listed} in all: more than {MOST} at once rather mean that something is wrong here, so "
                "none is ended. Look at `dstack doctor`; `dstack doctor --fix` ends them"
            )
        return None

    async def _end(self, term: Term, orphans: Sequence[InstanceRef]) -> None:
        """Asks for the end of what is written down, and writes down what came of it."""
        if not orphans:
            return
        outcomes = {ref.id: await end_instance(self._backends, ref) for ref in orphans}

        def write(session: Session) -> None:
            sweeping.held(session, term)
            sweeping.write_outcomes(session, term.backend, outcomes, self._clock.now())

        await self._store.transact(write)


def left_alone(backends: BackendHub, backend: str, instances: int) -> str | None:
    """What to tell a person of a backend that was taken away, or broke, while it has instances; else `None`."""
    if not instances or backend in backends.names():
        return None
    what = f"while {instances} instances exist" if instances > 1 else "while an instance exists"
    until = "they are gone" if instances > 1 else "it is gone"
    if backends.was_removed(backend):
        return (
            f"Backend '{backend}' was removed {what}; put it back until {until}. "
            "A server that does not have its configuration cannot end what costs money there."
        )
    return f"Backend '{backend}' cannot be used {what}; repair it: {backends.problem(backend)}"


async def end_instance(backends: BackendHub, ref: InstanceRef) -> str | None:
    """Asks for the end of an instance, and whether it has come: `None`, or what the cloud says instead."""
    try:
        await backends.terminate_instance(ref)
        instance = await backends.get_instance(ref)
    except BackendError as error:
        return str(error)
    if instance is None or instance.state is InstanceState.TERMINATED:
        return None
    return f"the cloud says '{instance.state.value}'"


def _look_for_losses(session: Session, row: SweepRow, found: Judged, begun: datetime) -> list[str]:
    """Notices that the database went back in time; or that up to some time it certainly has not."""
    lost = found.those(Verdict.LOST)
    if lost:
        alarm = restoring.suspect(session, found.grounds.now, restoring.lost_instances(lost))
        return [alarm] if alarm else []
    if restoring.suspicion(session) is None:
        # What was made since may not be listed yet.
        whole = begun - found.grounds.least_age
        row.whole_until = whole if row.whole_until is None else max(row.whole_until, whole)
    return []


def _fresh(session: Session, backend: str, found: Judged, sightings: Sightings) -> list[tuple[Instance, Verdict]]:
    """The orphans that were seen often enough and whose end is not written down yet."""
    known = {one.instance_id for one in sweeping.open_orphans(session, backend)}
    return [one for key, one in found.orphans.items() if sightings.enough(key) and key not in known]


def _overdue(orphans: Sequence[OrphanRow], now: datetime) -> list[str]:
    return [
        f"Instance {one.instance_id} of backend '{one.backend}', which nobody claims, is not ended since "
        f"{one.found_at} and may cost money: {one.message}"
        for one in orphans
        if now - one.found_at > ALARM_AFTER
    ]
