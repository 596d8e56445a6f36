"""What a round of the sweeper reads and writes: functions that run inside a transaction."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from dstack_core._engine import restoring
from dstack_core._engine.leases import LeaseLost, wake
from dstack_core._engine.orphans import REASONS, ROUNDS, Claim, Grounds, Verdict, judge
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import Instance, InstanceRef, InstanceState
from dstack_core._store.tables import InstanceRow, OrphanRow, SweepRow

log = logging.getLogger(__name__)

LEASE = timedelta(minutes=6)
"""How long the server that swept last keeps its place without a word: three rounds."""
_FINAL = [status.value for status in InstanceStatus if status.is_final]
_AT_ONCE = 500
"""Values in one list of a query."""


@dataclass(frozen=True, slots=True)
class Term:
    """The right to sweep one backend, for as long as its token is `token`."""

    backend: str
    token: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A listing, judged by what the database says."""

    grounds: Grounds
    verdicts: Mapping[str, tuple[Instance, Verdict]]

    def those(self, *verdicts: Verdict) -> list[Instance]:
        """The instances with these verdicts."""
        return [one for one, verdict in self.verdicts.values() if verdict in verdicts]

    @property
    def orphans(self) -> dict[str, tuple[Instance, Verdict]]:
        """Those whose end may be asked for once they were seen often enough, by the cloud's id."""
        return {key: known for key, known in self.verdicts.items() if known[1].is_orphan}

    @property
    def alive(self) -> int:
        """How many instances of ours have not ended."""
        return sum(verdict not in (Verdict.GONE, Verdict.FOREIGN) for _, verdict in self.verdicts.values())


# -- whose turn it is ------------------------------------------------------------------------------------------------


def take(session: Session, backend: str, server: str, now: datetime) -> Term | None:
    """Takes or keeps the right to sweep a backend; `None` while another server has it."""
    row = session.get(SweepRow, backend, with_for_update=True)
    if row is None:
        row = SweepRow(backend=backend, lease_token=0)
        session.add(row)
    if row.lease_owner != server:
        if row.lease_until is not None and row.lease_until > now:
            return None
        row.lease_token += 1
    row.lease_owner, row.lease_until = server, now + LEASE
    return Term(backend, row.lease_token)


def held(session: Session, term: Term) -> SweepRow:
    """The row of a term, locked for this transaction.

    Raises:
        LeaseLost: another server sweeps this backend now.
    """
    ours = (SweepRow.backend == term.backend, SweepRow.lease_token == term.token)
    row = session.scalars(select(SweepRow).where(*ours).with_for_update()).one_or_none()
    if row is None:
        raise LeaseLost(f"sweep of {term.backend} (token {term.token})")
    return row


def free(session: Session, *of: ColumnElement[bool]) -> None:
    """Gives the right back, of all servers or of those that are named, so that another one can begin at once."""
    session.execute(update(SweepRow).where(*of).values(lease_owner=None, lease_until=None))


def open_counts(session: Session) -> dict[str, int]:
    """How many instances of each backend are not known to have ended, those that nobody claims included."""
    counts: Counter[str] = Counter()
    alive = select(InstanceRow.backend, func.count()).where(InstanceRow.status.not_in(_FINAL))
    for backend, count in session.execute(alive.group_by(InstanceRow.backend)):
        counts[backend] += count
    for orphan in open_orphans(session):
        counts[orphan.backend] += 1
    return dict(sorted(counts.items()))


def was_used(session: Session, backend: str) -> bool:
    """Whether anything was ever bought of a backend."""
    rows = select(InstanceRow.id).where(InstanceRow.backend == backend).limit(1)
    return session.scalars(rows).first() is not None


# -- judging ---------------------------------------------------------------------------------------------------------


