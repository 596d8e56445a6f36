"""Copying a job's output from a real agent when the log store refuses: the job and its run go on to their end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from dstack_core._engine.seams import real_seams
from dstack_core._engine.session import JobSession
from dstack_core._models.configurations import Task
from dstack_core._models.instances import Endpoint
from dstack_core._models.runs import RunStatus
from dstack_core._store.logs import LogStore, LogStoreFull
from dstack_core._store.store import Store
from dstack_core._transport import AgentState, AgentStatus, LogChunk
from tests.engine.test_engine import Server
from tests.support.cloud import ScriptedCloud

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="dse-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def server(store: Store, folder: Path) -> AsyncIterator[Server]:
    """A running engine whose cloud starts real agents."""
    cloud = ScriptedCloud(agents=folder / "agents")
    server = Server(store, cloud, folder)
    await server.engine.start()
    yield server
    await server.engine.stop()
    await server.logs.aclose()
    await asyncio.to_thread(cloud.close)


async def test_no_room_for_the_mark_of_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for the output but not for the mark that it is complete: the run ends, and all is read."""

    async def full(_: LogStore, job_id: UUID | str) -> None:
        raise LogStoreFull(f"No room for the log of job {job_id}. Free some space.")

    monkeypatch.setattr(LogStore, "close_job", full)
    run = await server.submit(Task(commands=["echo all"]))
    assert (await server.end(run)).status is RunStatus.DONE
    assert await server.output(run) == b"all\n"


async def test_a_log_that_another_server_has_closed(server: Server, folder: Path) -> None:
    """Another server gave up the output and marked it as complete: the run ends, and what is lost is counted."""
    go = folder / "go"
    task = Task(commands=["echo one", "while [ ! -e $GO ]; do sleep 0.02; done", "echo two"], env={"GO": str(go)})
    run = await server.submit(task)
    run = await server.until(run, lambda seen: seen.status is RunStatus.RUNNING)
    job = run.jobs[0].job_submissions[-1]
    async with asyncio.timeout(60):
        await server.logs.wait(job.id, 0, 60)
    await server.logs.close_job(job.id)
    go.touch()
    run = await server.end(run)
    assert run.status is RunStatus.DONE
    assert await server.output(run) == b"one\n"
    assert run.jobs[0].job_submissions[-1].log_lost_bytes == len(b"two\n")


async def test_output_that_flows_and_pauses_is_copied_whole(server: Server) -> None:
    """Trickles, bursts and silence one after the other: a reader who follows gets every byte, in order."""
    script = "for i in $(seq 300); do echo $i; done; sleep 0.1; head -c 3000000 /dev/zero; sleep 0.05; echo end"
    run = await server.submit(Task(commands=[script]))
    expected = b"".join(b"%d\n" % number for number in range(1, 301)) + bytes(3_000_000) + b"end\n"
    assert await server.output(run) == expected


def said(seq: int, status: AgentStatus) -> AgentState:
    """The agent's word on a job."""
    return AgentState(
        id="1",
        seq=seq,
        status=status,
        exit_code=None,
        reason=None,
        message=None,
        started_at=None,
        running_at=None,
        finished_at=None,
        log_bytes=0,
        log_lost_bytes=0,
        ports={},
        oom=False,
    )


class SlowToStop:
    """An agent whose answer to a stop is read after the job's end was: both were under way at the same time."""

    def __init__(self) -> None:
        self.told = asyncio.Event()

    def connect(self, _: Endpoint) -> SlowToStop:
        """One for all."""
        return self

    async def job_state(self, _: str, **__: float) -> AgentState:
        """The end."""
        self.told.set()
        return said(2, "exited")

    async def stop_job(self, *_: object) -> AgentState:
        """What was true when the stop came."""
        await self.told.wait()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return said(1, "running")

    async def read_log(self, *_: object, **__: float) -> LogChunk:
        """Nothing was printed."""
        return LogChunk(0, b"", (), end=True)

    async def renew_lease(self, _: float) -> None:
        """As long as you want."""

    async def aclose(self) -> None:
        """Nothing to close."""


async def test_a_late_answer_does_not_hide_the_end(tmp_path: Path) -> None:
    """The answer to the stop says that the job runs, but is older than what is known already: the job has ended."""
    logs = LogStore(tmp_path)
    session = JobSession(real_seams(), SlowToStop(), logs, UUID(int=1), Endpoint())  # type: ignore[arg-type]  # a double of the seam
    await session.begin()
    await session.stop(1)
    assert session.state == said(2, "exited")
    assert session.in_trouble()
    await session.close()
    await logs.aclose()


class SlowConnection(SlowToStop):
    """An agent whose long-polls take their time to be cancelled; it counts what was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0

    def connect(self, _: Endpoint) -> SlowConnection:
        """One for all."""
        return self

    async def job_state(self, _: str, **__: float) -> AgentState:
        """Not while anybody waits."""
        try:
            await asyncio.Event().wait()
        finally:
            for _round in range(5):
                await asyncio.sleep(0)
        return said(1, "running")

    async def aclose(self) -> None:
        """One more."""
        self.closed += 1


async def test_a_server_that_stops_while_a_session_is_closed_leaves_no_connection(tmp_path: Path) -> None:
    """Nobody knows the session any more, so its connections are closed whatever happens meanwhile."""
    logs, agent = LogStore(tmp_path), SlowConnection()
    session = JobSession(real_seams(), agent, logs, UUID(int=1), Endpoint())  # type: ignore[arg-type]  # a double of the seam
    await session.begin()
    await asyncio.sleep(0)
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert agent.closed == 2
    await logs.aclose()
