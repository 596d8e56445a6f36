"""The server's side of the protocol, against real agents and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dstack_core._models.instances import Endpoint
from dstack_core._transport import (
    AgentConnection,
    AgentJobSpec,
    AgentRefused,
    AgentUnreachable,
    LocalTransport,
    Transport,
)
from tests.support.real_agents import LONG, RealAgent, StartAgent

pytestmark = pytest.mark.anyio


@pytest.fixture
def agent(start_agent: StartAgent) -> RealAgent:
    """One running agent."""
    return start_agent()


@pytest.fixture
async def connection(agent: RealAgent) -> AsyncIterator[AgentConnection]:
    """A connection to it."""
    transport: Transport = LocalTransport()
    connection = transport.connect(at(agent.directory))
    yield connection
    await connection.aclose()


def at(directory: Path) -> Endpoint:
    """The agent of this directory."""
    return Endpoint(unix_socket=directory / "agent.sock")


def script(text: str, **fields: Any) -> AgentJobSpec:
    """A job that runs this with the shell."""
    return AgentJobSpec(**{"shell": text, **fields})


async def test_a_whole_life(connection: AgentConnection, agent: RealAgent) -> None:
    """Health, job, output, state, metrics, stop, lease, shutdown: everything comes back typed."""
    assert (await connection.health()).pid == agent.pid
    before = datetime.now(UTC)
    spec = script("echo $A; sleep 600", env={"A": "b"}, ports=(8000,), stop_grace=1)
    state = await connection.put_job("job", spec)
    assert (state.id, state.status, state.ports) == ("job", "running", {8000: 8000})
    assert state.started_at is not None
    assert state.started_at >= before
    chunk = await connection.read_log("job", 0, wait=LONG)
    assert (chunk.offset, chunk.data, chunk.end) == (0, b"b\n", False)
    assert chunk.index[0][0] == 0
    assert abs(chunk.index[0][1] / 1e6 - time.time()) < LONG
    assert (await connection.metrics("job")).processes >= 1
    await connection.stop_job("job", 0)
    while not state.is_finished:
        state = await connection.job_state("job", after=state.seq, wait=LONG)
    assert (state.reason, state.exit_code) == ("stopped", 137)
    assert (await connection.read_log("job", 2)).end
    await connection.renew_lease(3600)
    expires = (await connection.health()).lease_expires_at
    assert expires is not None
    assert expires > before
    await connection.shutdown()


async def test_the_whole_spec_arrives(connection: AgentConnection, agent: RealAgent) -> None:
    """Every field of `AgentJobSpec` is known to the agent: none is dropped on the way."""
    from dstack_core._transport.archive import SOURCES

    known = (SOURCES / "spec.py").read_text()
    for name in AgentJobSpec(argv=("true",)).document():
        assert f'"{name}"' in known


async def test_no_agent_there_yet(tmp_path: Path) -> None:
    """Said at once, with the path; nothing is waited for."""
    connection = LocalTransport().connect(at(tmp_path))
    with pytest.raises(AgentUnreachable, match=str(tmp_path)):
        await connection.health()


async def test_an_agent_that_comes_later(tmp_path: Path, start_agent: StartAgent) -> None:
    """The same connection works once it is there."""
    place = tmp_path / "later"
    place.mkdir()
    connection = LocalTransport().connect(Endpoint(unix_socket=place / "agent.sock"))
    with pytest.raises(AgentUnreachable):
        await connection.health()
    agent = start_agent()
    (place / "agent.sock").symlink_to(agent.directory / "agent.sock")
    assert (await connection.health()).pid == agent.pid
    await connection.aclose()


async def test_an_agent_that_is_gone(connection: AgentConnection, agent: RealAgent) -> None:
    """Also one that dies while we wait for its answer."""
    await connection.put_job("1", script("sleep 600"))
    waiting = asyncio.create_task(connection.job_state("1", after=99, wait=LONG))
    await connection.health()
    os.kill(agent.pid, signal.SIGKILL)
    with pytest.raises(AgentUnreachable):
        await waiting
    with pytest.raises(AgentUnreachable):
        await connection.health()


async def test_an_agent_that_does_not_react(agent: RealAgent) -> None:
    """Suspended: unreachable after our patience; and fine again when it goes on."""
    connection = LocalTransport(patience=0.3).connect(at(agent.directory))
    os.kill(agent.pid, signal.SIGSTOP)
    with pytest.raises(AgentUnreachable, match=r"0\.3 s"):
        await connection.health()
    os.kill(agent.pid, signal.SIGCONT)
    patient = LocalTransport().connect(at(agent.directory))
    assert (await patient.health()).pid == agent.pid
    await connection.aclose()
    await patient.aclose()


async def test_refusals(connection: AgentConnection) -> None:
    """Status and the agent's own words."""
    with pytest.raises(AgentRefused, match="no job nothing") as refused:
        await connection.job_state("nothing")
    assert refused.value.status == 404
    await connection.put_job("1", script("true"))
    with pytest.raises(AgentRefused) as refused:
        await connection.put_job("1", script("false"))
    assert refused.value.status == 409


