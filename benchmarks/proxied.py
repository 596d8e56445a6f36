"""A service behind the proxy, and load for it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.measure import PROGRAMS, run_program
from benchmarks.ours import PYTHON, Home, new_home


@dataclass(frozen=True)
class Started:
    """A replica, as it said when it began to listen; `at` is the time."""

    pid: int
    port: int
    at: float


@dataclass(frozen=True)
class Proxied:
    """A service of replicas that cost next to nothing."""

    home: Home
    url: str
    file: Path

    def replicas(self) -> list[Started]:
        """All that ever began to listen."""
        lines = (line.split() for line in self.file.read_text().splitlines())
        return [Started(int(pid), int(port), float(at)) for pid, port, at in lines]

    def answers(self) -> int:
        """The process id of the replica that answers a request now."""
        parts = urlsplit(self.url)
        with closing(http.client.HTTPConnection(parts.netloc, timeout=60)) as connection:
            connection.request("GET", parts.path)
            return int(connection.getresponse().read())


@contextmanager
def proxied(replicas: int) -> Iterator[Proxied]:
    """A service with so many replicas on a server of its own; all of them answer."""
    with new_home() as home:
        file = home.path / "replicas"
        service = Proxied(home, home.run("serve.py", str(replicas), str(file))["url"], file)
        waited_for({started.pid for started in service.replicas()}, service)
        yield service


def waited_for(pids: set[int], service: Proxied) -> None:
    """Returns when each of these has answered."""
    deadline = time.monotonic() + 60
    while pids and time.monotonic() < deadline:
        pids = pids - {service.answers()}
    if pids:
        raise RuntimeError(f"replicas {sorted(pids)} do not answer")


def load(url: str, connections: int, seconds: float, rate: float) -> Any:
    """Asks for an address; a request that fails is an error here."""
    result = run_program(PYTHON, "load.py", url, str(connections), str(seconds), str(rate), env={})
    if result["failed"]:
        raise RuntimeError(f"requests failed: {result['failed']}")
    return result


def killed_under_load(service: Proxied, seconds: float) -> tuple[int, float]:
    """How many requests fail when a replica is killed, and seconds until its replacement serves, from its first moment.

    That moment is when it begins to listen.
    """
    command = [sys.executable, "-P", str(PROGRAMS / "load.py"), service.url, "32", str(seconds), "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        before = service.replicas()
        time.sleep(seconds / 4)
        os.kill(before[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(service.replicas()) == len(before) and time.monotonic() < deadline:
            time.sleep(0.002)
        fresh = service.replicas()[-1]
        waited_for({fresh.pid}, service)
        took = time.time() - fresh.at
        result = json.loads(running.communicate(timeout=120)[0])
    return sum(result["failed"].values()), took
