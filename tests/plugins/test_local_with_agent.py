"""The local backend with the real agent: what the two agree on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from dstack_local._processes import processes_of

from dstack_core._backends import BackendHub
from dstack_core._models.instances import Endpoint
from dstack_core._transport import (
    AgentConnection,
    AgentJobSpec,
    AgentUnreachable,
    LocalTransport,
    agent_command,
    build_agent,
)
from dstack_core.plugin import Instance, InstanceRequest, InstanceState, Requirements
from dstack_core.testing import wait_until
from tests.support.toys import Point

pytestmark = pytest.mark.anyio

OWNER = UUID("00000000-0000-7000-8000-000000000003")


class Local:
    """A hub with the local backend, and its instances with real agents."""

    def __init__(self, home: Path) -> None:
        import dstack_local

        self.hub = BackendHub.discover(entry_points=lambda **_: [Point("local", dstack_local)])
        self.home = home
        self.command = agent_command(build_agent(home))
        self.transport = LocalTransport()

    async def request(self) -> InstanceRequest:
        """A request for an instance that asks for nothing."""
        (listing,) = await self.hub.list_offers(Requirements(), timeout=30)
        return InstanceRequest(
            intent=uuid4(),
            owner=OWNER,
            name=f"t-{uuid4().hex[:12]}",
            token="0" * 64,
            request_id=uuid4(),
            offer=next(iter(listing.offers)),
            tags={},
            agent_command=self.command,
        )

    async def reached(self, instance: Instance) -> AgentConnection:
        """A connection to its agent, as soon as there is an answer."""
        endpoint = await self.hub.connect(instance)
        assert isinstance(endpoint, Endpoint)
        connection = self.transport.connect(endpoint)
        deadline = time.monotonic() + 60
        while True:
            try:
                await connection.health()
            except AgentUnreachable:
                assert time.monotonic() < deadline
            else:
                return connection

    async def state(self, instance: Instance) -> InstanceState:
        """What the backend says now."""
        known = await self.hub.get_instance(instance.ref)
        assert known is not None
        return known.state

    async def end(self, instance: Instance) -> None:
        """Terminates until it is gone, and nothing of it is left."""
        deadline = time.monotonic() + 60
        while await self.state(instance) is not InstanceState.TERMINATED or not deadline:
            assert time.monotonic() < deadline
            await self.hub.terminate_instance(instance.ref)
        assert processes_of(instance.ref.id) == set()


@pytest.fixture
async def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Local]:
    """In a home of its own; everything it started is ended."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path))
    local = Local(tmp_path)
    yield local
    for instance in await local.hub.list_instances("local", OWNER):
        await local.hub.terminate_instance(instance.ref)
        await local.end(instance)


async def test_an_instance_is_reached_and_ended(local: Local) -> None:
    """Its agent answers at the endpoint, and terminate takes it and its job away."""
    request = await local.request()
    instance = await local.hub.create_instance("local", request)
    connection = await local.reached(instance)
    assert await local.state(instance) is InstanceState.RUNNING
    await connection.put_job("job", AgentJobSpec(argv=(sys.executable, "-c", "import time; time.sleep(600)")))
    await connection.aclose()
    await local.hub.terminate_instance(instance.ref)
    await local.end(instance)
    assert not (local.home / "local" / request.name).exists()
    assert (await local.hub.create_instance("local", request)).state is InstanceState.TERMINATED


def said(file: Path) -> str:
    """What a file holds; nothing if it is not there yet."""
    return file.read_text().strip() if file.exists() else ""


def is_running(pid: str) -> bool:
    """Whether a process is there and is no zombie."""
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def test_agent_and_watchdog_killed_together_leave_nothing(local: Local) -> None:
    """The job has nobody any more who looks after it: the backend finds it by its mark."""
    instance = await local.hub.create_instance("local", await local.request())
    connection = await local.reached(instance)
    health = await connection.health()
    await connection.put_job("job", AgentJobSpec(argv=("/bin/sh", "-c", "echo $$ > pid; exec sleep 600")))
    pid_file = local.home / "local" / instance.ref.id / "job" / "pid"
    job = wait_until(lambda: said(pid_file), what="the job to run")
    await connection.aclose()
    for pid in (health.watchdog_pid, health.pid):
        os.kill(pid, signal.SIGSTOP)
    for pid in (health.watchdog_pid, health.pid):
        os.kill(pid, signal.SIGKILL)
    await local.hub.terminate_instance(instance.ref)
    await local.end(instance)
    wait_until(lambda: not is_running(job), what="the job to end")


async def test_replays_while_the_agent_starts_make_one(local: Local) -> None:
    """Agents that come too late see the lock and leave."""
    request = await local.request()
    for _ in range(4):
        await local.hub.create_instance("local", request)
    instance = await local.hub.create_instance("local", request)
    connection = await local.reached(instance)
    health = await connection.health()
    await connection.aclose()
    wait_until(lambda: processes_of(request.name) == {health.pid, health.watchdog_pid}, what="the late agents to leave")
