"""A home folder of its own for a test that runs the real thing, and the proof that nothing is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack.api import Client, Run
from dstack_core.testing import wait_until
from tests.support.agents import agent_health

ROOT = Path(__file__).parents[2]


class Home:
    """A `DSTACK_HOME`. Programs started with `run` or `start` see it, and nothing of the developer's own.

    Attributes:
        path: the folder.
        env: the environment for programs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE", "PIP_CERT", "VIRTUAL_ENV", "DOCKER_HOST")
        self.env = {name: os.environ[name] for name in kept if name in os.environ}
        self.env |= {"HOME": str(path.parent), "DSTACK_HOME": str(path), "PYTHONPATH": str(ROOT)}

    def start(self, code: str, *args: str, **options: object) -> subprocess.Popen[bytes]:
        """Starts a Python program in this home."""
        command = [sys.executable, "-c", code, *args]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, env=self.env, cwd=self.path.parent, **options)  # type: ignore[call-overload,no-any-return]  # options by name

    def run(self, code: str, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
        """Runs a Python program in this home to its end."""
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(
            command, env=self.env, cwd=self.path.parent, capture_output=True, timeout=timeout, check=False
        )

    def server_pid(self) -> int | None:
        """The process id of the local server, if one runs."""
        for pid, command in processes(self.path):
            if "dstack_core._server" in command:
                return pid
        return None

    def kill_server(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal to the local server, SIGKILL unless told otherwise, and waits for its end."""
        pid = self.server_pid()
        assert pid is not None, "no server runs in this home"
        os.kill(pid, number)
        if number in {signal.SIGKILL, signal.SIGTERM}:
            wait_until(lambda: not Path(f"/proc/{pid}").exists() or zombie(pid), what="the server's end")
        return pid

    def agents(self) -> list[dict[str, int]]:
        """The process ids of each agent in this home that is alive: `pid` and `watchdog_pid`."""
        found = []
        for sock in sorted((self.path / "local").glob("*/agent.sock")):
            with contextlib.suppress(OSError, ValueError):
                found.append(agent_health(sock))
        return found

    def log(self) -> str:
        """What the server wrote to its log."""
        path = self.path / "server" / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Ends everything that runs in this home."""
        # Again and again: what is about to die may have started something meanwhile.
        wait_until(lambda: not self._kill(), timeout=60, what="the end of all processes of the home")
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _kill(self) -> list[tuple[int, str]]:
        """SIGKILL to all that runs in this home; what that was."""
        found = processes(self.path)
        for pid, _command in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        return found


def zombie(pid: int) -> bool:
    """True if the process has ended and only waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def processes(home: Path) -> list[tuple[int, str]]:
    """Every live process that belongs to a home: by its environment, its folder or its command line."""
    mark = str(home).encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            belongs = mark in (entry / "environ").read_bytes() or mark in command
            belongs = belongs or (entry / "cwd").readlink().is_relative_to(home)
            if belongs and not zombie(int(entry.name)):
                found.append((int(entry.name), command.replace(b"\0", b" ").decode(errors="replace")))
    return found


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """An empty home folder; whatever was started in it is gone after the test."""
    # Not tmp_path: its name is too long for a socket, and that case has a test of its own.
    top = Path(tempfile.mkdtemp(prefix="dsk-"))
    # A client of another server makes a key in the home of its user.
    monkeypatch.setenv("HOME", str(top))
    home = Home(top / "h")
    try:
        yield home
    finally:
        home.close()


@pytest.fixture
def client(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client of this test process in an empty home."""
    monkeypatch.setenv("DSTACK_HOME", str(home.path))
    monkeypatch.setenv("HOME", str(home.path.parent))
    client = Client.from_config()
    yield client
    for run in client.runs.list():
        if not run.status.is_finished:
            run.stop(abort=True)


def ended(run: Run, timeout: float = 60) -> Run:
    """Waits for the end of a run."""

    def over() -> bool:
        run.refresh()
        return run.status.is_finished

    wait_until(over, timeout=timeout, what=f"the end of {run.name}")
    return run
