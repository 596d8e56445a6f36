"""Machines that boot with our user-data, from the first greeting to the power-off that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dstack_core._models.instances import Endpoint, Way
from dstack_core._transport import AgentConnection, AgentJobSpec, AgentUnreachable, HostKeyRefused, Said
from dstack_core._transport.cloud_init import AGENT, SETUP, Boot, user_data
from dstack_core._transport.keys import key_pair, server_key
from dstack_core._transport.on_machine import (
    Greeting,
    MachineBroken,
    Program,
    greet,
    show_own_key,
    start_agent,
)
from dstack_core._transport.ssh import SshTransport
from dstack_core.testing import Fleet, Machine, wait_until
from tests.support.ssh_machines import LONG, until

pytestmark = [pytest.mark.anyio, pytest.mark.machines]
FIRST = key_pair(bytes(range(32)))
BootOne = Callable[..., Machine]
PACKAGES = r"""
mkdir -p /repo/new/DEBIAN /repo/new/usr/bin; cd /repo
printf '#!/bin/sh\n' >new/usr/bin/docker; chmod 755 new/usr/bin/docker
printf 'Package: docker.io\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: x\n' >new/DEBIAN/control
dpkg-deb --build new docker.deb
{ cat new/DEBIAN/control
  echo "Filename: ./docker.deb"
  echo "Size: $(stat -c %s docker.deb)"
  echo "SHA256: $(sha256sum docker.deb | cut -d' ' -f1)"
} >Packages
rm -rf /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/repo ./' >/etc/apt/sources.list
"""
"""A source of packages on the machine itself, with one that is called as Debian's container engine is."""


@pytest.fixture
def boot_one(fleet: Fleet, key_file: Path) -> Iterator[BootOne]:
    """Boots a machine for an instance `i-1`, and ends it when the test is over.

    `before`: what has been done to its image.
    """
    booted: list[Machine] = []

    def boot(*, with_engine: bool = False, before: str = "true", **fields: Any) -> Machine:
        plain = {"instance": "i-1", "server_key": server_key(key_file).public, "host_key": FIRST, "grace": 600.0}
        first, _, text = user_data(Boot(**{**plain, **fields})).partition("\n")
        # As if the image had been like that.
        whole = f"{first}\n{json.dumps({**json.loads(text), 'bootcmd': [before]})}"
        booted.append(fleet.boot(whole, container_engine=with_engine))
        return booted[-1]

    yield boot
    for machine in booted:
        machine.terminate()


def way_to(machine: Machine, key: str = FIRST.public) -> Way:
    """How it is reached."""
    return Way.to(Endpoint(ssh_host=machine.address), key)


async def ready(transport: SshTransport, machine: Machine) -> Greeting:
    """What it says when its set-up is over."""
    await until(lambda: _greets(transport, machine), f"{machine} to be ready")
    return await greet(transport, way_to(machine))


async def _greets(transport: SshTransport, machine: Machine) -> bool:
    with suppress(AgentUnreachable):
        return (await greet(transport, way_to(machine))).ready
    return False


async def trusted(transport: SshTransport, machine: Machine, own: str) -> Way:
    """The way to it from when on it shows its own key."""
    await show_own_key(transport, way_to(machine))
    way = way_to(machine, own)
    await until(lambda: _lets_in(transport, way), f"{machine} to show its own key")
    return way


async def _lets_in(transport: SshTransport, way: Way) -> bool:
    with suppress(AgentUnreachable):
        return (await transport.run(way, "true")).code == 0
    return False


async def _answers(connection: AgentConnection) -> bool:
    with suppress(AgentUnreachable):
        return (await connection.health()).instance == "i-1"
    return False


def off(machine: Machine) -> None:
    """Waits until it is gone, as its cloud sees it."""
    wait_until(lambda: machine.state == "terminated", timeout=LONG, what=f"{machine} to power itself off")


async def test_from_boot_to_a_job(
    boot_one: BootOne, transport: SshTransport, key_file: Path, agent_archive: Path
) -> None:
    """The first key opens the first connection alone; then comes the machine's own, the agent by hash, and a job."""
    machine = boot_one()
    greeting = await ready(transport, machine)
    assert greeting == await greet(transport, way_to(machine))
    assert greeting.own_key not in ("", FIRST.public)
    way = await trusted(transport, machine, greeting.own_key)
    fresh = SshTransport(key_file)
    with pytest.raises(HostKeyRefused):
        await fresh.run(way_to(machine), "true")
    await fresh.aclose()
    program = Program(agent_archive)
    for _ in range(2):
        await start_agent(transport, way, program)
    assert machine.run("sha256sum", AGENT).output.split()[0].decode() == program.read()[1]
    connection = transport.connect(way)
    await until(lambda: _answers(connection), "the agent to answer")
    await connection.put_job("j", AgentJobSpec(argv=("sh", "-c", "echo at $HOME; exit 3")))
    state = await connection.job_state("j", wait=0)
    while not state.is_finished:
        state = await connection.job_state("j", after=state.seq, wait=20)
    assert state.exit_code == 3
    assert (await connection.read_log("j", 0)).data == b"at /root\n"
    await connection.aclose()
    checked = machine.run("cloud-init", "schema", "--config-file", "/var/lib/cloud/seed/nocloud/user-data")
    assert checked.code == 0, checked


async def running_agent(transport: SshTransport, machine: Machine, archive: Path) -> AgentConnection:
    """An agent of the machine that answers."""
    await ready(transport, machine)
    await start_agent(transport, way_to(machine), Program(archive))
    connection = transport.connect(way_to(machine))
    await until(lambda: _answers(connection), "the agent to answer")
    return connection


