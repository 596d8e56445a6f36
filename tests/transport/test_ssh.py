"""The way to machines over SSH, on machines that really boot."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dstack_core._models.instances import Endpoint, Way
from dstack_core._transport import (
    AgentConnection,
    AgentJobSpec,
    AgentUnreachable,
    HostKeyRefused,
    LocalTransport,
    Ways,
)
from dstack_core._transport.keys import key_pair
from dstack_core._transport.ssh import Patience, SshTransport
from tests.support.ssh_machines import LONG, Boot, start_agent_over_ssh, until

pytestmark = [pytest.mark.anyio, pytest.mark.machines]
STRANGER = key_pair(bytes(32)).public


def script(text: str) -> AgentJobSpec:
    """A job that runs this with the shell."""
    return AgentJobSpec(argv=("sh", "-c", text))


async def answering(connection: AgentConnection) -> None:
    """Waits for the agent."""
    await until(lambda: _answers(connection), "the agent to answer")


async def _answers(connection: AgentConnection) -> bool:
    with suppress(AgentUnreachable):
        return (await connection.health()).pid > 0
    return False


def threads_and_children() -> tuple[int, int]:
    """How many this process has."""
    tasks = list(Path("/proc/self/task").iterdir())
    return len(tasks), sum(len((task / "children").read_text().split()) for task in tasks)


async def test_a_job_on_a_machine(boot: Boot, transport: SshTransport, agent_archive: Path) -> None:
    """Through `Ways`, as the server goes: the agent answers, runs a job, and every byte of its output arrives."""
    way = boot().way
    await start_agent_over_ssh(transport, way, agent_archive)
    ways = Ways(LocalTransport(), lambda: transport)
    connection = ways.connect(way)
    await answering(connection)
    assert (await connection.health()).instance == "i-1"
    await connection.put_job("j", script("head -c 30000000 /dev/zero | tr '\\0' '\\377'; hostname; exit 3"))
    output = b""
    while True:
        chunk = await connection.read_log("j", len(output), wait=10)
        assert chunk.offset == len(output)
        output += chunk.data
        if chunk.end:
            break
    assert output[:30000000] == b"\xff" * 30000000
    assert output[30000000:].startswith(b"machine-")
    assert (await connection.job_state("j")).exit_code == 3
    await connection.aclose()


async def test_commands(boot: Boot, transport: SshTransport) -> None:
    """Input, output, errors and exit code of a command come and go as bytes."""
    way = boot().way
    said = await transport.run(way, "cat; echo no >&2; exit 7", bytes(range(256)) * 5000)
    assert (said.code, said.output, said.errors) == (7, bytes(range(256)) * 5000, b"no\n")
    assert (await transport.run(way, "kill -9 $$")).code == 137


async def test_a_wrong_host_key_is_refused(boot: Boot, transport: SshTransport) -> None:
    """Whoever shows another key than the pinned one, or where none is pinned, is told nothing, by any call."""
    there = boot()
    endpoint = Endpoint(ssh_host=there.machine.address)
    for way in (Way.to(endpoint, STRANGER), endpoint):
        connection = transport.connect(way)
        for call in (connection.health(), transport.run(way, "touch /was-here"), transport.open_port(way, 22)):
            with pytest.raises(HostKeyRefused, match="not the one that was pinned"):
                await call
        await connection.aclose()
    assert there.machine.run("test", "-e", "/was-here").code != 0
    # One of several is enough, and the right key opens the door.
    assert (await transport.run(Way.to(endpoint, STRANGER, there.way.host_keys[0]), "true")).code == 0


async def test_a_key_that_is_not_let_in(boot: Boot, tmp_path: Path) -> None:
    """A server with another key is told that it is not let in."""
    way = boot().way
    other = SshTransport(tmp_path / "id_ed25519")
    with pytest.raises(AgentUnreachable, match="does not let the server's key in"):
        await other.run(way, "true")
    await other.aclose()


async def test_no_machine_and_no_agent(boot: Boot, transport: SshTransport) -> None:
    """An address where nobody answers, and a machine without an agent, are unreachable at once, and again."""
    nowhere = Way.to(Endpoint(ssh_host="127.0.0.1", ssh_port=1), STRANGER)
    for way in (nowhere, boot().way):
        connection = transport.connect(way)
        for _ in range(3):
            with pytest.raises(AgentUnreachable):
                await connection.health()
        await connection.aclose()


async def test_ports(boot: Boot, transport: SshTransport) -> None:
    """A port of the machine is a socket here, also if the other side speaks first; where nobody listens is refused."""
    way = boot().way
    connection = await transport.open_port(way, 22)
    with connection:
        greeting = await asyncio.get_running_loop().sock_recv(connection, 4)
    assert greeting == b"SSH-"
    with pytest.raises(ConnectionRefusedError, match="nobody listens on port 9"):
        await transport.open_port(way, 9)


async def test_a_cut_longer_than_the_keep_alive(boot: Boot, transport: SshTransport, agent_archive: Path) -> None:
    """When the network is gone until the connection is given up, and comes back, no byte is lost or doubled."""
    there = boot()
    await start_agent_over_ssh(transport, there.way, agent_archive)
    connection = transport.connect(there.way)
    await answering(connection)
    counting = "i=0; while [ ! -e /enough ]; do echo $i; i=$((i+1)); sleep 0.001; done; echo $i"
    await connection.put_job("j", script(counting))
    output, failures, ended = b"", 0, False

    async def read() -> None:
        nonlocal output, failures, ended
        while not ended:
            try:
                chunk = await connection.read_log("j", len(output), wait=5)
            except AgentUnreachable:
                failures += 1
                await asyncio.sleep(0.02)
                continue
            assert chunk.offset == len(output)
            output += chunk.data
            ended = chunk.end

    async def has(condition: Callable[[], bool]) -> bool:
        return condition()

    reading = asyncio.create_task(read())
    await until(lambda: has(lambda: len(output) > 1000), "output")
    await asyncio.to_thread(there.machine.cut)
    # The first failure is the connection's end, the others are attempts at a new one.
    await until(lambda: has(lambda: failures > 2), "the connection to be given up")
    before = len(output)
    await asyncio.to_thread(there.machine.mend)
    await until(lambda: has(lambda: len(output) > before), "the stream to go on")
    await transport.run(there.way, "touch /enough")
    async with asyncio.timeout(LONG):
        await reading
    numbers = output.split()
    assert numbers == [b"%d" % number for number in range(len(numbers))]
    await connection.aclose()


async def test_two_hundred_connections(boot: Boot, key_file: Path, agent_archive: Path) -> None:
    """Two hundred connections at once take neither a thread nor a process each, and all of them work."""
    transport = SshTransport(key_file, Patience(agent=LONG, connect=LONG))
    there = boot(bootcmd=["echo MaxStartups 300 >/etc/ssh/sshd_config.d/many.conf"])
    await start_agent_over_ssh(transport, there.way, agent_archive)
    # Each pins one more key, so that none of them is the connection of another.
    ways = [Way.to(there.way, *there.way.host_keys, key_pair(bytes([n]) * 32).public) for n in range(200)]
    connections = [transport.connect(way) for way in ways]
    await answering(connections[0])
    threads, children = threads_and_children()
    turn = asyncio.Semaphore(8)

    async def ask(connection: AgentConnection) -> int:
        async with turn:
            return (await connection.health()).pid

    pids = await asyncio.gather(*(ask(connection) for connection in connections))
    assert len(set(pids)) == 1
    again = await asyncio.gather(*(connection.health() for connection in connections))
    assert {health.pid for health in again} == set(pids)
    sessions = there.machine.run("sh", "-c", "ss -Htn state established sport = :22 | wc -l").output
    assert int(sessions) >= 200
    now, still = threads_and_children()
    # The event loop keeps a few threads for what blocks, however many connections there are.
    assert now - threads <= min(32, (os.cpu_count() or 1) + 4)
    assert still <= children
    for connection in connections:
        await connection.aclose()
    await transport.aclose()


async def test_an_unused_connection_is_closed(boot: Boot, key_file: Path) -> None:
    """It stays for a while, for whoever comes next, and then its machine sees the end of it."""
    there = boot()
    transport = SshTransport(key_file, Patience(linger=0.1))
    first = (await transport.run(there.way, "echo $PPID")).output

    async def alone() -> bool:
        found = there.machine.run("sh", "-c", "ss -Htn state established sport = :22").output
        return not found.strip()

    await until(alone, "the connection to end")
    assert (await transport.run(there.way, "echo $PPID")).output != first
    await transport.aclose()
