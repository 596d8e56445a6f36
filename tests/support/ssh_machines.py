"""Machines that a server would reach: its key is let in, and their host key is known.

Fixture, to be imported into a `conftest.py` together with `fleet`:

- `boot` (function): boots a machine with user-data of the test's, and says how it is reached. When the test is over,
  the machines that it booted are ended.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dstack_core._models.instances import Endpoint, Way
from dstack_core._transport.keys import KeyPair, key_pair, server_key
from dstack_core._transport.ssh import AGENT_SOCKET, Patience, SshTransport
from dstack_core.testing import Fleet, Machine, wait_until
from tests.support.machines import answers

__all__ = ["Boot", "Reached", "boot", "key_file", "start_agent_over_ssh", "transport", "until"]

HOST_KEY = key_pair(bytes(range(32)))
FOLDER = AGENT_SOCKET.rpartition("/")[0]
LONG = 120.0


@dataclass(frozen=True)
class Reached:
    """A machine and the way to it."""

    machine: Machine
    way: Way


Boot = Callable[..., Reached]


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's key."""
    path = tmp_path_factory.mktemp("server") / "id_ed25519"
    server_key(path)
    return path


@pytest.fixture
def boot(fleet: Fleet, key_file: Path) -> Iterator[Boot]:
    """Boots machines whose sshd answers when they are returned."""
    booted: list[Machine] = []

    def boot_one(host_key: KeyPair = HOST_KEY, **more: Any) -> Reached:
        machine = fleet.boot(user_data(server_key(key_file).public, host_key, **more))
        booted.append(machine)
        wait_until(lambda: answers(machine), timeout=LONG, what=f"{machine} to answer")
        return Reached(machine, Way.to(Endpoint(ssh_host=machine.address), host_key.public))

    yield boot_one
    for machine in booted:
        machine.terminate()


@pytest.fixture
async def transport(key_file: Path) -> AsyncIterator[SshTransport]:
    """With little patience for what is silent."""
    transport = SshTransport(key_file, Patience(connect=5, keep_alive=0.5))
    yield transport
    await transport.aclose()


def user_data(public: str, host_key: KeyPair, **more: Any) -> str:
    """User-data for a machine that lets root in with this key, and has that one."""
    config = {
        "disable_root": False,
        "users": [{"name": "root", "ssh_authorized_keys": [public]}],
        "ssh_keys": {"ed25519_private": host_key.private, "ed25519_public": host_key.public},
        **more,
    }
    return f"#cloud-config\n{json.dumps(config)}"


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits for a condition, a little longer each time."""
    pause = 0.01
    try:
        async with asyncio.timeout(LONG):
            while not await condition():
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.5)
    except TimeoutError:
        pytest.fail(f"waited for {what} in vain")


async def start_agent_over_ssh(transport: SshTransport, way: Way, archive: Path, instance: str = "i-1") -> None:
    """Puts the agent there and starts it, by hand."""
    name = f"{FOLDER}/{archive.name}"
    program = archive.read_bytes()  # noqa: ASYNC240  # a test may wait for its disk
    put = await transport.run(way, f"mkdir -p {FOLDER} && cat >{name}", program)
    serve = f"cd {FOLDER} && setsid -f python3 {name} serve 600 {instance} </dev/null >/dev/null 2>&1"
    start = await transport.run(way, serve)
    assert put.code == start.code == 0, (put, start)
