"""Further attempts, and what one job of a run means for its others. Functions that run inside a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from dstack_core._engine.leases import wake
from dstack_core._engine.seams import Seams
from dstack_core._engine.specs import stored_job
from dstack_core._engine.transitions import NewAttempt
from dstack_core._models.runs import RunStatus
from dstack_core._store.tables import JobRow

_FIRST_RETRY, _LONGEST_RETRY = 5.0, 300.0
_FINISHED = [status.value for status in RunStatus if status.is_finished]


def new_attempt(session: Session, seams: Seams, ended: JobRow, action: NewAttempt) -> JobRow:
    """The row of another attempt at the same job. A stop that was asked for meanwhile is for it as well."""
    now = seams.clock.now()
    return JobRow(
        id=seams.ids.uuid7(),
        run_id=ended.run_id,
        replica_num=ended.replica_num,
        job_num=ended.job_num,
        attempt=action.attempt,
        spec=_spec_of(session, ended, now),
        status=RunStatus.PENDING.value,
        stop=ended.stop,
        message=_why(ended),
        submitted_at=now,
        retry_since=action.retry_since,
        unready_failures=action.unready_failures,
        due_at=now if ended.stop else now + _pause(seams, action),
        tried=[],
        ports={},
    )


def _why(ended: JobRow) -> str | None:
    """For people, until it is placed: what the attempt before came to."""
    return f"comes after attempt {ended.attempt}, which ended: {ended.message}" if ended.message else None


def _pause(seams: Seams, action: NewAttempt) -> timedelta:
    """Spread, so that a crowd does not come back together."""
    seconds = action.pause
    if seconds is None:
        seconds = min(_LONGEST_RETRY, _FIRST_RETRY * 2 ** min(action.attempt - 1, 10))
    return timedelta(seconds=seconds * (0.75 + 0.5 * seams.rng.random()))


_BEGUN = select(func.min(JobRow.running_at)).where(JobRow.run_id == bindparam("run_id"))
_FIRST_SPEC = select(JobRow.spec).where(
    JobRow.run_id == bindparam("run_id"), JobRow.replica_num == bindparam("replica_num"), JobRow.attempt == 0
)


def _spec_of(session: Session, ended: JobRow, now: datetime) -> str:
    """The same job. Of the time that a service may run, a replacement gets what is left."""
    spec = stored_job(ended.spec)
    if spec.service_port is None or spec.max_duration is None:
        return ended.spec
    begun = session.scalars(_BEGUN, {"run_id": ended.run_id}).one()
    if begun is None:
        return ended.spec
    first = session.scalars(_FIRST_SPEC, {"run_id": ended.run_id, "replica_num": ended.replica_num}).one()
    allowed = stored_job(first).max_duration or 0
    left = max(1, allowed - int((now - begun).total_seconds()))
    return spec.model_copy(update={"max_duration": left}).model_dump_json()


def revive_replicas(session: Session, seams: Seams, ready: JobRow) -> None:
    """Gives another attempt to the replicas of this run that were given up, unless the run is being stopped."""
    if ready.stop is not None:
        return
    now = seams.clock.now()
    for job in _latest(session, ready.run_id):
        if job.status == RunStatus.FAILED.value:
            again = NewAttempt(job.attempt + 1, retry_since=now, pause=0.0)
            session.add(new_attempt(session, seams, job, again))


def _latest(session: Session, run_id: UUID) -> list[JobRow]:
    jobs = session.scalars(
        select(JobRow).where(JobRow.run_id == run_id).order_by(JobRow.replica_num, JobRow.job_num, JobRow.attempt)
    )
    return list({(job.replica_num, job.job_num): job for job in jobs}.values())


def end_run(session: Session, ended: JobRow, why: str, now: datetime) -> Sequence[UUID]:
    """Has the other jobs of a run stopped; says which were told."""
    session.flush()
    told = []
    for job in _unfinished(session, ended.run_id):
        if job.id != ended.id and job.stop is None:
            job.stop = why
            told.append(job.id)
    session.flush()
    for job_id in told:
        wake(session, "job", job_id, now)
    return told


def ask_to_stop(session: Session, run_id: UUID, wanted: str, now: datetime) -> Sequence[UUID]:
    """Has all jobs of a run stopped, attempts that follow one which just ended included; says which were told."""
    told: list[UUID] = []
    unfinished = select(JobRow.id).where(JobRow.run_id == run_id, JobRow.status.not_in(_FINISHED))
    # Again, until nothing new is there: whoever ends an attempt and adds the next one has the lock that we wait for.
    while set(session.scalars(unfinished)) - set(told):
        for job in _unfinished(session, run_id):
            job.stop = wanted
            told += [job.id] if job.id not in told else []
        session.flush()
    for job_id in told:
        wake(session, "job", job_id, now)
    return told


def _unfinished(session: Session, run_id: UUID) -> Sequence[JobRow]:
    """Locked, in the order of their ids, so that two servers do not wait for each other."""
    unfinished = select(JobRow).where(JobRow.run_id == run_id, JobRow.status.not_in(_FINISHED))
    return session.scalars(unfinished.order_by(JobRow.id).with_for_update()).all()
