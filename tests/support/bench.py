"""A test bench for the engine: the real handlers on a real store, with a clock that only the test moves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from sqlalchemy.orm import Session

from dstack_core._engine.booting import Booter
from dstack_core._engine.instances import InstanceHandler
from dstack_core._engine.intents import IntentFor, render_intent
from dstack_core._engine.jobs import look_at_job
from dstack_core._engine.journal import Wakeups
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.leases import Lease, take_due, wake
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.seams import Seams
from dstack_core._engine.shortages import Shortages
from dstack_core._engine.sweeper import Round, Sweeper
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import Endpoint
from dstack_core._store import records
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow
from dstack_core._transport import AgentHealth, AgentUnreachable, Said
from dstack_core._transport.agent_protocol import PROTOCOL
from tests.support.cloud import ScriptedCloud, hub_of

T = TypeVar("T")
OWNER = UUID("01890000-0000-7000-8000-000000000001")


class ManualClock:
    """Time stands still until a test (or a sleep) moves it."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.yields = False

    def now(self) -> datetime:
        """The time."""
        return self.time

    async def sleep(self, seconds: float) -> None:
        """Moves the time; nobody waits. With `yields`, others have a moment of real time to do something."""
        await asyncio.sleep(0.02 if self.yields else 0)
        self.time += timedelta(seconds=seconds)

    async def wait_for(self, awaitable: Awaitable[T], timeout: float) -> T:
        """Waits for the result in real time, since what is waited for is real."""
        return await asyncio.wait_for(awaitable, timeout)


class ClockIds:
    """UUIDs of version 7, whose time is that of a clock."""

    def __init__(self, clock: ManualClock, rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._last = 0

    def uuid7(self) -> UUID:
        """One that is made now, and sorts after those before."""
        return self.uuid7_at(self._clock.now())

    def uuid7_at(self, when: datetime) -> UUID:
        """One that was made then."""
        stamp = (int(when.timestamp() * 1000) << 16) | 0x7000
        self._last = max(stamp, self._last + 1)
        return UUID(int=(self._last << 64) | (0b10 << 62) | self._rng.getrandbits(62))


class ScriptedTransport:
    """Agents that answer, or do not, as a test says, and are of the instance that it says."""

    def __init__(self) -> None:
        self.answering = True
        self.instance: str | None = None
        self.renewals: list[float] = []

    def connect(self, endpoint: Endpoint) -> ScriptedTransport:
        """One connection serves all."""
        return self

    async def health(self) -> AgentHealth:
        """Answers, or not."""
        if not self.answering:
            raise AgentUnreachable("scripted silence")
        return AgentHealth("scripted", PROTOCOL, 1, 1, (), None, self.instance)

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """No machine answers over SSH."""
        raise AgentUnreachable("scripted silence")

    async def renew_lease(self, seconds: float) -> None:
        """Answers, or not, and counts."""
        await self.health()
        self.renewals.append(seconds)

    async def aclose(self) -> None:
        """Nothing to close."""


@dataclass
class Bench:
    """One instance handler and the cloud it talks to. `restart` is a crash: all memory is lost, the store is not."""

    store: Store
    cloud: ScriptedCloud
    facts: dict[str, object] = field(default_factory=dict)
    clock: ManualClock = field(default_factory=ManualClock)
    transport: ScriptedTransport = field(default_factory=ScriptedTransport)
    server: int = 0
    report_only: bool = False

    def __post_init__(self) -> None:
        rng = random.Random(7)
        self.ids = ClockIds(self.clock, rng)
        self.seams = Seams(clock=self.clock, rng=rng, ids=self.ids)
        self.cloud.now = self.clock.now
        self.restart()

    def restart(self) -> None:
        """Another server process on the same store and cloud."""
        self.server += 1
        self.hub = hub_of(self.cloud, **self.facts)
        wakeups = Wakeups(f"server {self.server}")
        self.shortages = Shortages(self.clock, self.store, alone=False)
        self.handler = InstanceHandler(
            self.seams,
            self.store,
            self.hub,
            self.transport,  # type: ignore[arg-type]  # a double of the seam
            wakeups,
            self.shortages,
            look_at_job,
            Booter(self.clock, self.transport, Path("/agent.pyz")),  # type: ignore[arg-type]  # a double of the seam
        )
        self.sweeper = Sweeper(self.seams, self.store, self.hub, wakeups, OWNER, report_only=self.report_only)

    async def intend(self, keyring: Keyring | None = None) -> UUID:
        """Writes an intent for the cloud's first offer; with a keyring, for a machine that boots."""
        whom = IntentFor(UUID(int=1), UUID(int=2), "run", "main", 3600)
        intent = render_intent(self.seams, OWNER, whom, self.cloud.offers[0], Path("/agent.pyz"), keyring=keyring)
        values = {**intent.values(self.clock.now()), "job_id": None, "run_id": None}
        await self.store.transact(lambda session: records.add(session, InstanceRow, values))
        return intent.id

    async def take(self) -> Lease | None:
        """Takes the instance if it is due."""
        now, name = self.clock.now(), f"server {self.server}"
        leases = await self.store.transact(lambda session: take_due(session, "instance", name, now, LEASE, 1))
        return leases[0] if leases else None

    async def turn(self) -> bool:
        """Works on what is due until it is given back. False if nothing was due."""
        lease = await self.take()
        if lease is None:
            return False
        while await self.handler.advance(lease, asyncio.Event()):
            pass
        return True

    async def look(self, intent: UUID) -> None:
        """Works on one instance now, due or not."""
        await self.store.transact(lambda session: wake(session, "instance", intent, self.clock.now()))
        await self.turn()

    async def run(self, seconds: float, step: float = 1.0) -> None:
        """Lets time pass, working on what becomes due."""
        end = self.clock.now() + timedelta(seconds=seconds)
        while self.clock.now() < end:
            await self.turn()
            await self.clock.sleep(step)

    async def sweep(self, rounds: int = 1, pause: float = 120.0) -> Round | None:
        """Makes rounds of the sweeper, with time between them; what the last one came to."""
        found = None
        for _ in range(rounds):
            found = await self.sweeper.sweep("sim")
            await self.clock.sleep(pause)
        return found

    async def row(self, intent: UUID) -> InstanceRow:
        """The instance's row as it is now."""

        def read(session: Session) -> InstanceRow:
            row = session.get_one(InstanceRow, intent)
            session.expunge(row)
            return row

        return await self.store.read(read)

    async def status(self, intent: UUID) -> InstanceStatus:
        """The instance's status as it is now."""
        return InstanceStatus((await self.row(intent)).status)

    async def unwant(self, intent: UUID) -> None:
        """Nobody needs the instance any more."""

        def write(session: Session) -> None:
            session.get_one(InstanceRow, intent).wanted = False
            session.flush()
            wake(session, "instance", intent, self.clock.now())

        await self.store.transact(write)
