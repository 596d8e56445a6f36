"""Servers as processes, and ways to speak to them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from dstack_core.testing import wait_until
from tests.support.upstreams import Handler, LoopThread, Replica, loop_thread

FAKE = Path(__file__).with_name("fake_server.py")


class ServerProcess:
    """A server of `fake_server.py` in a home folder of its own, or in the one of another."""

    def __init__(self, home: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.socket = home / "server.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", str(FAKE), *arguments],
            env={**os.environ, "DSTACK_HOME": str(home), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def client(self) -> httpx.Client:
        """A client over the unix socket. The first request waits until the server is up."""
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://server", timeout=60)

    def wait_up(self) -> ServerProcess:
        """Returns when the server listens."""
        wait_until(self.listens, timeout=60, what="the server to listen")
        return self

    def listens(self) -> bool:
        """Whether the socket is there. Fails at once if the process has ended."""
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}: {self.process.communicate()[1]}")
        return self.socket.exists()

    def ended(self, timeout: float = 60) -> int:
        """The exit code, waiting for it."""
        return self.process.wait(timeout)

    def log(self) -> str:
        """What the server logged."""
        return (self.home / "server" / "server.log").read_text()

    def events(self) -> list[str]:
        """What happened inside `FakeService`."""
        path = self.home / "events"
        return path.read_text().splitlines() if path.exists() else []

    def kill(self) -> None:
        """Ends it for good."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()


Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, and ends them after the test."""
    servers: list[ServerProcess] = []

    def started(*arguments: str, home: Path | None = None, env: dict[str, str] | None = None) -> ServerProcess:
        servers.append(ServerProcess(home or tmp_path / "home", *(arguments or ("--local",)), env=env))
        return servers[-1]

    yield started
    for server in servers:
        server.kill()


@pytest.fixture
def server(start: Start) -> ServerProcess:
    """A local server that is up."""
    return start().wait_up()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of `server`."""
    with server.client() as client:
        yield client


TOKEN = "a-good-long-token-0123"


class Services:
    """A server on TCP with services that a test describes, and replicas that do what the test says.

    Attributes:
        server: the process.
        url: its address, as `http://127.0.0.1:3000`.
        loop: where the replicas run.
    """

    def __init__(self, server: ServerProcess, url: str, loop: LoopThread) -> None:
        self.server = server
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.loop = loop
        self._known: dict[str, dict[str, object]] = {}
        self._events = len(server.events())
        self._write()

    def events(self) -> list[str]:
        """What happened inside the server since the test began."""
        return self.server.events()[self._events :]

    def replica(self, handler: Handler) -> Replica:
        """A replica of no service yet."""
        return Replica(self.loop, handler)

    def add(self, name: str, *handlers: Handler, auth: bool = False, **fields: object) -> list[Replica]:
        """A service whose replicas behave so. Everybody may use it unless `auth` says otherwise."""
        replicas = [self.replica(handler) for handler in handlers]
        self.set(name, [replica.port for replica in replicas], auth=auth, **fields)
        return replicas

    def set(self, name: str, ports: list[int], **fields: object) -> None:
        """Says which replicas a service has now."""
        self._known[name] = {**self._known.get(name, {}), **fields, "ports": ports}
        self._write()

    def _write(self) -> None:
        draft = self.server.home / "services.json.new"
        draft.write_text(json.dumps(self._known))
        draft.replace(self.server.home / "services.json")

    def client(self, **options: object) -> httpx.Client:
        """A client of the server."""
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]  # options by name

    def connect(self) -> socket.socket:
        """A bare connection to the server."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def get(self, path: str, **options: object) -> httpx.Response:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.get(path, **options)  # type: ignore[arg-type]  # options by name


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """An event loop for servers of the test."""
    with loop_thread() as thread:
        yield thread


def address(server: ServerProcess) -> str:
    """Where a server on TCP says it listens."""
    assert server.process.stdout is not None
    found = re.search(r"http://\S+:\d+", server.process.stdout.readline())
    assert found, server.process.communicate()[1]
    return found.group()


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, str]]:
    """A server on TCP, with a token, and its address. The tests of one module share it."""
    home = tmp_path_factory.mktemp("tcp") / "home"
    server = ServerProcess(home, "--port", "0", env={"DSTACK_SERVER_TOKEN": TOKEN})
    yield server, address(server)
    server.kill()


@pytest.fixture
def services(tcp_server: tuple[ServerProcess, str], loop: LoopThread) -> Services:
    """A server on TCP, with a token, and no service yet."""
    return Services(*tcp_server, loop)
