"""What clients can ask of the engine: plan, submit, look, read output, stop, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub, Listing
from dstack_core._engine import journal, placement
from dstack_core._engine.intents import IntentFor
from dstack_core._engine.jobs import JobHandler, as_written
from dstack_core._engine.keeping import ask_to_stop
from dstack_core._engine.leases import FIRST_TOKEN, Lease
from dstack_core._engine.output import LogStream, OutputReader
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.replicas import Directory
from dstack_core._engine.repos import check_known
from dstack_core._engine.seams import Seams
from dstack_core._engine.shortages import Shortages
from dstack_core._engine.specs import is_cloned, job_specs, run_name_of, submit_key_seed
from dstack_core._engine.sweeping import open_orphans
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._engine.views import offer_of, run_of, runs_of
from dstack_core._models.configurations import check_run_name
from dstack_core._models.runs import JobPlan, JobSpec, Run, RunPlan, RunSpec, RunStatus
from dstack_core._models.wire import GetRunRequest, JobMetrics, LogQuery, StopRunsRequest
from dstack_core._store import records
from dstack_core._store.code import CodeStore
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow, JobRow, ProjectRow, RunRow
from dstack_core.errors import ConfigurationError, NoOffersError, NotFoundError, RunNameTakenError, ServerClientError

PLAN_TIMEOUT = 10.0
"""Seconds a plan waits for slow backends if nothing else is set; it names those that were late."""
LONGEST_WAIT = 60.0
_OTHER_SERVERS = 1.0
"""Seconds between looks for changes that another server of the same database made."""
_NO_BACKEND = "\n  there is no backend to ask: pip install dstack-local, or see `dstack backends`"
_FINISHED = [status.value for status in RunStatus if status.is_finished]


# Made once: putting a statement together takes longer than SQLite takes to answer it.
_PROJECT = select(ProjectRow).where(ProjectRow.name == bindparam("name"))
_OF_PROJECT = select(RunRow).where(RunRow.project_id == bindparam("project_id"))
_BY_KEY = _OF_PROJECT.where(RunRow.submit_key == bindparam("submit_key"))
_LIVE = _OF_PROJECT.where(RunRow.name == bindparam("name"), RunRow.deleted_at.is_(None))


class _Projects:
    """The ids of projects. They are looked up once: a project is never renamed or removed."""

    def __init__(self) -> None:
        self._ids: dict[str, UUID] = {}

    def knows(self, name: str) -> bool:
        """Whether there is no need to look."""
        return name in self._ids

    def id_of(self, session: Session, name: str) -> UUID:
        """The id of a project.

        Raises:
            ServerClientError: there is no such project.
        """
        if name not in self._ids:
            row = session.scalars(_PROJECT, {"name": name}).one_or_none()
            if row is None:
                # Not a NotFoundError: a client takes that for "there is no such run".
                raise ServerClientError(f"There is no project '{name}' on this server. Use project_name='main'.")
            self._ids[name] = row.id
        return self._ids[name]


@dataclass(frozen=True, slots=True)
class _NewRun:
    """A run that is not written down yet, and the first attempts of its jobs."""

    id: UUID
    project: str
    user: str
    key: UUID
    spec: RunSpec
    name: str
    jobs: tuple[tuple[UUID, JobSpec], ...]
    at: datetime

    def rows(self, project_id: UUID, server: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The columns of the run, and of each job: leased to the server that writes them."""
        run = {
            "id": self.id,
            "project_id": project_id,
            "user": self.user,
            "name": self.name,
            "submit_key": self.key,
            "spec": self.spec.model_dump_json(exclude_unset=True),
            "status": RunStatus.SUBMITTED.value,
            "version": 0,
            "submitted_at": self.at,
        }
        return run, [self._job(row_id, job, server) for row_id, job in self.jobs]

    def _job(self, row_id: UUID, spec: JobSpec, server: str) -> dict[str, Any]:
        return {
            "id": row_id,
            "run_id": self.id,
            "replica_num": spec.replica_num,
            "job_num": spec.job_num,
            "attempt": 0,
            "spec": spec.model_dump_json(),
            "status": RunStatus.SUBMITTED.value,
            "tried": [],
            "ports": {},
            "log_bytes": 0,
            "log_lost_bytes": 0,
            "submitted_at": self.at,
            "unready_failures": 0,
            "due_at": self.at + LEASE,
            "lease_owner": server,
            "lease_token": FIRST_TOKEN,
            "lease_until": self.at + LEASE,
        }


