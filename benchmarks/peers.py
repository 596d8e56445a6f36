"""The peers: each from PyPI, in an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOKEN = "benchmark"  # noqa: S105  # opens a server of this run on loopback


@dataclass(frozen=True)
class Peer:
    """A project that people would use instead.

    Attributes:
        name: on PyPI.
        requirement: what is installed.
        statement: what a program that uses it begins with.
    """

    name: str
    requirement: str
    statement: str

    @property
    def python(self) -> Path:
        """The interpreter of its environment, which is made when it is first needed and kept for the next run."""
        version = self.requirement.partition("==")[2]
        folder = cache_folder() / f"{self.name}-{version}-py{sys.version_info.major}.{sys.version_info.minor}"
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            install(folder, python, self.requirement)
            (folder / "complete").touch()
        return python


PEERS = (
    Peer("dstack", "dstack[server]==0.22.5", "from dstack.api import Client, Task"),
    Peer("skypilot", "skypilot==0.14.1", "import sky"),
    Peer("modal", "modal==1.6.4", "import modal"),
    Peer("apache-libcloud", "apache-libcloud==3.9.1", "from libcloud.compute.providers import get_driver"),
)
DSTACK = PEERS[0]


def cache_folder() -> Path:
    """Where environments are kept: `$DSTACK_BENCH_CACHE`, else a folder of this user among the temporary ones."""
    return Path(os.environ.get("DSTACK_BENCH_CACHE") or Path(tempfile.gettempdir()) / f"dstack-bench-{os.getuid()}")


def install(folder: Path, python: Path, requirement: str) -> None:
    """Makes an environment that holds one requirement."""
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, requirement], check=True)
    else:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)


def isolated(home: Path) -> dict[str, str]:
    """Environment in which a peer finds nothing of this user, and leaves nothing behind."""
    return {"HOME": str(home), "DSTACK_SERVER_DIR": str(home / "server"), "PYTHONPATH": ""}


@contextlib.contextmanager
def new_home() -> Iterator[Path]:
    """A home folder for a peer, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dstack-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class PeerServer:
    """Peer dstack's server, running."""

    url: str
    pid: int
    seconds_to_healthy: float


@contextlib.contextmanager
def dstack_server(home: Path) -> Iterator[PeerServer]:
    """Starts peer dstack's server on that home, and ends it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(DSTACK.python.parent / "dstack"), "server", "--yes", "--token", TOKEN, "--port", str(port)]
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    with subprocess.Popen(
        command, env={**os.environ, **isolated(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_healthy(url, process)
            yield PeerServer(url, process.pid, time.monotonic() - start)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def wait_healthy(url: str, process: subprocess.Popen[bytes], patience: float = 120) -> None:
    """Returns when the server answers that it is well."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthcheck", timeout=5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"peer dstack's server did not become healthy (exit code {process.returncode})")
        time.sleep(0.01)
