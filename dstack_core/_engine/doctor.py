"""What there is in the clouds, what is wrong with it, and its cure when a person says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine import restoring, sweeping
from dstack_core._engine.instances import ALARM_AFTER
from dstack_core._engine.orphans import REASONS, Verdict, least_age
from dstack_core._engine.seams import Clock
from dstack_core._engine.shortages import Shortage, Shortages
from dstack_core._engine.sweeper import end_instance, left_alone
from dstack_core._engine.sweeping import Judged
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._engine.views import cost_of
from dstack_core._models.instances import Instance, InstanceRef, InstanceRequest, InstanceState
from dstack_core._models.wire import (
    BackendStatus,
    DoctorBackend,
    DoctorInstance,
    DoctorReport,
    DoctorShortage,
    Fixed,
    FixReport,
    InstanceId,
)
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow, OrphanRow, RunRow, SweepRow
from dstack_core.errors import BackendError, ServerClientError

_MISSING = "the database believes in it, and the cloud does not list it"


@dataclass(frozen=True, slots=True)
class _Listing:
    """What one backend said: its instances of this owner, those of others if it can tell, and why not."""

    backend: str
    ours: Sequence[Instance] = ()
    others: Sequence[Instance] = ()
    lists_others: bool = False
    problem: str | None = None


class Doctor:
    """Examines the clouds against the database, and ends what a person says.

    Args:
        clock: the time.
        store: the database.
        backends: the configured backends.
        shortages: what is passed over.
        owner: whose instances are ours.
        report_only: the sweeper ends nothing by itself.
    """

    def __init__(
        self,
        clock: Clock,
        store: Store,
        backends: BackendHub,
        shortages: Shortages,
        owner: UUID,
        *,
        report_only: bool,
    ) -> None:
        self._clock = clock
        self._store = store
        self._backends = backends
        self._shortages = shortages
        self._owner = owner
        self._report_only = report_only

    # -- backends ----------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Notices a changed configuration and packages installed since. See `BackendHub.refresh`."""
        await self._backends.refresh()

    async def status(self, *, check: bool = False) -> list[BackendStatus]:
        """All backends; of one that was taken away while it has instances, that it must be put back."""
        found = {one.name: one for one in await self._backends.status(check=check)}
        for name, count in (await self._store.read(sweeping.open_counts)).items():
            told = left_alone(self._backends, name, count)
            if told is not None:
                known = found.get(name) or BackendStatus(name=name, title=name, state="not_installed")
                found[name] = known.model_copy(update={"reason": told})
        return list(found.values())

    # -- examining ---------------------------------------------------------------------------------------------------

    async def examine(self) -> DoctorReport:
        """Asks every backend what there is, and holds it against the database. Changes nothing."""
        await self._backends.refresh()
        listings = await asyncio.gather(*map(self._list, self._backends.reachable()))
        memory = await self._shortages.now()
        report = await self._store.read(lambda session: self._report(session, listings))
        return report.model_copy(update={"shortages": tuple(map(_shortage, memory))})

    async def _list(self, backend: str) -> _Listing:
        try:
            ours = await self._backends.list_instances(backend, self._owner)
            everybody = await self._backends.list_all_instances(backend)
        except BackendError as error:
            return _Listing(backend, problem=f"cannot be asked: {error}")
        others = [one for one in everybody or () if one.owner != self._owner]
        return _Listing(backend, ours, others, lists_others=everybody is not None)

    def _report(self, session: Session, listings: Sequence[_Listing]) -> DoctorReport:
        now = self._clock.now()
        seen = {one.backend: self._judged(session, one, now) for one in listings}
        counts = sweeping.open_counts(session)
        sweeps = {row.backend: row for row in session.scalars(select(SweepRow))}
        names = sorted({*seen, *counts})
        backends = tuple(self._backend(name, listings, counts, sweeps) for name in names)
        instances = tuple(_Records(session, now).all(seen))
        suspicion = restoring.suspicion(session)
        return DoctorReport(
            owner=self._owner,
            at=now,
            instances=instances,
            others=tuple(_other(one) for listing in listings for one in listing.others if _is_there(one)),
            backends=backends,
            restored_since=suspicion[0] if suspicion else None,
            report_only=self._report_only,
            problems=tuple(_problems(suspicion, backends, instances, now)),
        )

    def _judged(self, session: Session, listing: _Listing, now: datetime) -> Judged:
        age = least_age(self._backends.info(listing.backend))
        return sweeping.judged(session, self._owner, listing.ours, now, age, listing.backend)

    def _backend(
        self, name: str, listings: Sequence[_Listing], counts: Mapping[str, int], sweeps: Mapping[str, SweepRow]
    ) -> DoctorBackend:
        listing = next((one for one in listings if one.backend == name), None)
        sweep, count = sweeps.get(name), counts.get(name, 0)
        problems = (
            left_alone(self._backends, name, count),
            listing.problem if listing else None,
            sweep.problem if sweep else None,
        )
        return DoctorBackend(
            name=name,
            instances=count,
            swept_at=sweep.swept_at if sweep else None,
            problem=" ".join(filter(None, problems)) or None,
            lists_others=listing is not None and listing.lists_others,
        )

    # -- curing ------------------------------------------------------------------------------------------------------

    async def fix(self, wanted: Sequence[InstanceId]) -> FixReport:
        """Ends those of the named instances that should not be there, however many. Any other is left alone.

        Raises:
            ServerClientError: the database seems to be restored, which is to be confirmed first.
        """
        ended: list[Fixed] = []
        for backend in sorted({one.backend for one in wanted}):
            ended += await self._end(backend, {one.id for one in wanted if one.backend == backend})
        known = {(one.backend, one.id) for one in ended}
        return FixReport(ended=tuple(ended), left=tuple(one for one in wanted if (one.backend, one.id) not in known))

    async def _end(self, backend: str, ids: set[str]) -> list[Fixed]:
        listing = await self._list(backend)
        refs = await self._store.transact(lambda session: self._decide(session, listing, ids))
        outcomes = {ref.id: await end_instance(self._backends, ref) for ref in refs}
        now = self._clock.now()
        await self._store.transact(lambda session: sweeping.write_outcomes(session, backend, outcomes, now))
        return [Fixed(backend=backend, id=key, problem=problem) for key, problem in outcomes.items()]

    def _decide(self, session: Session, listing: _Listing, ids: set[str]) -> list[InstanceRef]:
        """Writes down which are to be ended: the database is read after the cloud was listed."""
        if restoring.suspicion(session) is not None:
            raise ServerClientError(
                f"This database seems to be restored from a copy, so nothing is ended. {restoring.CURE}."
            )
        now = self._clock.now()
        found = self._judged(session, listing, now)
        sweeping.write_down(session, [one for key, one in found.orphans.items() if key in ids], now)
        open_rows = sweeping.open_orphans(session, listing.backend)
        return [InstanceRef.model_validate_json(row.ref) for row in open_rows if row.instance_id in ids]

    async def confirm_restore(self) -> None:
        """A person has looked: what the database does not know may be ended."""
        await self._store.transact(lambda session: restoring.confirm(session, self._clock.now()))