class RunService:
    """The engine's side of the HTTP API. Methods raise the errors of `dstack_core.errors` that clients get."""

    def __init__(
        self,
        seams: Seams,
        store: Store,
        logs: LogStore,
        code: CodeStore,
        backends: BackendHub,
        jobs: JobHandler,
        wakeups: journal.Wakeups,
        directory: Directory,
        shortages: Shortages,
        plan_timeout: float = PLAN_TIMEOUT,
    ) -> None:
        self._seams = seams
        self._clock = seams.clock
        self._store = store
        self._logs = logs
        self._code = code
        self._backends = backends
        self._jobs = jobs
        self._wakeups = wakeups
        self._directory = directory
        self._shortages = shortages
        self._plan_timeout = plan_timeout
        self._output = OutputReader(seams, store, logs, wakeups)
        self._projects = _Projects()

    # -- planning and submitting ---------------------------------------------------------------------------------

    async def get_plan(self, project: str, user: str, spec: RunSpec) -> RunPlan:
        """What would happen if the run were submitted now. Buys nothing and writes nothing."""
        with self._store.ahead():
            return await self._get_plan(project, user, spec)

    async def _get_plan(self, project: str, user: str, spec: RunSpec) -> RunPlan:
        if not self._projects.knows(project):
            await self._store.read(lambda session: self._projects.id_of(session, project))
        name = spec.run_name or spec.configuration.name
        jobs = job_specs(spec, check_run_name(name) if name else "run")
        # The jobs of a run all need the same.
        plan = await self._plan(jobs[0])
        plans = tuple(plan.model_copy(update={"job_spec": job}) for job in jobs)
        return RunPlan(project_name=project, user=user, run_spec=spec, job_plans=plans)

    async def _plan(self, spec: JobSpec) -> JobPlan:
        ranked = placement.rank(await self._listings(spec), spec.requirements, await self._shortages.now())
        offers = tuple(offer_of(o, self._backends.info(o.backend).terminates_itself) for o in ranked.offers)
        return JobPlan(job_spec=spec, offers=offers, total_offers=ranked.total, notes=ranked.notes)

    async def _listings(self, spec: JobSpec) -> list[Listing]:
        only = spec.backends or None
        return await self._backends.list_offers(spec.requirements, timeout=self._plan_timeout, only=only)

    async def submit(self, project: str, user: str, spec: RunSpec, submit_key: UUID) -> Run:
        """Accepts a run. The same key again is the same run.

        Raises:
            NoOffersError: nothing could run it now, and it has no retry policy to wait with.
            RunNameTakenError: an active run has this name.
            ConfigurationError: the name, or the kind of run, is not acceptable; or its code is not here.
        """
        with self._store.ahead():
            return await self._submit(project, user, spec, submit_key)

    async def _submit(self, project: str, user: str, spec: RunSpec, submit_key: UUID) -> Run:
        name = spec.run_name or spec.configuration.name
        specs = job_specs(spec, check_run_name(name) if name else "run")
        try:
            await self._check_code(spec)
            await self._backends.refresh()
            # The jobs of a run all need the same.
            await self._check_offers(specs[0])
        except (ConfigurationError, NoOffersError):
            # Perhaps it was accepted before, and what it asked for is now in use by itself.
            known = await self._store.read(lambda session: self._by_key(session, project, submit_key))
            if known is None:
                raise
            return known
        run = await self._insert(project, user, spec, submit_key, name)
        if run.service is not None:
            self._wakeups.service_changed(run.id)
        return run

    async def _check_code(self, spec: RunSpec) -> None:
        """Code that is here now stays: whoever asks for it keeps it."""
        if spec.repo_code_hash is not None and not await self._code.has_manifest(spec.repo_code_hash):
            raise ConfigurationError(
                f"The run's code ({spec.repo_code_hash}) is not on the server. Submit with `repo=...`, which sends it."
            )

    async def _check_offers(self, spec: JobSpec) -> None:
        """Refuses at once what could only fail later."""
        if spec.retry_policy.retry:
            return
        memory = await self._shortages.now()
        ranked = placement.rank(await self._listings(spec), spec.requirements, memory, limit=8)
        if not ranked.can_start:
            notes = "".join(f"\n  {note}" for note in ranked.notes) or _NO_BACKEND
            raise NoOffersError(f"No offer can run this now.{notes}")

    async def _insert(self, project: str, user: str, spec: RunSpec, key: UUID, name: str | None) -> Run:
        """Writes the run. Of two at once with one name or key the database lets one through; the other looks first."""
        for attempt in range(8):
            wanted = name or run_name_of(submit_key_seed(key) + attempt * 7919)
            try:
                new = self._new_run(project, user, spec, key, wanted)
                write = self._insert_new if attempt == 0 else self._look_and_insert
                run, is_new = await self._store.transact(partial(write, new), ahead=True, quick=True)
            except IntegrityError:
                continue
            except RunNameTakenError:
                if name is not None:
                    raise
                continue
            if is_new:
                self._begin(new)
            return run
        raise ServerClientError("The run could not be written: its name is being taken again and again. Try again.")

    def _new_run(self, project: str, user: str, spec: RunSpec, key: UUID, name: str) -> _NewRun:
        named = spec.model_copy(update={"run_name": name})
        ids = self._seams.ids
        jobs = tuple((ids.uuid7(), job) for job in job_specs(named, name))
        return _NewRun(ids.uuid7(), project, user, key, named, name, jobs, self._clock.now())

    def _look_and_insert(self, new: _NewRun, session: Session) -> tuple[Run, bool]:
        """Gives the run of that key if there is one, and frees the name if it can be had."""
        known = self._by_key(session, new.project, new.key)
        if known is not None:
            return known, False
        self._free_name(session, self._projects.id_of(session, new.project), new.name)
        return self._insert_new(new, session)

    def _insert_new(self, new: _NewRun, session: Session) -> tuple[Run, bool]:
        """Writes rows alone: what is in the way makes it fail."""
        project_id = self._projects.id_of(session, new.project)
        if is_cloned(new.spec):
            check_known(session, project_id, new.spec.repo_id)
        run, jobs = new.rows(project_id, self._wakeups.server)
        run_row = records.add(session, RunRow, run)
        job_rows = [records.add(session, JobRow, job) for job in jobs]
        journal.note(session, new.id, None, new.at, f"run {new.name} submitted by {new.user}")
        return run_of(run_row, new.project, job_rows, {}, new.at), True

    def _begin(self, new: _NewRun) -> None:
        """Has the attempts placed at once, under the leases that were written with them."""
        for row_id, job in new.jobs:
            whom = IntentFor.of(row_id, new.id, new.name, new.project, job)
            self._wakeups.adopt(Lease("job", row_id, FIRST_TOKEN), as_written(row_id, whom, job))

    def _free_name(self, session: Session, project_id: UUID, name: str) -> None:
        """A finished run gives its name away; an active one keeps it."""
        holder = _live_run(session, project_id, name)
        if holder is None:
            return
        if not RunStatus(holder.status).is_finished:
            raise RunNameTakenError(
                f"A run named '{name}' is active ({holder.status}). Stop it first (client.runs.get('{name}').stop()), "
                "choose another run_name, or leave run_name out to have one made up."
            )
        holder.deleted_at = self._clock.now()
        session.flush()

    def _by_key(self, session: Session, project: str, key: UUID) -> Run | None:
        terms = {"project_id": self._projects.id_of(session, project), "submit_key": key}
        row = session.scalars(_BY_KEY, terms).one_or_none()
        return runs_of(session, [row], self._clock.now())[0] if row is not None else None

    # -- looking -------------------------------------------------------------------------------------------------

    async def get(self, project: str, request: GetRunRequest) -> Run:
        """One run; waits for a newer version if asked to.

        Raises:
            NotFoundError: there is none.
        """
        run = await self._read(project, request)
        if request.after_version is None or run.version > request.after_version:
            return run
        deadline = self._clock.now() + timedelta(seconds=min(request.wait, LONGEST_WAIT))
        news = self._wakeups.watch(run.id)
        try:
            while run.version <= request.after_version:
                left = (deadline - self._clock.now()).total_seconds()
                if left <= 0:
                    break
                await self._wait(news, min(left, _OTHER_SERVERS))
                run = await self._read(project, request)
        finally:
            self._wakeups.unwatch(run.id, news)
        return run

    async def _wait(self, news: asyncio.Event, seconds: float) -> None:
        try:
            await self._clock.wait_for(news.wait(), seconds)
        except TimeoutError:
            return
        news.clear()

    async def _read(self, project: str, request: GetRunRequest) -> Run:
        def find(session: Session) -> Run | None:
            project_id = self._projects.id_of(session, project)
            if request.run_id is not None:
                row = session.get(RunRow, request.run_id)
                row = row if row is not None and row.project_id == project_id else None
            else:
                row = _live_run(session, project_id, request.run_name or "")
            return runs_of(session, [row], self._clock.now())[0] if row is not None else None

        run = await self._store.read(find, quick=True)
        if run is None:
            raise NotFoundError(f"There is no run '{request.run_name or request.run_id}' in project '{project}'.")
        return self._directory.told(run)

    async def _check_known(self, project: str, run_id: UUID) -> None:
        def find(session: Session) -> bool:
            row = session.get(RunRow, run_id)
            return row is not None and row.project_id == self._projects.id_of(session, project)

        if not await self._store.read(find):
            raise NotFoundError(f"There is no run '{run_id}' in project '{project}'.")

    async def list(self, project: str, all: bool, limit: int) -> list[Run]:
        """Runs, newest first. Without `all`: the active ones, or else the latest finished one."""

        def find(session: Session) -> list[Run]:
            query = (
                select(RunRow)
                .where(RunRow.project_id == self._projects.id_of(session, project), RunRow.deleted_at.is_(None))
                .order_by(RunRow.submitted_at.desc(), RunRow.id.desc())
                .limit(limit)
            )
            rows = session.scalars(query if all else query.where(RunRow.status.not_in(_FINISHED))).all()
            if not rows and not all:
                rows = session.scalars(query.limit(1)).all()
            return runs_of(session, rows, self._clock.now())

        return [self._directory.told(run) for run in await self._store.read(find)]

    async def logs(self, project: str, run_id: UUID, query: LogQuery) -> LogStream:
        """The output of a run, or the engine's account of it, from a place on. See `LogQuery`.

        Raises:
            ServerClientError: it has no such replica.
        """
        await self._check_known(project, run_id)
        if query.replica_num:
            await self._store.read(lambda session: _check_replica(session, run_id, query.replica_num))
        if query.diagnose:
            return await self._output.account(run_id, query)
        return await self._output.stream(run_id, query)

    async def metrics(self, project: str, run_id: UUID) -> JobMetrics:
        """What the run's job uses now.

        Raises:
            ServerClientError: it does not run now.
        """
        await self._check_known(project, run_id)
        for job_id in await self._store.read(lambda session: _job_ids(session, run_id)):
            live = self._jobs.session_of(job_id)
            if live is not None:
                return await live.metrics()
        raise ServerClientError("The run does not run now, so there is nothing to measure.")

    async def note_activity(self, project: str, run_id: UUID) -> None:
        """Somebody is at work with the run: a dev environment is not idle. Of a run that does not run nothing is asked.

        Raises:
            NotFoundError: there is no such run.
        """
        await self._check_known(project, run_id)
        for job_id in await self._store.read(lambda session: _active_job_ids(session, run_id)):
            await self._jobs.note_activity(job_id)

    # -- ending --------------------------------------------------------------------------------------------------

    async def stop(self, project: str, request: StopRunsRequest) -> None:
        """Has runs stopped. Of those that have ended already nothing is asked; an abort overtakes a stop.

        Raises:
            NotFoundError: one of them does not exist; none is stopped then.
        """
        wanted = "abort" if request.abort else "stop"

        def write(session: Session) -> Sequence[tuple[UUID, Sequence[UUID]]]:
            project_id = self._projects.id_of(session, project)
            rows = _runs(session, project_id, project, request.runs_names, request.run_ids)
            return [(row.id, self._stop(session, row, wanted)) for row in rows]

        for run_id, job_ids in await self._store.transact(write, ahead=True, quick=True):
            self._wakeups.changed(run_id)
            for job_id in job_ids:
                self._wakeups.wake("job", job_id)

    def _stop(self, session: Session, run: RunRow, wanted: str) -> Sequence[UUID]:
        if RunStatus(run.status).is_finished or run.stop in (wanted, "abort"):
            return []
        now = self._clock.now()
        told = ask_to_stop(session, run.id, wanted, now)
        # Jobs first, then their run: the order in which the reconciler locks them.
        run.stop, run.version = wanted, run.version + 1
        journal.note(session, run.id, None, now, f"{wanted} asked for")
        return told

    async def delete(self, project: str, names: Sequence[str]) -> None:
        """Deletes finished runs and their output.

        Raises:
            NotFoundError: one of them does not exist.
            ServerClientError: one of them is active. Nothing is deleted then.
        """

        def write(session: Session) -> list[UUID]:
            rows = _runs(session, self._projects.id_of(session, project), project, names, ())
            active = [row.name for row in rows if not RunStatus(row.status).is_finished]
            if active:
                raise ServerClientError(f"Cannot delete active runs: {', '.join(active)}. Stop them first.")
            for row in rows:
                row.deleted_at = self._clock.now()
            return [job for row in rows for job in _job_ids(session, row.id)]

        for job_id in await self._store.transact(write, ahead=True):
            await self._logs.delete(job_id)

    async def is_idle(self) -> bool:
        """True when no run is active and every instance is confirmed gone."""

        def look(session: Session) -> bool:
            active = session.scalars(select(RunRow.id).where(RunRow.status.not_in(_FINISHED)).limit(1)).first()
            final = [status.value for status in InstanceStatus if status.is_final]
            alive = session.scalars(select(InstanceRow.id).where(InstanceRow.status.not_in(final)).limit(1)).first()
            return active is None and alive is None and not open_orphans(session)

        return await self._store.read(look)


