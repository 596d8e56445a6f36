"""What follows from a change: the run's own status, the account of it for people, and who must be told.

Functions here run inside the transaction that makes the change.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import Protocol, cast
from uuid import UUID

from sqlalchemy import Table, bindparam, select, update
from sqlalchemy.orm import Session

from dstack_core._engine.leases import Kind, Lease
from dstack_core._engine.transitions import InstanceObservation, InstanceStatus, run_status
from dstack_core._models.offers import Offer
from dstack_core._models.runs import RunStatus
from dstack_core._store.prepared import Prepared, PreparedInsert
from dstack_core._store.tables import EventRow, InstanceRow, JobRow, RunRow


class Loop(Protocol):
    """What the reconciler is told."""

    def wake(self, kind: Kind, row_id: UUID) -> None:
        """A row was written and may have something to do."""

    def adopt(self, lease: Lease, known: object) -> None:
        """A row was written together with its lease; `known` is what its handler needs for the first step."""

    def due(self, at: datetime) -> None:
        """A row was given back until then."""


class Wakeups:
    """In-process news: rows that have something to do, and runs that have changed. Losing some costs only time.

    Args:
        server: the name of this process in leases.
    """

    def __init__(self, server: str = "") -> None:
        self.server = server
        self._loop: Loop | None = None
        self._of_services: Callable[[UUID], None] | None = None
        self._watchers: dict[UUID, set[asyncio.Event]] = defaultdict(set)

    def listen(self, loop: Loop) -> None:
        """Has the reconciler told of everything."""
        self._loop = loop

    def wake(self, kind: Kind, row_id: UUID) -> None:
        """A row was written and may have something to do."""
        if self._loop is not None:
            self._loop.wake(kind, row_id)

    def adopt(self, lease: Lease, known: object) -> None:
        """A row was written together with its lease, so nobody else looks at it. Lost, the lease runs out."""
        if self._loop is not None:
            self._loop.adopt(lease, known)

    def due(self, at: datetime | None) -> None:
        """A row was given back until then; `None`: for good."""
        if self._loop is not None and at is not None:
            self._loop.due(at)

    def listen_to_services(self, listener: Callable[[UUID], None]) -> None:
        """Has the directory of replicas told of every service that was written."""
        self._of_services = listener

    def service_changed(self, run_id: UUID) -> None:
        """A service or one of its replicas was written."""
        if self._of_services is not None:
            self._of_services(run_id)

    def changed(self, run_id: UUID) -> None:
        """A run has a new version."""
        for event in self._watchers.get(run_id, ()):
            event.set()

    def watch(self, run_id: UUID) -> asyncio.Event:
        """An event that is set at each new version, until `unwatch`."""
        event = asyncio.Event()
        self._watchers[run_id].add(event)
        return event

    def unwatch(self, run_id: UUID, event: asyncio.Event) -> None:
        """Ends a watch."""
        self._watchers[run_id].discard(event)
        if not self._watchers[run_id]:
            del self._watchers[run_id]


def note(session: Session, run_id: UUID, job_id: UUID | None, at: datetime, text: str) -> None:
    """Adds one line to the account of a run. Never a secret."""
    _NOTE.add(session, {"run_id": run_id, "job_id": job_id, "at": at, "text": text})


# Made once: putting a statement together takes longer than SQLite takes to answer it.
_NOTE = PreparedInsert(cast("Table", EventRow.__table__))
_RUN = select(RunRow.status).where(RunRow.id == bindparam("run_id")).with_for_update()
_ATTEMPTS = (
    select(JobRow.replica_num, JobRow.job_num, JobRow.status, JobRow.reason, JobRow.message)
    .where(JobRow.run_id == bindparam("run_id"))
    .order_by(JobRow.replica_num, JobRow.job_num, JobRow.attempt)
)

_PROVEN = select(JobRow.id).where(JobRow.run_id == bindparam("run_id"), JobRow.ready_at.is_not(None)).limit(1)

_RUNS = cast("Table", RunRow.__table__)
_NEWER = update(_RUNS).where(_RUNS.c.id == bindparam("of_run")).values(version=_RUNS.c.version + 1)
_SETTLED = _NEWER.values({name: bindparam(name) for name in ("status", "reason", "message", "finished_at")})
_AGAIN, _SETTLE = Prepared(_NEWER), Prepared(_SETTLED)
_SETTLE_UNFINISHED = Prepared(_SETTLED.where(_RUNS.c.finished_at.is_(None)))


def instance_moved(
    session: Session, row: InstanceRow, offer: Offer, before: InstanceStatus, seen: InstanceObservation
) -> None:
    """Accounts for a new status of an instance, and says what was bought, or was to be, and for how much."""
    if row.run_id is None:
        return
    place = "/".join(part for part in (row.backend, row.region, row.zone) if part)
    said = f": {seen.message}" if seen.message else ""
    text = f"instance {row.name} ({place}, {terms_of(offer)}): {before.value} -> {row.status}{said}"
    note(session, row.run_id, row.job_id, seen.at, text)


def terms_of(offer: Offer) -> str:
    """For people: `g6.xlarge, $0.8048/h, on demand`."""
    price = f"${offer.price:g}/h" if offer.price else "free"
    return f"{offer.instance_type}, {price}, {'spot' if offer.spot else 'on demand'}"


def is_proven(session: Session, run_id: UUID) -> bool:
    """Whether a replica of this service has ever been ready. Nobody else changes that before this transaction ends."""
    session.execute(_RUN, {"run_id": run_id})
    return session.execute(_PROVEN, {"run_id": run_id}).first() is not None


def settle_with(session: Session, only: JobRow, at: datetime) -> None:
    """Gives a run the status of its only job's latest attempt, and raises its version."""
    facts = {"status": only.status, "reason": only.reason, "message": only.message}
    end = at if RunStatus(only.status).is_finished else None
    terms = {"of_run": only.run_id, "finished_at": end, **facts}
    if not _SETTLE_UNFINISHED.change(session, terms):
        _AGAIN.change(session, {"of_run": only.run_id})


def settle_run(session: Session, run_id: UUID, at: datetime) -> None:
    """Works the run's status out from its jobs, and raises its version."""
    session.flush()
    was = RunStatus(session.scalars(_RUN, {"run_id": run_id}).one())
    if was.is_finished:
        _AGAIN.change(session, {"of_run": run_id})
        return
    attempts = session.execute(_ATTEMPTS, {"run_id": run_id})
    latest = list({(row.replica_num, row.job_num): row for row in attempts}.values())
    status = run_status([RunStatus(job.status) for job in latest])
    telling = next((job for job in latest if job.status == status.value), latest[0])
    facts = {"status": status.value, "reason": telling.reason, "message": telling.message}
    end = at if status.is_finished else None
    _SETTLE.change(session, {"of_run": run_id, "finished_at": end, **facts})
