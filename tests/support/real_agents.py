"""Real agents, started the way a backend starts them, and spoken to with plain HTTP.

Fixtures, to be imported into a `conftest.py`:

- `agent_archive` (session): the built agent.
- `start_agent`: starts agents, each in a directory of its own. When the test is over they are ended, and nothing that
  they or their jobs started may be left: every process of theirs carries a marker in its environment.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dstack_core._home import socket_address
from dstack_core._transport import agent_command, build_agent
from dstack_core.testing import wait_until

__all__ = ["RealAgent", "StartAgent", "agent_archive", "start_agent"]

MARKER = "DSTACK_INSTANCE"
LONG = 60.0
"""Seconds that nothing here takes on any machine, however busy."""

_JSON = dict[str, Any]


class Refused(Exception):
    """The agent answered with an error."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body.decode(errors='replace')}")
        self.status = status


class RealAgent:
    """One agent, running in `directory`."""

    def __init__(self, directory: Path, command: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            command, cwd=directory, env={**env, MARKER: directory.name}, stdin=subprocess.DEVNULL, **options
        )
        wait_until(self._answers, timeout=LONG, what="the agent to answer")
        self.health = self.get("/v1/health")
        self.pid, self.watchdog = self.health["pid"], self.health["watchdog_pid"]

    @property
    def address(self) -> str:
        """For `socket.connect`."""
        return socket_address(self.directory / "agent.sock")

    # ------------------------------------------------------------------------------------------------- protocol --

    def request(self, method: str, target: str, body: object = None, timeout: float = LONG) -> http.client.HTTPResponse:
        """One exchange on a connection of its own; bytes go as they are. The response has been read into `.data`."""
        connection = http.client.HTTPConnection("agent", timeout=timeout)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        with contextlib.closing(connection):
            connection.sock.connect(self.address)
            connection.request(method, target, body if body is None or isinstance(body, bytes) else json.dumps(body))
            response = connection.getresponse()
            response.data = response.read()  # type: ignore[attr-defined]  # kept beyond the connection
        return response

    def get(self, target: str) -> _JSON:
        """A JSON document."""
        return self.call("GET", target)

    def call(self, method: str, target: str, body: object = None) -> _JSON:
        """One exchange of JSON documents.

        Raises:
            Refused: the status is not 200.
        """
        response = self.request(method, target, body)
        if response.status != 200:
            raise Refused(response.status, response.data)  # type: ignore[attr-defined]  # see `request`
        value: _JSON = json.loads(response.data)  # type: ignore[attr-defined]  # see `request`
        return value

    def run(self, shell: str | None = None, **spec: Any) -> _JSON:
        """Puts job `1`."""
        return self.call("PUT", "/v1/jobs/1", {"shell": shell, **spec})

    def state(self) -> _JSON:
        """Of job `1`, now."""
        return self.get("/v1/jobs/1")

    def wait(self, status: str = "exited", timeout: float = LONG) -> _JSON:
        """The state of job `1` once it has this status, or has ended."""
        deadline = time.monotonic() + timeout
        state = self.state()
        while state["status"] not in {status, "exited"}:
            assert time.monotonic() < deadline, f"not {status} in time: {state}"
            state = self.get(f"/v1/jobs/1?after={state['seq']}&wait=5")
        assert state["status"] == status, state
        return state

    def stop(self, grace: float) -> _JSON:
        """Stops job `1`."""
        return self.call("POST", "/v1/jobs/1/stop", {"grace": grace})

    def log(self, offset: int = 0, wait: float = 0, limit: int = 1 << 20) -> tuple[bytes, Any]:
        """Bytes from `offset` on, and the response's headers."""
        response = self.request("GET", f"/v1/jobs/1/log?offset={offset}&wait={wait}&limit={limit}")
        assert response.status == 200
        data: bytes = response.data  # type: ignore[attr-defined]  # see `request`
        return data, response.headers

    def pieces(self, limit: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
        """The whole output as (offset, bytes), following it to its end."""
        offset = 0
        while True:
            data, headers = self.log(offset, wait=5, limit=limit)
            offset = int(headers["X-Log-Offset"])
            if data:
                yield offset, data
            offset += len(data)
            if headers["X-Log-End"]:
                return

    def output(self) -> bytes:
        """The whole output, to its end."""
        return b"".join(data for _, data in self.pieces())

    def wait_for_output(self, text: bytes) -> None:
        """Until this is in the output."""
        wait_until(lambda: text in self.log()[0], timeout=LONG, what=f"{text!r} in the output")

    # ----------------------------------------------------------------------------------------------- processes --

    def processes(self) -> set[int]:
        """Of the agent, its watchdog and its job: all that carry the marker."""
        return marked(self.directory.name)

    def job_processes(self) -> set[int]:
        """The same without agent and watchdog."""
        return self.processes() - {self.pid, self.watchdog}

    def shutdown(self) -> None:
        """Asks the agent to end, and waits for it."""
        self.call("POST", "/v1/shutdown")
        assert self.process.wait(LONG) == 0

    def end(self) -> None:
        """Ends it in whatever state it is; fails if it leaves anything behind."""
        for pid in (self.watchdog, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.request("POST", "/v1/shutdown", timeout=5)
        try:
            wait_until(lambda: not self.processes(), timeout=LONG, what="the agent and all of its job to be gone")
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(LONG)
            self._forget_address()

    def _forget_address(self) -> None:
        """The short link that a long path got."""
        link = Path(self.address).parent
        if link.is_symlink():
            link.unlink()

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the agent ended with {self.process.returncode}: {self.complaints()}"
        try:
            self.get("/v1/health")
        except OSError:
            return False
        return True

    def complaints(self) -> str:
        """What the agent wrote into its own log."""
        log = self.directory / "agent.log"
        return log.read_text() if log.exists() else ""


def marked(name: str) -> set[int]:
    """The live processes that carry this marker."""
    entry = f"{MARKER}={name}".encode()
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if entry in (process / "environ").read_bytes().split(b"\0"):
                    found.add(int(process.name))
    return found


@pytest.fixture(scope="session")
def agent_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent, built once."""
    return build_agent(tmp_path_factory.mktemp("archive"))


StartAgent = Callable[..., RealAgent]


@pytest.fixture
def start_agent(agent_archive: Path, tmp_path: Path) -> Iterator[StartAgent]:
    """`start_agent(env={...}, command=..., directory=...)`: an agent that is ended after the test."""
    agents: list[RealAgent] = []
    # Markers must be the only ones of their kind on the machine.
    names = (f"agent-{os.getpid()}-{time.monotonic_ns()}-{number}" for number in itertools.count(1))

    def start(
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        directory: Path | None = None,
        **options: Any,
    ) -> RealAgent:
        place = (directory or tmp_path) / next(names)
        place.mkdir(mode=0o700)
        agent = RealAgent(place, command or agent_command(agent_archive), {**os.environ, **(env or {})}, **options)
        agents.append(agent)
        return agent

    yield start
    for agent in agents:
        agent.end()