def _live_run(session: Session, project_id: UUID, name: str) -> RunRow | None:
    return session.scalars(_LIVE, {"project_id": project_id, "name": name}).one_or_none()


def _runs(session: Session, project_id: UUID, project: str, names: Sequence[str], ids: Sequence[UUID]) -> list[RunRow]:
    """The named runs, locked, in the order of their ids so that two servers do not wait for each other."""
    found: dict[UUID, RunRow] = {}
    for name in names:
        row = _live_run(session, project_id, name)
        if row is None:
            raise NotFoundError(f"There is no run '{name}' in project '{project}'.")
        found[row.id] = row
    for run_id in ids:
        row = session.get(RunRow, run_id)
        if row is None or row.project_id != project_id:
            raise NotFoundError(f"There is no run '{run_id}' in project '{project}'.")
        found[row.id] = row
    return [found[key] for key in sorted(found)]


def _check_replica(session: Session, run_id: UUID, number: int) -> None:
    numbers = sorted(set(session.scalars(select(JobRow.replica_num).where(JobRow.run_id == run_id))))
    if number not in numbers:
        there = f"0 to {numbers[-1]}" if len(numbers) > 1 else "0 alone"
        raise ServerClientError(f"The run has no replica {number}: there is {there}.")


def _active_job_ids(session: Session, run_id: UUID) -> list[UUID]:
    return list(session.scalars(select(JobRow.id).where(JobRow.run_id == run_id, JobRow.status.not_in(_FINISHED))))


def _job_ids(session: Session, run_id: UUID) -> list[UUID]:
    return list(session.scalars(select(JobRow.id).where(JobRow.run_id == run_id).order_by(JobRow.attempt)))
