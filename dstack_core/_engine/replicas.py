"""The directory of this server's services: which replicas run where, and which of them are ready for traffic.

Every server that serves traffic probes every replica itself: what one server reaches, another may not.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstack_core._engine.journal import Wakeups
from dstack_core._engine.output import last_lines
from dstack_core._engine.probes import Watch, ask
from dstack_core._engine.seams import Clock, Seams
from dstack_core._engine.served import RunningReplica, ServiceFacts, ServiceState, service_versions, services_of
from dstack_core._engine.tasks import end_tasks
from dstack_core._models.runs import Run
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.tables import ProjectRow, RunRow
from dstack_core._transport import Transport
from dstack_core.errors import NotFoundError

log = logging.getLogger(__name__)

SLOW_LOOK = 2.0
"""Seconds between looks for services that other servers of the same database wrote."""
TAIL_EVERY = 1.0
"""Seconds between looks at what a replica that is not ready printed."""
_AFTER_A_BUG = 1.0


class Replica(Protocol):
    """One replica of a service. `key` is the job attempt."""

    @property
    def key(self) -> UUID:
        """Names it in `Directory.suspect`."""

    async def connect(self) -> socket.socket:
        """A connected, non-blocking stream socket to its port.

        Raises:
            AgentUnreachable: there is no way to its machine.
            OSError: nobody listens there, or the connection failed.
        """


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A service at one moment.

    Attributes:
        auth: whether callers need a token.
        strip_prefix: whether the path under which it is published is taken off each request.
        model: name of the model that it offers in OpenAI's protocol; `None` for none.
        model_prefix: path under which it speaks that protocol, as `/v1`.
        ready: the replicas that take traffic.
        problem: what keeps the other replicas from being ready: what was probed, what came of it, since when, and the
            last lines that a replica printed which never was ready. `None` if all is well.
    """

    run_id: UUID
    project: str
    name: str
    auth: bool
    strip_prefix: bool
    model: str | None
    model_prefix: str
    ready: tuple[Replica, ...]
    problem: str | None


class _Probed:
    """A replica that runs, and what its probes say."""

    def __init__(self, clock: Clock, transport: Transport, place: RunningReplica) -> None:
        self._transport = transport
        self.place = place
        self.key = place.job_id
        now = clock.now()
        self.watches = [Watch(config, now) for config in place.probes or (None,)]
        self.was_ready = False
        self.tail = ""
        self.tail_at = now - timedelta(seconds=TAIL_EVERY)
        self.tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> socket.socket:
        """To its port."""
        return await self._transport.open_port(self.place.endpoint, self.place.port)

    @property
    def ready(self) -> bool:
        """All probes are content."""
        return all(watch.good for watch in self.watches)

    def problem(self) -> str | None:
        """Why it is not ready."""
        said = "; ".join(filter(None, (watch.problem(self.place.where) for watch in self.watches)))
        return f"{said}{self.tail}" if said else None

    def stop(self) -> None:
        """Ends its probes."""
        for task in self.tasks:
            task.cancel()


class _Service:
    """A service that has not ended, with the view that was made of it last."""

    def __init__(self, facts: ServiceFacts) -> None:
        self.facts = facts
        self.version = -1
        self.replicas: dict[UUID, _Probed] = {}
        self.others: dict[int, str] = {}
        self.news = asyncio.Event()
        self.view = self._view(())

    def refresh(self) -> None:
        """Makes a new view, and tells who waits for a ready replica if there is one."""
        ordered = sorted(self.replicas.values(), key=lambda one: one.place.number)
        self.view = self._view(tuple(one for one in ordered if one.ready))
        if self.view.ready:
            self.tell()

    def tell(self) -> None:
        """Has everybody who waits look again."""
        self.news.set()
        self.news = asyncio.Event()

    def _view(self, ready: tuple[_Probed, ...]) -> ServiceView:
        facts = self.facts
        return ServiceView(
            run_id=facts.run_id,
            project=facts.project,
            name=facts.name,
            auth=facts.auth,
            strip_prefix=facts.strip_prefix,
            model=facts.model,
            model_prefix=facts.model_prefix,
            ready=ready,
            problem="\n".join(self._problems()) or None,
        )

    def _problems(self) -> Iterable[str]:
        problems = self.others | {
            one.place.number: problem for one in self.replicas.values() if (problem := one.problem())
        }
        return (f"replica {number}: {problem}" for number, problem in sorted(problems.items()))