class _Records:
    """What the database knows of instances, for a report."""

    def __init__(self, session: Session, now: datetime) -> None:
        self._session = session
        self._now = now
        self._ending = {(row.backend, row.instance_id): row for row in sweeping.open_orphans(session)}

    def all(self, seen: Mapping[str, Judged]) -> Iterator[DoctorInstance]:
        """What was listed and has not ended; then what was not listed and should be there."""
        for backend, found in seen.items():
            rows = self._rows(one.intent for one, _ in found.verdicts.values())
            for instance, verdict in found.verdicts.values():
                if verdict is not Verdict.GONE:
                    yield self._listed(backend, instance, verdict, rows.get(instance.intent))
        listed = {one.intent for found in seen.values() for one, _ in found.verdicts.values()}
        for row in self._open():
            if row.id not in listed:
                yield self._missing(row)

    def _rows(self, intents: Iterable[UUID]) -> dict[UUID, InstanceRow]:
        wanted = sorted(set(intents))
        found = (self._session.get(InstanceRow, intent) for intent in wanted)
        return {row.id: row for row in found if row is not None}

    def _open(self) -> Iterable[InstanceRow]:
        final = [status.value for status in InstanceStatus if status.is_final]
        unwritten = [InstanceStatus.INTENT.value, InstanceStatus.UNKNOWN.value]
        rows = select(InstanceRow).where(InstanceRow.status.not_in([*final, *unwritten])).order_by(InstanceRow.id)
        return self._session.scalars(rows)

    def _listed(self, backend: str, instance: Instance, verdict: Verdict, row: InstanceRow | None) -> DoctorInstance:
        orphan = self._ending.get((backend, instance.ref.id))
        hours = (self._now - instance.created_at).total_seconds() / 3600
        return DoctorInstance(
            backend=backend,
            id=instance.ref.id,
            region=instance.ref.region,
            zone=instance.ref.zone,
            state=instance.state.value,
            owner=instance.owner,
            intent=instance.intent,
            created_at=instance.created_at,
            verdict=verdict.value,
            reason=REASONS[verdict],
            ending=orphan is not None or _is_ending(row),
            price=row.price if row is not None else None,
            cost=row.price * max(0.0, hours) if row is not None else None,
            message=_said(orphan, row),
            **self._of_row(row),
        )

    def _missing(self, row: InstanceRow) -> DoctorInstance:
        ref = InstanceRef.model_validate_json(row.ref) if row.ref else None
        return DoctorInstance(
            backend=row.backend,
            id=ref.id if ref else None,
            region=row.region,
            zone=row.zone,
            owner=InstanceRequest.model_validate_json(row.request).owner,
            intent=row.id,
            created_at=row.accepted_at or row.created_at,
            verdict="missing",
            reason=_MISSING,
            ending=_is_ending(row),
            price=row.price,
            cost=cost_of(row, self._now),
            message=row.message,
            **self._of_row(row),
        )

    def _of_row(self, row: InstanceRow | None) -> dict[str, str | None]:
        run = self._session.get(RunRow, row.run_id) if row is not None and row.run_id is not None else None
        return {"run_name": run.name if run is not None else None, "status": row.status if row is not None else None}


