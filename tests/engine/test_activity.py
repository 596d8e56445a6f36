"""That somebody is at work with a run reaches its agent, through whichever server hears of it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from dstack_core._models.configurations import DevEnvironment, Task
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import Reason, Run, RunSpec, RunStatus
from dstack_core._models.wire import GetRunRequest
from dstack_core._store.store import Store
from dstack_core.errors import NotFoundError
from tests.engine.test_engine import Server
from tests.support.cloud import ScriptedCloud

pytestmark = pytest.mark.anyio

LIMIT = 3


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


async def submitted(server: Server) -> Run:
    """A dev environment that runs."""
    spec = RunSpec(configuration=DevEnvironment(inactivity_duration=LIMIT), profile=Profile())
    run = await server.engine.service.submit("main", "me", spec, uuid4())
    return await server.until(run, lambda seen: seen.status is RunStatus.RUNNING)


async def kept_by(server: Server, run: Run, words: int) -> Run:
    """The run after so many words to this server, half a second apart."""
    for _ in range(words):
        await server.engine.service.note_activity("main", run.id)
        request = GetRunRequest(run_id=run.id, after_version=run.version, wait=0.5)
        run = await server.engine.service.get("main", request)
    return run


async def test_the_server_that_follows_the_run(server: Server) -> None:
    """Its agent hears of it; without another word the run ends, with a reason and a cure."""
    run = await kept_by(server, await submitted(server), 4 * LIMIT)
    assert run.status is RunStatus.RUNNING
    run = await server.end(run)
    assert (run.status, run.reason) == (RunStatus.TERMINATED, Reason.INACTIVE)
    assert "a longer inactivity_duration, or 'off', keeps it longer" in (run.message or "")


async def test_another_server_of_the_same_database(server: Server, store: Store, folder: Path) -> None:
    """It does not follow the run, and passes the word on all the same."""
    (folder / "other").mkdir()
    other = Server(store, server.cloud, folder / "other", alone=False)
    run = await submitted(server)
    await other.engine.start()
    assert (await kept_by(other, run, 4 * LIMIT)).status is RunStatus.RUNNING
    await server.stop(run, abort=True)
    await server.end(run)
    await other.engine.stop()
    await other.logs.aclose()


async def test_a_run_that_does_not_run(server: Server) -> None:
    """One that has ended asks for nothing; one that there never was is refused."""
    run = await server.submit(Task(commands=["true"]))
    await server.end(run)
    await server.engine.service.note_activity("main", run.id)
    with pytest.raises(NotFoundError):
        await server.engine.service.note_activity("main", UUID(int=7))


async def test_an_agent_that_is_gone(server: Server) -> None:
    """Nobody who is attached hears of it; that the run is lost is found out elsewhere."""
    run = await submitted(server)
    await asyncio.to_thread(server.cloud.close)
    await server.engine.service.note_activity("main", run.id)
    await server.stop(run, abort=True)
    await server.end(run)