def judged(
    session: Session, owner: UUID, listed: Sequence[Instance], now: datetime, least_age: timedelta, backend: str
) -> Judged:
    """Judges a listing that was made before this transaction began."""
    row = session.get(SweepRow, backend)
    whole = (row.whole_until if row is not None else None, restoring.confirmed_at(session))
    grounds = Grounds(
        owner=owner,
        claims=claims_of(session, [one.intent for one in listed]),
        now=now,
        least_age=least_age,
        whole_until=max((until for until in whole if until is not None), default=None),
    )
    return Judged(grounds, {one.ref.id: (one, judge(one, grounds)) for one in listed})


def claims_of(session: Session, intents: Sequence[UUID]) -> dict[UUID, Claim]:
    """What the database says about these intents; nothing about those that it never heard of."""
    found: dict[UUID, Claim] = {}
    for begin in range(0, len(intents), _AT_ONCE):
        some = InstanceRow.id.in_(intents[begin : begin + _AT_ONCE])
        for row_id, status, ref in session.execute(_CLAIMS.where(some)):
            found[row_id] = Claim(InstanceStatus(status), _id_of(ref))
    return found


_CLAIMS = select(InstanceRow.id, InstanceRow.status, InstanceRow.ref)


def _id_of(ref: str | None) -> str | None:
    return InstanceRef.model_validate_json(ref).id if ref else None


# -- what follows ----------------------------------------------------------------------------------------------------


def open_orphans(session: Session, backend: str | None = None) -> list[OrphanRow]:
    """The orphans, of one backend or of all, whose end is written down and not confirmed, the oldest first."""
    rows = select(OrphanRow).where(OrphanRow.gone_at.is_(None)).order_by(OrphanRow.found_at, OrphanRow.instance_id)
    return list(session.scalars(rows if backend is None else rows.where(OrphanRow.backend == backend)))


def write_down(session: Session, orphans: Iterable[tuple[Instance, Verdict]], now: datetime) -> None:
    """Decides that these are to be ended. From here on their end is asked for until it is confirmed."""
    for instance, verdict in orphans:
        row = session.get(OrphanRow, (instance.ref.backend, instance.ref.id))
        if row is not None and row.gone_at is None:
            continue
        if row is None:
            row = OrphanRow(backend=instance.ref.backend, instance_id=instance.ref.id)
            session.add(row)
        row.ref, row.intent, row.reason = instance.ref.model_dump_json(), instance.intent, verdict.value
        row.found_at, row.message, row.gone_at = now, None, None
        log.error("Ending instance %s of backend '%s': it %s", instance.ref.id, instance.ref.backend, REASONS[verdict])
    session.flush()


def write_outcomes(session: Session, backend: str, outcomes: Mapping[str, str | None], now: datetime) -> None:
    """Writes down what came of asking for the end of orphans: `None` is its confirmation."""
    for row in open_orphans(session, backend):
        if row.instance_id in outcomes:
            row.message = outcomes[row.instance_id]
            row.gone_at = now if row.message is None else None


def wake_finders(session: Session, found: Judged) -> Iterator[UUID]:
    """Has those intents looked at that are being looked for: here they are."""
    for instance in found.those(Verdict.ARRIVING):
        looked_for = found.grounds.claims[instance.intent].status is InstanceStatus.UNKNOWN
        if looked_for and wake(session, "instance", instance.intent, found.grounds.now):
            yield instance.intent


def miss(session: Session, backend: str, found: Judged) -> Iterator[UUID]:
    """Counts the rounds in which instances that run were not listed, and has those looked at that are missed."""
    now = found.grounds.now
    running = select(InstanceRow).where(
        InstanceRow.backend == backend, InstanceRow.status == InstanceStatus.RUNNING.value
    )
    listed = {key for key, (one, _) in found.verdicts.items() if one.state is not InstanceState.TERMINATED}
    for row in session.scalars(running.order_by(InstanceRow.id)):
        settled = row.running_at is not None and now - row.running_at > found.grounds.least_age
        row.unlisted = row.unlisted + 1 if settled and _id_of(row.ref) not in listed else 0
        if row.unlisted >= ROUNDS:
            session.flush()
            wake(session, "instance", row.id, now)
            yield row.id