def _is_ending(row: InstanceRow | None) -> bool:
    return row is not None and row.status == InstanceStatus.TERMINATING.value


def _said(orphan: OrphanRow | None, row: InstanceRow | None) -> str | None:
    return orphan.message if orphan is not None else row.message if _is_ending(row) and row is not None else None


def _is_there(instance: Instance) -> bool:
    return instance.state is not InstanceState.TERMINATED


def _other(instance: Instance) -> DoctorInstance:
    return DoctorInstance(
        backend=instance.ref.backend,
        id=instance.ref.id,
        region=instance.ref.region,
        zone=instance.ref.zone,
        state=instance.state.value,
        owner=instance.owner,
        intent=instance.intent,
        created_at=instance.created_at,
        verdict=Verdict.FOREIGN.value,
        reason=REASONS[Verdict.FOREIGN],
    )


def _shortage(one: Shortage) -> DoctorShortage:
    kind, region, zone, machine, market = one.key
    return DoctorShortage.model_validate(
        {
            "kind": kind,
            "backend": one.backend,
            "region": region,
            "zone": zone,
            "machine": machine,
            "market": market,
            "until": one.until,
            "message": one.message,
        }
    )


def _problems(
    suspicion: tuple[datetime, str] | None,
    backends: Iterable[DoctorBackend],
    instances: Iterable[DoctorInstance],
    now: datetime,
) -> Iterator[str]:
    """What needs a person."""
    if suspicion is not None:
        yield (
            f"This database seems to have been restored from a copy, or to be a copy of another: {suspicion[1]}. "
            f"Nothing is ended until somebody has looked. {restoring.CURE}."
        )
    for backend in backends:
        if backend.problem is not None:
            yield f"{backend.name}: {backend.problem}"
    for one in instances:
        if one.ending and now - one.created_at > ALARM_AFTER:
            yield f"{one.backend}: {one.id} does not end{': ' + one.message if one.message else ''}"
        elif one.verdict == Verdict.STRANGE.value:
            yield f"{one.backend}: {one.id} {one.reason}. End it yourself if it is yours"
