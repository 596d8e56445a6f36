"""A Nimbus whose servers really run: as processes of this computer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dstack_core._transport import agent_command, build_agent
from dstack_core.testing import Event, NimbusServer, wait_until
from tests.support.agents import agent_health
from tests.support.homes import zombie

WAITS = [sys.executable, "-c", "import os, time; print(os.getcwd(), flush=True); time.sleep(1000)"]
SAYS_WHO = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"]


@pytest.fixture
def nimbus(tmp_path: Path) -> Iterator[NimbusServer]:
    """A Nimbus with a folder for its servers."""
    with NimbusServer(agents=tmp_path / "servers") as server:
        yield server


class Api(NamedTuple):
    """How a Nimbus is reached."""

    url: str
    token: str


def ask(nimbus: NimbusServer | Api, method: str, path: str, **body: Any) -> dict[str, Any]:
    """One request to its API."""
    headers = {"Authorization": f"Bearer {nimbus.token}"}
    answer = httpx.request(method, f"{nimbus.url}/v1/servers{path}", json=body or None, headers=headers)
    return answer.json()  # type: ignore[no-any-return]  # of unknown shape


def order(nimbus: NimbusServer | Api, command: list[str]) -> dict[str, Any]:
    """A server with this command."""
    return ask(nimbus, "POST", "", name="one", type="small", zone="north-a", command=command)


def console(tmp_path: Path, server: str) -> str:
    """What the process of a server printed."""
    return (tmp_path / "servers" / server / "console.log").read_text()


def test_a_server_is_a_process_in_a_folder_of_its_own(nimbus: NimbusServer, tmp_path: Path) -> None:
    """Its command runs there, the agent is looked for there, and the server's end is that of the process."""
    server = order(nimbus, WAITS)["id"]
    folder = tmp_path / "servers" / server
    wait_until(lambda: console(tmp_path, server) == f"{folder}\n", what="the process to say where it is")
    wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "running", what="the server to run")
    assert ask(nimbus, "GET", f"/{server}")["agent_socket"] == str(folder / "agent.sock")
    ask(nimbus, "DELETE", f"/{server}?delete_disks=true")
    wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "deleted", what="the server's end")
    assert ask(nimbus, "GET", f"/{server}")["reason"] == "user"


def test_an_agent_is_the_process_that_was_started(nimbus: NimbusServer, tmp_path: Path) -> None:
    """A server with the real agent runs for as long as the agent does, and no shorter."""
    server = order(nimbus, list(agent_command(build_agent(tmp_path / "agent"))))["id"]
    sock = tmp_path / "servers" / server / "agent.sock"
    pid = wait_until(lambda: sock.exists() and agent_health(sock)["pid"], what="the agent")
    wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "running", what="the server to run")
    ask(nimbus, "DELETE", f"/{server}?delete_disks=true")
    wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "deleted", what="the server's end")
    assert zombie(pid)


def test_a_process_that_ends_is_a_machine_that_shut_down(nimbus: NimbusServer) -> None:
    """The server is gone, from the inside, and its disk with it."""
    server = order(nimbus, ["true"])["id"]
    wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "deleted", what="the server's end")
    assert ask(nimbus, "GET", f"/{server}")["reason"] == "guest"
    assert nimbus.truth().leftovers == []


def test_what_befalls_a_server_befalls_its_process(nimbus: NimbusServer, tmp_path: Path) -> None:
    """A spot interruption ends the process."""
    server = order(nimbus, SAYS_WHO)["id"]
    pid = int(wait_until(lambda: console(tmp_path, server), what="the process"))
    nimbus.befall(server, Event.SPOT_INTERRUPTION)
    wait_until(lambda: zombie(pid), what="the end of the process")


@pytest.mark.parametrize("command", [[], ["/nowhere/at-all"]])
def test_a_command_that_cannot_be_started(nimbus: NimbusServer, command: list[str]) -> None:
    """The order is refused, and there is no server."""
    assert order(nimbus, command)["error"]["code"] == "invalid"
    assert nimbus.truth().servers == []


def test_without_a_folder_nothing_runs(tmp_path: Path) -> None:
    """The command of a server that only seems to run is not looked at."""
    with NimbusServer() as nimbus:
        server = order(nimbus, ["touch", str(tmp_path / "file")])["id"]
        wait_until(lambda: ask(nimbus, "GET", f"/{server}")["status"] == "running", what="the server to run")
        assert ask(nimbus, "GET", f"/{server}")["agent_socket"] is None
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_nimbus_to_try_on(tmp_path: Path, number: int) -> None:
    """`python -m dstack_core.testing.nimbus` says how to reach it, and ends its servers with itself."""
    command = [sys.executable, "-m", "dstack_core.testing.nimbus", "--token", "secret"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = [running.stdout.readline() for _ in range(5)]
        url = said[0].split()[3]
        assert said[2:] == ["      - type: nimbus\n", f"        url: {url}\n", "        token: secret\n"]
        server = order(Api(url, "secret"), SAYS_WHO)["id"]
        consoles = list(tmp_path.glob(f"nimbus-*/{server}/console.log"))
        (pid,) = wait_until(lambda: [int(text) for path in consoles if (text := path.read_text())], what="the process")
        running.send_signal(number)
        assert running.wait(60) == 0
    assert zombie(pid)
    assert list(tmp_path.iterdir()) == []
