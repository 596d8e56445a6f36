"""Leases with fencing tokens: who works on which row, and whether a result may still be written.

All functions here run inside one transaction. A lease is taken by raising the row's token; whoever holds an older token
can no longer write, however late it wakes up.

While a row is leased its `due_at` equals its `lease_until`; whoever wakes it meanwhile makes it due earlier, and
that is how the holder learns of it, in this process or another.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias, TypeVar, cast
from uuid import UUID

from sqlalchemy import Table, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from dstack_core._store.prepared import Prepared
from dstack_core._store.records import One
from dstack_core._store.tables import InstanceRow, JobRow

Kind: TypeAlias = Literal["job", "instance"]
LeasedRow: TypeAlias = JobRow | InstanceRow

Row = TypeVar("Row", bound=LeasedRow)

ROWS: dict[Kind, type[JobRow | InstanceRow]] = {"job": JobRow, "instance": InstanceRow}

# Made once: putting a statement together takes longer than SQLite takes to answer it.
_TABLES: tuple[type[LeasedRow], ...] = tuple(ROWS.values())
_DUE = {
    table: Prepared(
        select(table.id, table.lease_token)
        .where(table.due_at <= bindparam("now"), or_(table.lease_until.is_(None), table.lease_until < bindparam("now")))
        .order_by(table.due_at)
        .limit(bindparam("most"))
        .with_for_update(skip_locked=True)
    )
    for table in _TABLES
}
_TAKE = {
    table: Prepared(
        update(cast("Table", table.__table__))
        .where(table.__table__.c.id == bindparam("row_id"))
        .values({name: bindparam(f"new_{name}") for name in ("lease_owner", "lease_token", "lease_until", "due_at")})
    )
    for table in _TABLES
}
_RENEW = {
    table: Prepared(
        update(cast("Table", table.__table__))
        .where(table.__table__.c.id == bindparam("row_id"), table.__table__.c.lease_token == bindparam("token"))
        .values(lease_until=bindparam("until"), due_at=bindparam("until"))
    )
    for table in _TABLES
}
_NEXT_DUE = {
    table: select(func.min(table.due_at)).where(table.lease_until.is_(None)).scalar_subquery() for table in _TABLES
}
_NEXT_DUES = Prepared(select(*_NEXT_DUE.values()))
_HELD: dict[type[LeasedRow], One[Any]] = {
    table: One(table, table.id == bindparam("row_id"), table.lease_token == bindparam("token"), lock=True)
    for table in _TABLES
}
_JOB = One(JobRow, JobRow.id == bindparam("row_id"), lock=True)
_WAKE = {
    table: Prepared(
        update(cast("Table", table.__table__))
        .where(table.__table__.c.id == bindparam("row_id"), table.__table__.c.due_at.is_not(None))
        .values(due_at=bindparam("now"))
    )
    for table in _TABLES
}


FIRST_TOKEN = 1
"""The token of a lease that was written together with its row."""


class LeaseLost(Exception):
    """Somebody else has taken the row since; nothing was written."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one row, for as long as its token is `token`."""

    kind: Kind
    id: UUID
    token: int


def born_leased(owner: str, until: datetime) -> dict[str, Any]:
    """The columns of a new row that its writer works on at once: the first lease comes with the row."""
    return {"lease_owner": owner, "lease_token": FIRST_TOKEN, "lease_until": until, "due_at": until}


def take_due(session: Session, kind: Kind, owner: str, now: datetime, length: timedelta, limit: int) -> list[Lease]:
    """Takes up to `limit` rows that are due and not leased to anybody."""
    table = ROWS[kind]
    due = _DUE[table].rows(session, {"now": now, "most": limit})
    leases = [Lease(kind, row_id, token + 1) for row_id, token in due]
    until = now + length
    terms = {"new_lease_owner": owner, "new_lease_until": until, "new_due_at": until}
    for lease in leases:
        _TAKE[table].change(session, {"row_id": lease.id, "new_lease_token": lease.token, **terms})
    return leases


def take_job(session: Session, job_id: UUID, owner: str, until: datetime) -> JobRow | None:
    """Takes one job, though it may not be due; `None` if somebody has it, or it is final.

    For who writes news for that job: its next step needs no look for what is due.
    """
    row = _JOB.read(session, {"row_id": job_id})
    if row is None or row.due_at is None or row.lease_until is not None:
        return None
    row.lease_owner, row.lease_token, row.lease_until, row.due_at = owner, row.lease_token + 1, until, until
    return row


def next_due(session: Session) -> datetime | None:
    """When the next row becomes due that nobody has a lease on; `None` when there is none."""
    return min((due for due in _NEXT_DUES.row(session, {}) or () if due is not None), default=None)


def held(session: Session, lease: Lease, table: type[Row]) -> Row:
    """The row of a lease, locked for this transaction.

    Raises:
        LeaseLost: the token has moved on.
    """
    row = _HELD[cast("type[LeasedRow]", table)].read(session, {"row_id": lease.id, "token": lease.token})
    if row is None:
        raise LeaseLost(f"{lease.kind} {lease.id} (token {lease.token})")
    return cast("Row", row)


def renew(session: Session, lease: Lease, table: type[Row], now: datetime, length: timedelta) -> Row:
    """Lengthens a lease, and gives the row as it is now. A wake-up that came meanwhile is answered by this look."""
    terms = {"row_id": lease.id, "token": lease.token, "until": now + length}
    _RENEW[cast("type[LeasedRow]", table)].change(session, terms)
    return held(session, lease, table)


def release(row: LeasedRow, due_at: datetime | None) -> None:
    """Gives the row back, due again at `due_at`, or at once if it was woken meanwhile.

    `None`: never again, it is final.
    """
    woken = row.due_at != row.lease_until
    row.lease_owner, row.lease_until = None, None
    if due_at is None or not woken:
        row.due_at = due_at


def free_all(session: Session, owner: str, now: datetime) -> None:
    """Takes every lease away and makes the rows due, so that a server that is certainly alone can start at once."""
    for table in ROWS.values():
        session.execute(
            update(table)
            .where(table.lease_until.is_not(None), table.lease_owner != owner)
            .values(lease_owner=None, lease_until=None, lease_token=table.lease_token + 1, due_at=now)
        )


def lengthen(row: LeasedRow, until: datetime) -> None:
    """Lengthens the lease of a row that was just looked at. A wake-up that came meanwhile is answered by this look."""
    row.due_at = row.lease_until = until


def wake(session: Session, kind: Kind, row_id: UUID, now: datetime) -> bool:
    """Makes a row due now, whoever may hold it. False if it is final, and nobody need look at it."""
    session.flush()
    return bool(_WAKE[ROWS[kind]].change(session, {"row_id": row_id, "now": now}))
