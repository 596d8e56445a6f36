"""The engine of one server process: its parts, put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine.booting import Booter
from dstack_core._engine.code import JobCode
from dstack_core._engine.doctor import Doctor
from dstack_core._engine.instances import InstanceHandler
from dstack_core._engine.intents import ORPHAN_GRACE
from dstack_core._engine.jobs import JobHandler, look_at_job
from dstack_core._engine.journal import Wakeups
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.reconciler import Reconciler
from dstack_core._engine.replicas import Directory
from dstack_core._engine.repos import RepoService
from dstack_core._engine.restoring import Kept, count_start
from dstack_core._engine.seams import Seams
from dstack_core._engine.service import PLAN_TIMEOUT, RunService
from dstack_core._engine.shortages import Shortages
from dstack_core._engine.sweeper import Sweeper
from dstack_core._store.code import CodeStore
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.tables import MetaRow, ProjectRow
from dstack_core._store.vault import Vault
from dstack_core._transport import Transport
from dstack_core._transport.keys import KeyPair
from dstack_core.errors import ConfigurationError

log = logging.getLogger(__name__)

DEFAULT_PROJECT = "main"


def _no_key() -> KeyPair:
    raise ConfigurationError("This server has no SSH key, so no machine could let it in.")


class Engine:
    """Drives all runs of one database, together with the engines of other servers on it.

    Args:
        seams: clock, chance, ids.
        store: the database.
        logs: where output is kept.
        code: where the code of runs is kept.
        vault: encrypts what opens private repos.
        backends: the configured backends.
        transport: how agents are reached.
        agent_pyz: the agent's program, for backends that start processes.
        lease_owner: name of this process in leases; unique among the servers of one database.
        alone: no other server can be on this database; work left behind by a dead one is then taken up at once.
        kept: what is remembered of the database outside of it, so that one which went back in time is found out.
        orphan_grace: seconds for which an agent without a running job stays when no server is heard of.
        server_key: the key that machines let in; without it there can be none that boot.
        report_only: instances that nobody claims are reported, and not ended.
        plan_timeout: seconds for which a plan, or a submit, waits for slow backends.

    Attributes:
        repos: the repos that the projects know.
    """

    def __init__(
        self,
        *,
        seams: Seams,
        store: Store,
        logs: LogStore,
        code: CodeStore,
        vault: Vault,
        backends: BackendHub,
        transport: Transport,
        agent_pyz: Path,
        lease_owner: str,
        alone: bool = False,
        kept: Kept | None = None,
        report_only: bool = False,
        server_key: Callable[[], KeyPair] | None = None,
        orphan_grace: float = ORPHAN_GRACE,
        plan_timeout: float = PLAN_TIMEOUT,
    ) -> None:
        self._seams = seams
        self._store = store
        self._logs = logs
        self._code = code
        self.repos = RepoService(seams, store, vault)
        self._backends = backends
        self._transport = transport
        self._agent_pyz = agent_pyz
        self._lease_owner = lease_owner
        self._alone = alone
        self._kept = kept
        self._report_only = report_only
        self._orphan_grace = orphan_grace
        self._plan_timeout = plan_timeout
        self._keyring = Keyring(seams, server_key or _no_key)
        self._wakeups = Wakeups(lease_owner)
        self._reconciler: Reconciler | None = None
        self._service: RunService | None = None
        self._sweeper: Sweeper | None = None
        self._doctor: Doctor | None = None
        self._directory = Directory(seams, store, logs, transport, self._wakeups)

    @property
    def directory(self) -> Directory:
        """The replicas of services, for whoever sends them traffic. Learns and probes from `start` on."""
        return self._directory

    @property
    def service(self) -> RunService:
        """What clients can ask. Only after `start`."""
        if self._service is None:
            raise RuntimeError("Engine.start() has not been awaited")
        return self._service

    @property
    def doctor(self) -> Doctor:
        """What is wrong, and its cure. Only after `start`."""
        if self._doctor is None:
            raise RuntimeError("Engine.start() has not been awaited")
        return self._doctor

    async def start(self) -> None:
        """Takes up all work that is due."""
        owner = await self._store.transact(self._identity)
        await self._count_start(owner)
        await self._check_key()
        shortages = Shortages(self._seams.clock, self._store, alone=self._alone)
        jobs = JobHandler(
            self._seams,
            self._store,
            self._logs,
            self._backends,
            self._transport,
            self._wakeups,
            owner,
            self._agent_pyz,
            self._directory,
            JobCode(self._store, self._code, self.repos),
            shortages,
            self._keyring,
            self._orphan_grace,
        )
        instances = InstanceHandler(
            self._seams,
            self._store,
            self._backends,
            self._transport,
            self._wakeups,
            shortages,
            look_at_job,
            Booter(self._seams.clock, self._transport, self._agent_pyz),
            self._orphan_grace,
        )
        self._reconciler = Reconciler(self._seams, self._store, self._lease_owner, {"job": jobs, "instance": instances})
        self._wakeups.listen(self._reconciler)
        self._service = RunService(
            self._seams,
            self._store,
            self._logs,
            self._code,
            self._backends,
            jobs,
            self._wakeups,
            self._directory,
            shortages,
            self._plan_timeout,
        )
        self._sweeper = Sweeper(
            self._seams, self._store, self._backends, self._wakeups, owner, report_only=self._report_only
        )
        self._doctor = Doctor(
            self._seams.clock, self._store, self._backends, shortages, owner, report_only=self._report_only
        )
        await self._directory.start()
        await self._reconciler.start(alone=self._alone)
        await self._sweeper.start(alone=self._alone)

    async def stop(self) -> None:
        """Gives all work back. Running jobs go on; the next server finds them."""
        await self._directory.stop()
        if self._sweeper is not None:
            await self._sweeper.stop()
        if self._reconciler is not None:
            await self._reconciler.stop()

    async def is_idle(self) -> bool:
        """True when no run is active and every instance is confirmed gone."""
        return await self.service.is_idle()

    async def _count_start(self, owner: UUID) -> None:
        """Finds out whether the database has seen fewer starts than were seen from here."""
        if self._kept is None:
            return
        seen, now = self._kept.read(owner), self._seams.clock.now()
        starts, alarm = await self._store.transact(lambda session: count_start(session, now, seen))
        self._kept.write(owner, starts)
        if alarm:
            log.critical("%s", alarm)

    async def _check_key(self) -> None:
        """Finds out whether the machines there are let this server in."""
        booting = [name for name in self._backends.reachable() if self._backends.info(name).boots_machines]
        if booting:
            await self._store.transact(lambda session: self._keyring.check(session, booting))

    def _identity(self, session: Session) -> UUID:
        """The owner id of this database, made on first use, together with the default project."""
        owner = session.get(MetaRow, "owner")
        if owner is None:
            owner = MetaRow(key="owner", value=str(self._seams.ids.uuid7()))
            session.add(owner)
        if session.scalars(select(ProjectRow).where(ProjectRow.name == DEFAULT_PROJECT)).one_or_none() is None:
            now = self._seams.clock.now()
            session.add(ProjectRow(id=self._seams.ids.uuid7(), name=DEFAULT_PROJECT, created_at=now))
        return UUID(owner.value)
