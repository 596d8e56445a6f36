"""The real engine with many running instances of a simulated cloud: how late it comes to what is due.

Everything runs in this process and in real time: engine, database, cloud, and the agents, which answer at once.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine.engine import Engine
from dstack_core._engine.leases import next_due
from dstack_core._engine.seams import real_seams
from dstack_core._hookspecs import hookimpl
from dstack_core._models.configurations import Task
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import RunSpec, RunStatus
from dstack_core._store.code import CodeStore
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.tables import JobRow, RunRow
from dstack_core._store.vault import Vault
from dstack_core._transport import AgentJobSpec
from dstack_core.testing import Script, SimClock, SimCloud
from tests.sim.agents import Network

_LOOK = 0.05
SHORT = "BENCH_SHORT"
_RUNNING = select(func.count()).select_from(JobRow).where(JobRow.status == "running")


class RealClock(SimClock):
    """The cloud's clock: this computer's."""

    def time(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()


class _EntryPoint:
    name, value, dist = "sim", "dstack_core.testing.simcloud", None

    def __init__(self, cloud: SimCloud) -> None:
        self.dstack_register_backends = hookimpl(lambda: [cloud.info()])

    def load(self) -> object:
        """The plugin."""
        return self


def script(_job: str, spec: AgentJobSpec) -> Script:
    """What a job does: a line every ten seconds, or it ends at once."""
    return Script(seconds=0.0, lines=1, prepares=0.0) if SHORT in spec.env else Script(seconds=1e6, lines=100_000)


class Bench:
    """One server and its cloud."""

    def __init__(self, folder: Path, count: int) -> None:
        self.count = count
        self.cloud = SimCloud(RealClock(), seed=1, key="bench", page_size=1000, script_of=script)
        self.store = Store.open(path=folder / "server.db")
        self.seams = real_seams()
        self.engine = Engine(
            seams=self.seams,
            store=self.store,
            logs=LogStore(folder / "logs"),
            code=CodeStore(folder / "code"),
            vault=Vault(folder / "secret.key"),
            backends=BackendHub.discover(entry_points=lambda **_: [_EntryPoint(self.cloud)]),
            transport=Network(self.cloud, random.Random(1)),  # noqa: S311  # no secret is made of it
            agent_pyz=Path("/agent.pyz"),
            lease_owner="bench",
            alone=True,
        )

    async def submit(self, name: str, **env: str) -> UUID:
        """One run; for ever, unless it is short."""
        task = Task(commands=["work"], env=env)
        spec = RunSpec(run_name=name, configuration=task, profile=Profile())
        return (await self.engine.service.submit("main", "me", spec, uuid4())).id

    async def all_run(self) -> None:
        """Waits until every run has its instance, and its job runs."""
        deadline = time.monotonic() + 300
        while (running := await self.store.read(lambda session: session.scalar(_RUNNING))) != self.count:
            if time.monotonic() > deadline:
                sys.exit(f"{running} of {self.count} jobs run after 300 s")
            await asyncio.sleep(0.2)

    async def watch(self, seconds: float) -> tuple[list[float], list[float]]:
        """Again and again: how long the row that has waited longest is due, and how late the event loop is."""
        overdue, late, end = [], [], time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            await asyncio.sleep(_LOOK)
            late.append(time.monotonic() - begin - _LOOK)
            overdue.append(await self.store.read(self._overdue, quick=True))
        return overdue, late

    async def short_ones(self, seconds: float) -> list[float]:
        """One run each half second that has nothing to do: how long each takes, from before its submit to its end."""
        took: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            run = await self.submit(f"short-{len(took)}", **{SHORT: "1"})
            while await self.store.read(partial(self._unfinished, run), quick=True):  # noqa: ASYNC110  # as a client looks
                await asyncio.sleep(0.005)
            took.append(time.monotonic() - begin)
            await asyncio.sleep(0.5)
        return took

    def _unfinished(self, run: UUID, session: Session) -> bool:
        return not RunStatus(session.get_one(RunRow, run).status).is_finished

    def _overdue(self, session: Session) -> float:
        due = next_due(session)
        return 0.0 if due is None else max(0.0, (self.seams.clock.now() - due).total_seconds())


async def measure(folder: Path, count: int, seconds: float) -> dict[str, object]:
    """Starts them all, lets the engine have them for a while, and says how late it was."""
    bench = Bench(folder, count)
    await bench.engine.start()
    begin = time.monotonic()
    for number in range(count):
        await bench.submit(f"run-{number}")
    await bench.all_run()
    started, cpu = time.monotonic() - begin, time.process_time()
    (overdue, late), short = await asyncio.gather(bench.watch(seconds), bench.short_ones(seconds))
    share = (time.process_time() - cpu) / seconds
    await bench.engine.stop()
    await bench.store.close()
    return {"overdue": overdue, "late": late, "short": short, "started": started, "cpu": share}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dstack-bench-") as folder:
        print(json.dumps(asyncio.run(measure(Path(folder), int(sys.argv[1]), float(sys.argv[2])))))