class Directory:
    """The services that have not ended, and their replicas. One for each server process, which probes them all.

    What this server's engine writes is known at once; what other servers of the same database write, within
    `SLOW_LOOK` seconds. A connection that fails is to be reported with `suspect`.
    """

    def __init__(self, seams: Seams, store: Store, logs: LogStore, transport: Transport, wakeups: Wakeups) -> None:
        self._clock = seams.clock
        self._store = store
        self._logs = logs
        self._transport = transport
        self._wakeups = wakeups
        self._services: dict[UUID, _Service] = {}
        self._by_name: dict[tuple[str, str], UUID] = {}
        self._replicas: dict[UUID, _Probed] = {}
        self._written: set[UUID] = set()
        self._woken = asyncio.Event()
        self._learning = asyncio.Lock()
        self._probing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to probe."""
        self._wakeups.listen_to_services(self._note)
        self._task = asyncio.create_task(self._keep_up(), name="directory of services")

    async def stop(self) -> None:
        """Ends all probes."""
        if self._task is not None:
            await end_tasks([self._task, *self._probing])

    # -- for the proxy -------------------------------------------------------------------------------------------

    async def find(self, project: str, run_name: str) -> ServiceView:
        """The service of that name. Once it is known, this asks nobody.

        Raises:
            NotFoundError: there is no such run, it is no service, or it has ended.
        """
        run_id = self._by_name.get((project, run_name))
        if run_id is None:
            run_id = await self._look_up(project, run_name)
        return self._known(run_id).view

    async def models(self, project: str) -> list[ServiceView]:
        """The services of a project that offer a model."""
        views = (service.view for service in self._services.values())
        return [view for view in views if view.project == project and view.model is not None]

    async def wait_for_ready(self, run_id: UUID, seconds: float) -> ServiceView:
        """The service, as soon as one replica is ready, or after that time.

        Raises:
            NotFoundError: it has ended.
        """
        deadline = self._clock.now() + timedelta(seconds=seconds)
        while not (service := self._known(run_id)).view.ready:
            left = (deadline - self._clock.now()).total_seconds()
            if left <= 0:
                break
            with suppress(TimeoutError):
                await self._clock.wait_for(service.news.wait(), left)
        return service.view

    def suspect(self, run_id: UUID, key: UUID) -> None:
        """A connection to a replica failed: it is left out until a probe says otherwise, and probed at once."""
        service, replica = self._services.get(run_id), self._replicas.get(key)
        if service is None or replica is None:
            return
        for watch in replica.watches:
            watch.doubt(self._clock.now())
        service.refresh()

    # -- for the engine ------------------------------------------------------------------------------------------

    def was_ready(self, job_id: UUID) -> bool:
        """Whether this server has seen that replica ready."""
        replica = self._replicas.get(job_id)
        return replica is not None and replica.was_ready

    def told(self, run: Run) -> Run:
        """A run with what is known here about its replicas, if it is a service."""
        service = self._services.get(run.id)
        if run.service is None or service is None:
            return run
        facts = {"ready": len(service.view.ready), "problem": service.view.problem}
        return run.model_copy(update={"service": run.service.model_copy(update=facts)})

    # -- learning ------------------------------------------------------------------------------------------------

    def _known(self, run_id: UUID) -> _Service:
        service = self._services.get(run_id)
        if service is None:
            raise NotFoundError("The service has ended.")
        return service

    async def _look_up(self, project: str, run_name: str) -> UUID:
        """Learns of a service that this server does not know yet."""
        run_id = await self._store.read(partial(_id_of, project=project, run_name=run_name))
        if run_id is None:
            raise NotFoundError(f"There is no run '{run_name}' in project '{project}'.")
        await self._learn({run_id})
        if run_id not in self._services:
            raise NotFoundError(f"The run '{run_name}' in project '{project}' is no service, or it has ended.")
        return run_id

    def _note(self, run_id: UUID) -> None:
        self._written.add(run_id)
        self._woken.set()

    async def _keep_up(self) -> None:
        """Learns of what was written here at once, and of everything else in slow rounds."""
        due = self._clock.now()
        while True:
            self._woken.clear()
            written, self._written = self._written, set()
            try:
                if self._clock.now() >= due:
                    written |= self._changed(await self._store.read(service_versions))
                    due = self._clock.now() + timedelta(seconds=SLOW_LOOK)
                await self._learn(written)
            except Exception:
                log.exception("Cannot read which services there are; trying again")
                self._written |= written
                await self._clock.sleep(_AFTER_A_BUG)
            with suppress(TimeoutError):
                left = (due - self._clock.now()).total_seconds()
                await self._clock.wait_for(self._woken.wait(), max(0.0, left))

    def _changed(self, versions: Mapping[UUID, int]) -> set[UUID]:
        """The services that are new, have another version than was seen last, or are gone."""
        known = {run_id: service.version for run_id, service in self._services.items()}
        return {run_id for run_id in known.keys() | versions.keys() if known.get(run_id) != versions.get(run_id)}

    async def _learn(self, run_ids: Collection[UUID]) -> None:
        """Reads how these runs stand. One reading after the other, so that none undoes a later one."""
        if not run_ids:
            return
        async with self._learning:
            found = await self._store.read(partial(services_of, run_ids=run_ids))
            for run_id in run_ids:
                self._take(run_id, found.get(run_id))

    def _take(self, run_id: UUID, state: ServiceState | None) -> None:
        if state is None:
            self._drop(run_id)
            return
        service = self._services.get(run_id)
        if service is None:
            service = self._services[run_id] = _Service(state.facts)
            self._by_name[state.facts.project, state.facts.name] = run_id
        service.version, service.others = state.version, dict(state.others)
        running = {one.job_id: one for one in state.running}
        for key, replica in list(service.replicas.items()):
            if not _same_place(replica.place, running.get(key)):
                self._remove(service, replica)
        for key, place in running.items():
            if key not in service.replicas:
                self._add(service, place)
        service.refresh()

    def _drop(self, run_id: UUID) -> None:
        service = self._services.pop(run_id, None)
        if service is None:
            return
        name = (service.facts.project, service.facts.name)
        if self._by_name.get(name) == run_id:
            del self._by_name[name]
        for replica in list(service.replicas.values()):
            self._remove(service, replica)
        service.refresh()
        service.tell()

    def _remove(self, service: _Service, replica: _Probed) -> None:
        del service.replicas[replica.key], self._replicas[replica.key]
        replica.stop()

    def _add(self, service: _Service, place: RunningReplica) -> None:
        replica = _Probed(self._clock, self._transport, place)
        service.replicas[replica.key] = self._replicas[replica.key] = replica
        for watch in replica.watches:
            task = asyncio.create_task(self._probe(service, replica, watch), name=f"probe {place.job_id}")
            replica.tasks.append(task)
            self._probing.add(task)
            task.add_done_callback(self._probing.discard)

    # -- probing -------------------------------------------------------------------------------------------------

    async def _probe(self, service: _Service, replica: _Probed, watch: Watch) -> None:
        """Probes for as long as the replica runs."""
        while True:
            watch.asked.clear()
            doubts = watch.doubts
            answer = await ask(self._clock, replica.connect, watch.config)
            if watch.doubts == doubts:
                watch.take(answer, self._clock.now())
            await self._tell(service, replica)
            with suppress(TimeoutError):
                await self._clock.wait_for(watch.asked.wait(), watch.pause(self._clock.now()))

    async def _tell(self, service: _Service, replica: _Probed) -> None:
        """Makes the outcome of a probe known."""
        if replica.ready and not replica.was_ready:
            replica.was_ready, replica.tail = True, ""
            if not replica.place.proven:
                # Whoever holds the lease writes it down.
                self._wakeups.wake("job", replica.key)
        elif not replica.was_ready:
            await self._read_tail(replica)
        if service.replicas.get(replica.key) is replica:
            service.refresh()

    async def _read_tail(self, replica: _Probed) -> None:
        now = self._clock.now()
        if (now - replica.tail_at).total_seconds() < TAIL_EVERY:
            return
        replica.tail_at = now
        try:
            said = await last_lines(self._logs, replica.key)
        except OSError as error:
            said = f"  (its output cannot be read: {error})"
        replica.tail = f". It printed last:\n{said}" if said else ". It printed nothing."


def _same_place(one: RunningReplica, other: RunningReplica | None) -> bool:
    return other is not None and (one.endpoint, one.port) == (other.endpoint, other.port)


def _id_of(session: Session, project: str, run_name: str) -> UUID | None:
    return session.scalars(
        select(RunRow.id)
        .join(ProjectRow, ProjectRow.id == RunRow.project_id)
        .where(ProjectRow.name == project, RunRow.name == run_name, RunRow.deleted_at.is_(None))
    ).one_or_none()