async def test_cancelling_a_call_does_not_mix_up_answers(connection: AgentConnection) -> None:
    """The answer of a cancelled call is never taken for the answer of another."""
    await connection.put_job("1", script("echo x; sleep 600"))
    await connection.read_log("1", 0, wait=LONG)
    for _ in range(20):
        call = asyncio.create_task(connection.read_log("1", 2, wait=LONG))
        await connection.health()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await connection.read_log("1", 0)).data == b"x\n"


async def test_many_calls_at_once(connection: AgentConnection) -> None:
    """Two hundred long polls on one connection object, all answered by one line."""
    await connection.put_job("1", script("while ! test -e go; do sleep 0.02; done; echo x"))
    polls = [asyncio.create_task(connection.read_log("1", 0, wait=LONG)) for _ in range(200)]
    health = await connection.health()
    await connection.stop_job("1", 0)
    chunks = await asyncio.gather(*polls)
    assert all(chunk.end for chunk in chunks)
    assert (await connection.health()).pid == health.pid


async def test_an_idle_connection_that_was_closed(tmp_path: Path) -> None:
    """The next call opens a new one and does not fail."""
    served: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"lease_expires_at": null}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        served.append(1)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "agent.sock"):
        connection = LocalTransport().connect(at(tmp_path))
        for _ in range(3):
            await connection.renew_lease(1)
        await connection.aclose()
    assert len(served) == 3


ANSWERS: list[bytes] = [
    b"",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnope",
    b"x" * 200_000,
]


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answers_that_are_none(tmp_path: Path, answer: bytes) -> None:
    """Whatever comes back, the caller gets one of the two errors of the contract."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        listener.setblocking(False)
        connection = LocalTransport().connect(at(tmp_path))
        calls: list[Callable[[], Awaitable[object]]] = [connection.health, lambda: connection.read_log("1", 0)]
        for call in calls:
            asked = asyncio.ensure_future(call())
            server, _ = await asyncio.get_running_loop().sock_accept(listener)
            with server:
                await asyncio.get_running_loop().sock_recv(server, 4096)
                server.setblocking(True)
                server.sendall(answer)
            with pytest.raises((AgentUnreachable, AgentRefused)):
                await asked
        await connection.aclose()


async def test_a_very_long_path(tmp_path: Path, start_agent: StartAgent) -> None:
    """Longer than any socket address."""
    place = tmp_path / ("long" * 40)
    place.mkdir()
    agent = start_agent(directory=place)
    connection = LocalTransport().connect(at(agent.directory))
    assert (await connection.health()).pid == agent.pid
    await connection.aclose()


async def test_secrets_are_not_shown() -> None:
    """A spec that ends up in a log line or a traceback shows neither environment nor password."""
    shown = repr(script("x", env={"TOKEN": "hush"}, registry={"username": "u", "password": "hush"}))
    assert "hush" not in shown


def test_only_local_endpoints() -> None:
    """An endpoint without a socket is a mistake of the caller."""
    with pytest.raises(ValueError, match="no unix socket"):
        LocalTransport().connect(Endpoint(ssh_host="example.org"))


async def test_a_port_of_the_machine() -> None:
    """A connection to it sends at once, blocks nobody, and reaches whoever listens there."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        with await LocalTransport().open_port(at(Path("/nowhere")), port) as connection:
            assert connection.gettimeout() == 0
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            accepted, _ = await loop.sock_accept(listener)
            with accepted:
                await loop.sock_sendall(connection, b"hej")
                assert await loop.sock_recv(accepted, 10) == b"hej"
    with pytest.raises(ConnectionRefusedError):
        await LocalTransport().open_port(at(Path("/nowhere")), port)


async def test_a_port_of_another_machine() -> None:
    """Is not this transport's to reach, and it says so."""
    elsewhere = Endpoint(ssh_host="example.com", ssh_user="me")
    with pytest.raises(AgentUnreachable, match="port 80 there cannot be reached"):
        await LocalTransport().open_port(elsewhere, 80)
