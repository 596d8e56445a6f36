"""A server of our own for measuring: its home, its configuration, its process, its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import run_program

PLUGIN = Path(__file__).parent / "plugin"
PYTHON = Path(sys.executable)
CONFIG = """
projects:
  - name: main
    backends:
      - {{type: local}}
      - {{type: bench, shapes: {shapes}, regions: {regions}}}
"""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket file instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Home:
    """An empty home folder; the server in it starts by itself, as for every user. `plugins`: where backends are."""

    path: Path
    plugins: Path = PLUGIN

    @property
    def env(self) -> dict[str, str]:
        """Environment of programs that use this home."""
        return {"HOME": str(self.path), "DSTACK_HOME": str(self.path / "dstack"), "PYTHONPATH": str(self.plugins)}

    def run(self, program: str, *args: str) -> Any:
        """Runs one of `programs/` as a user of this home."""
        return run_program(PYTHON, program, *args, env=self.env)

    def ask(self, method: str, path: str) -> Any:
        """One request to the server of this home."""
        connection = _UnixConnection(self.path / "dstack" / "server.sock")
        with contextlib.closing(connection):
            connection.request(method, path)
            return json.loads(connection.getresponse().read())

    @property
    def server_pid(self) -> int:
        """The process id of the running server."""
        return int(self.ask("GET", "/api/server/info")["pid"])

    def stop_server(self) -> None:
        """Ends the server, and waits until its process is gone."""
        try:
            pid = self.server_pid
        except OSError:
            return
        self.ask("POST", "/api/server/shutdown")
        deadline = time.monotonic() + 60
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def end_agents(self) -> None:
        """Ends what the server left running for its next start: agents, and their jobs with them."""
        deadline = time.monotonic() + 60
        while (agents := inside(self.path / "dstack" / "local")) and time.monotonic() < deadline:
            for pid in agents:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def inside(folder: Path) -> list[int]:
    """Processes whose working directory is in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(folder) and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """True while the process exists and is not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def new_home(shapes: int = 1, regions: int = 1, plugins: Path = PLUGIN) -> Iterator[Home]:
    """A home whose server knows this computer and a backend of `shapes` times `regions` offers."""
    folder = Path(tempfile.mkdtemp(prefix="dstack-bench-"))
    home = Home(folder, plugins)
    config = folder / "dstack" / "server" / "config.yml"
    config.parent.mkdir(parents=True, mode=0o700)
    (folder / "dstack").chmod(0o700)
    config.write_text(CONFIG.format(shapes=shapes, regions=regions))
    try:
        yield home
    finally:
        home.stop_server()
        home.end_agents()
        shutil.rmtree(folder, ignore_errors=True)
