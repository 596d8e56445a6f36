"""The only loop of the engine: takes what is due under a lease, and has it moved on, one step after the other.

Level-triggered. A write wakes the loop at once; what a wake-up missed, the next due time finds.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy.orm import Session

from dstack_core._engine.leases import ROWS, Kind, Lease, LeaseLost, free_all, held, next_due, release, renew, take_due
from dstack_core._engine.seams import Seams
from dstack_core._engine.tasks import end_tasks
from dstack_core._store.store import Store

log = logging.getLogger(__name__)

LEASE = timedelta(seconds=30)
RENEWAL = 5.0
"""Seconds between renewals; also how late a wake-up from another server can be."""
RESYNC = 5.0
"""Seconds after which the loop looks again though nobody woke it."""
BATCH = 64
AFTER_A_BUG = timedelta(seconds=10)
_NEVER = datetime.max.replace(tzinfo=UTC)


class Handler(Protocol):
    """What knows how to move one kind of object on."""

    async def advance(self, lease: Lease, woken: asyncio.Event) -> bool:
        """Makes one step: observes, then writes under the lease. Ends early when `woken` is set.

        Returns:
            True to be called again at once, still holding the lease; False after having released it.

        Raises:
            LeaseLost: nothing was written.
        """

    async def forget(self, row_id: UUID) -> None:
        """The lease is gone: drop what is held for this row (connections, tasks)."""

    def expect(self, lease: Lease, known: Any) -> None:
        """The next step is that of a row which was just written; `known` is what a look at it would find."""


@dataclass
class _Work:
    lease: Lease
    task: asyncio.Task[None]
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Reconciler:
    """Runs handlers for the rows that are due. One instance per server process.

    Args:
        seams: clock, chance, ids.
        store: where the rows are.
        owner: name of this server process in leases.
        handlers: one for each kind of row.
    """

    def __init__(self, seams: Seams, store: Store, owner: str, handlers: dict[Kind, Handler]) -> None:
        self._clock = seams.clock
        self._store = store
        self._owner = owner
        self._handlers = handlers
        self._working: dict[tuple[Kind, UUID], _Work] = {}
        self._woken = asyncio.Event()
        self._has_news = False
        self._looks_at = _NEVER
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, alone: bool) -> None:
        """Starts the loop. `alone`: no other server can be on this database, so leases left behind are void."""
        if alone:
            now = self._clock.now()
            await self._store.transact(lambda session: free_all(session, self._owner, now))
        self._tasks = [asyncio.create_task(self._loop()), asyncio.create_task(self._keep_leases())]

    async def stop(self) -> None:
        """Stops working and gives every lease back. Running jobs are left alone."""
        self._stopped = True
        working = list(self._working.values())
        await end_tasks([*self._tasks, *(work.task for work in working)])
        await self._store.transact(lambda session: self._give_back(session, [work.lease for work in working]))
        for work in working:
            await self._handlers[work.lease.kind].forget(work.lease.id)

    def wake(self, kind: Kind, row_id: UUID) -> None:
        """Says that a row was written and may have something to do now."""
        work = self._working.get((kind, row_id))
        if work is not None:
            work.woken.set()
        self._look_now()

    def adopt(self, lease: Lease, known: object) -> None:
        """Works on a row that was written together with its lease."""
        if not self._stopped:
            self._handlers[lease.kind].expect(lease, known)
            self._begin(lease)

    def due(self, at: datetime) -> None:
        """A row was given back. Looks again when it is due, if that is before the next look."""
        if at < self._looks_at:
            self._looks_at = at
            self._woken.set()

    def _look_now(self) -> None:
        self._has_news = True
        self._woken.set()

    def _give_back(self, session: Session, leases: list[Lease]) -> None:
        now = self._clock.now()
        for lease in leases:
            with suppress(LeaseLost):
                release(held(session, lease, ROWS[lease.kind]), now)

    async def _loop(self) -> None:
        while True:
            # Whatever comes or is given back during the look may have been missed by it.
            self._has_news, self._looks_at = False, _NEVER
            try:
                taken, due = await self._store.transact(self._take)
            except Exception:
                log.exception("Cannot read what is due; trying again")
                await self._clock.sleep(RESYNC)
                continue
            for lease in taken:
                self._begin(lease)
            await self._pause(due)

    def _take(self, session: Session) -> tuple[list[Lease], datetime | None]:
        """Takes what is due, and says when the next row will be."""
        now = self._clock.now()
        taken = [lease for kind in self._handlers for lease in take_due(session, kind, self._owner, now, LEASE, BATCH)]
        return taken, next_due(session)

    async def _pause(self, due: datetime | None) -> None:
        """Waits for a wake-up, for the next due row, or for the resync. To look again sooner, nobody need look now."""
        at = self._clock.now() + timedelta(seconds=RESYNC)
        self._looks_at = min(self._looks_at, at, at if due is None else due)
        while not self._has_news and (left := (self._looks_at - self._clock.now()).total_seconds()) > 0:
            self._woken.clear()
            with suppress(TimeoutError):
                await self._clock.wait_for(self._woken.wait(), left)

    def _begin(self, lease: Lease) -> None:
        key = (lease.kind, lease.id)
        woken = asyncio.Event()
        task = asyncio.create_task(self._work(lease, woken), name=f"{lease.kind} {lease.id}")
        self._working[key] = _Work(lease, task, woken)

    async def _work(self, lease: Lease, woken: asyncio.Event) -> None:
        """Steps until the row is released. A bug in a step is logged, and the row comes again later."""
        handler = self._handlers[lease.kind]
        try:
            while await handler.advance(lease, woken):
                pass
        except asyncio.CancelledError:
            await handler.forget(lease.id)
            raise
        except LeaseLost as lost:
            log.warning("Lease lost: %s", lost)
            await handler.forget(lease.id)
            self._look_now()
        except Exception:
            log.exception("A step of %s %s failed", lease.kind, lease.id)
            await handler.forget(lease.id)
            with suppress(Exception):  # a dead store: the lease runs out by itself
                await self._store.transact(lambda session: self._postpone(session, lease))
            self._look_now()
        finally:
            work = self._working.get((lease.kind, lease.id))
            if work is not None and work.lease == lease:
                del self._working[lease.kind, lease.id]

    def _postpone(self, session: Session, lease: Lease) -> None:
        now = self._clock.now()
        with suppress(LeaseLost):
            release(renew(session, lease, ROWS[lease.kind], now, LEASE), now + AFTER_A_BUG)

    async def _keep_leases(self) -> None:
        """Renews every lease that is being worked under, in one transaction, and stops the work of lost ones."""
        while True:
            await self._clock.sleep(RENEWAL)
            working = list(self._working.values())
            if not working:
                continue
            try:
                woken, lost = await self._store.transact(partial(self._renew, working=working))
            except Exception:
                log.exception("Cannot renew leases; trying again")
                continue
            for work in woken:
                work.woken.set()
            for work in lost:
                work.task.cancel()

    def _renew(self, session: Session, working: list[_Work]) -> tuple[list[_Work], list[_Work]]:
        woken: list[_Work] = []
        lost: list[_Work] = []
        now = self._clock.now()
        for work in working:
            try:
                row = held(session, work.lease, ROWS[work.lease.kind])
            except LeaseLost:
                lost.append(work)
                continue
            if row.lease_until is None:
                # Given back meanwhile. A lease now would be nobody's.
                continue
            if row.due_at != row.lease_until:
                # The mark stays until the handler looks at the row.
                woken.append(work)
            else:
                row.due_at = now + LEASE
            row.lease_until = now + LEASE
        return woken, lost