@pytest.mark.parametrize("whom", ["agent", "watchdog"])
async def test_an_agent_that_dies_is_started_again(
    boot_one: BootOne, transport: SshTransport, agent_archive: Path, whom: str
) -> None:
    """Killed before it had a job, it is there again, as another process, and takes one."""
    machine = boot_one()
    connection = await running_agent(transport, machine, agent_archive)
    first = await connection.health()
    machine.run("kill", "-9", str(first.pid if whom == "agent" else first.watchdog_pid))

    async def is_another() -> bool:
        # It may just be dying: then nobody answers for a moment.
        with suppress(AgentUnreachable):
            return (await connection.health()).watchdog_pid != first.watchdog_pid
        return False

    await until(is_another, "another agent")
    await connection.put_job("j", AgentJobSpec(argv=("sh", "-c", "env | grep -c DSTACK_AGENT; exit 0")))
    state = await connection.job_state("j", wait=0)
    while not state.is_finished:
        state = await connection.job_state("j", after=state.seq, wait=20)
    assert (await connection.read_log("j", 0)).data == b"0\n"
    await connection.aclose()


@pytest.mark.parametrize("whom", ["agent", "watchdog"])
async def test_with_the_agent_of_a_job_the_machine_goes(
    boot_one: BootOne, transport: SshTransport, agent_archive: Path, whom: str
) -> None:
    """Killed together with its job, it is of no more use: the machine powers off, so that the run learns of it."""
    machine = boot_one()
    connection = await running_agent(transport, machine, agent_archive)
    await connection.put_job("j", AgentJobSpec(argv=("sleep", "1000")))
    health = await connection.health()
    machine.run("kill", "-9", str(health.pid if whom == "agent" else health.watchdog_pid))
    off(machine)
    await connection.aclose()


async def test_a_damaged_program_is_never_started(
    boot_one: BootOne, transport: SshTransport, agent_archive: Path
) -> None:
    """What arrives damaged is refused and not kept; what was damaged on the disk is sent again."""

    class Damaging(SshTransport):
        """Loses the last byte of what it sends."""

        async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
            return await transport.run(endpoint, command, data[:-1])

    machine = boot_one()
    await ready(transport, machine)
    program, way = Program(agent_archive), way_to(machine)
    with pytest.raises(MachineBroken, match="it arrived damaged"):
        await start_agent(Damaging(agent_archive), way, program)
    assert machine.run("ls", AGENT, AGENT + ".new").code != 0
    machine.put(AGENT, b"nonsense")
    await start_agent(transport, way, program)
    assert machine.run("sha256sum", AGENT).output.split()[0].decode() == program.read()[1]


async def test_nobody_ever_came(boot_one: BootOne) -> None:
    """A machine that no server ever speaks to powers itself off, and its console says why."""
    machine = boot_one(grace=5.0)
    off(machine)
    assert b"powering off: nobody has cared for it for 5 s" in machine.console()


async def test_the_agents_lease_ran_out(boot_one: BootOne, transport: SshTransport, agent_archive: Path) -> None:
    """When the agent gives up because no server renews its lease, the machine goes with it."""
    machine = boot_one(grace=20.0)
    await ready(transport, machine)
    await start_agent(transport, way_to(machine), Program(agent_archive))
    off(machine)
    assert b"nobody has cared" not in machine.console()


async def test_its_time_is_over(boot_one: BootOne) -> None:
    """A machine that must be gone by now is, whoever cares for it."""
    machine = boot_one(expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    off(machine)
    assert b"powering off: its time is over" in machine.console()


async def test_an_engine_that_is_there_is_used(boot_one: BootOne, transport: SshTransport) -> None:
    """With an image to run, the machine is ready when its container engine works."""
    machine = boot_one(with_engine=True, container_engine=True)
    await ready(transport, machine)
    assert machine.run("docker", "info").code == 0


async def test_an_engine_that_is_not_there_is_installed(boot_one: BootOne, transport: SshTransport) -> None:
    """With packages to be had, the machine's own package manager brings one, if the job has an image."""
    machine = boot_one(before=PACKAGES, container_engine=True)
    await ready(transport, machine)
    assert machine.run("dpkg-query", "-W", "-f", "${Status}", "docker.io").output == b"install ok installed"
    assert b"dstack: ready for the agent" in machine.console()
    without = boot_one(before=PACKAGES)
    await ready(transport, without)
    assert without.run("dpkg-query", "-W", "docker.io").code != 0


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        ({"container_engine": True}, "there is no container engine, and none can be installed"),
        ({"gpus": "nvidia"}, "no NVIDIA GPU works here"),
        ({"gpus": "amd"}, "no AMD GPU works here"),
    ],
    ids=["engine", "nvidia", "amd"],
)
async def test_what_is_missing_is_said(
    boot_one: BootOne, transport: SshTransport, needs: dict[str, Any], why: str
) -> None:
    """A machine that lacks what the job needs says which and what to do: to the server, and on its console."""
    machine = boot_one(before="echo 'deb [trusted=yes] file:/nowhere ./' >/etc/apt/sources.list", **needs)
    with pytest.raises(MachineBroken, match=f"set-up of the machine failed: {why}"):
        await ready(transport, machine)
    assert f"dstack: set-up failed: {why}".encode() in machine.console()
    assert machine.run("cat", SETUP).output.startswith(b"failed: ")
