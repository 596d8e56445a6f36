"""A server whose engine is a dictionary; everything in front of it is real. Run as `python fake_server.py --local`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from dstack_core._models.offers import Requirements
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import JobPlan, JobSpec, Run, RunPlan, RunSpec, RunStatus
from dstack_core._models.services import Service
from dstack_core._models.wire import (
    BackendStatus,
    GetRunRequest,
    JobMetrics,
    LogQuery,
    StopRunsRequest,
)
from dstack_core._server.__main__ import main
from dstack_core._server.app import Parts
from dstack_core._transport import AgentUnreachable
from dstack_core.errors import ConfigurationError, NoOffersError, NotFoundError, RunNameTakenError

NAMES = UUID("0d3a2f6e-6a43-4d5e-9f0e-6a1f0c6f2a11")
PIECE = bytes(range(256)) * 4096


@dataclass(frozen=True)
class FakeStream:
    """What `FakeService.logs` returns."""

    offset: int
    end: bool
    chunks: AsyncIterator[bytes]


class FakeService:
    """Runs that never run. `boom` fails with a secret in its message; `nothing-fits` finds no offers."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs: dict[str, Run] = {}
        self._keys: dict[UUID, str] = {}

    async def get_plan(self, project: str, user: str, spec: RunSpec) -> RunPlan:
        self._check(project)
        job = JobPlan(job_spec=JobSpec(job_name="x-0-0", requirements=Requirements()))
        return RunPlan(project_name=project, user=user, run_spec=spec, job_plans=(job,))

    async def submit(self, project: str, user: str, spec: RunSpec, submit_key: UUID) -> Run:
        self._check(project)
        name = spec.run_name or "some-run"
        if name == "boom":
            raise RuntimeError("the password is hunter2")
        if name == "nothing-fits":
            raise NoOffersError("local: this computer has no GPU")
        if name in self._runs and self._keys.get(submit_key) != name:
            raise RunNameTakenError(f"A run named {name} is active. Stop it, or choose another name.")
        self._keys[submit_key] = name
        now = datetime.now(UTC)
        self._runs[name] = Run(
            id=uuid5(NAMES, name),
            project_name=project,
            user=user,
            run_name=name,
            submitted_at=now,
            status=RunStatus.SUBMITTED,
            run_spec=spec,
        )
        return self._runs[name]

    async def get(self, project: str, request: GetRunRequest) -> Run:
        self._check(project)
        run = self._find(request.run_name or "")
        if request.after_version is not None and request.wait:
            self.note("polling")
            try:
                await asyncio.sleep(request.wait)
            except asyncio.CancelledError:
                self.note("poll cancelled")
                raise
        return run

    async def list(self, project: str, all: bool, limit: int) -> list[Run]:
        self._check(project)
        kept = self._home / "runs.json"
        if kept.exists():
            # Services of an earlier server.
            for name in json.loads(kept.read_text()):
                spec = RunSpec(run_name=name, configuration=Service(port=80, commands=["serve"]), profile=Profile())
                await self.submit(project, "", spec, uuid5(NAMES, name))
        return list(self._runs.values())[:limit]

    async def stop(self, project: str, request: StopRunsRequest) -> None:
        for name in request.runs_names:
            self._find(name)

    async def delete(self, project: str, names: Sequence[str]) -> None:
        for name in names:
            del self._runs[self._find(name).run_name]

    async def logs(self, project: str, run_id: UUID, query: LogQuery) -> FakeStream:
        """`offset` 0 is a stream of 256 MiB, 1 one that never says anything, 2 the end, 3 one that breaks off."""
        return FakeStream(query.offset, query.offset == 2, self._chunks(query))

    async def _chunks(self, query: LogQuery) -> AsyncIterator[bytes]:
        try:
            if query.offset == 1:
                yield b"hello\n"
                await asyncio.sleep(3600)
            if query.offset == 3:
                yield b"hello\n"
                raise RuntimeError("the password is hunter2")
            for _ in range(256):
                yield PIECE
        finally:
            self.note("stream closed")

    async def metrics(self, project: str, run_id: UUID) -> JobMetrics:
        return JobMetrics(at=datetime.now(UTC), cpu_seconds=1.5, memory_mib=20, processes=3)

    async def note_activity(self, project: str, run_id: UUID) -> None:
        self.note(f"activity in {project}: {run_id}")

    def _find(self, name: str) -> Run:
        if name not in self._runs:
            raise NotFoundError(f"There is no run named {name}.")
        return self._runs[name]

    def _check(self, project: str) -> None:
        if project != "main":
            raise NotFoundError(f"There is no project named {project}.")

    def note(self, event: str) -> None:
        """Lets the test see what happened in here, unless it has taken the home folder away."""
        with contextlib.suppress(FileNotFoundError), (self._home / "events").open("a") as file:
            file.write(f"{event}\n")

    async def is_idle(self) -> bool:
        return not (self._home / "busy").exists()


class FakeBackends:
    """One backend."""

    async def refresh(self) -> None:
        """Nothing changes."""

    async def status(self, *, check: bool) -> list[BackendStatus]:
        problems = ("no credentials",) if check else ()
        return [BackendStatus(name="local", title="This computer", state="configured", problems=problems)]


@dataclass(frozen=True)
class FakeReplica:
    """Whatever listens on a port of this computer; `0` is one that cannot be reached at all."""

    key: UUID
    port: int

    async def connect(self) -> socket.socket:
        if not self.port:
            raise AgentUnreachable("No agent answers.")
        connection = socket.socket()
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        except BaseException:
            connection.close()
            raise
        return connection


@dataclass(frozen=True)
class FakeView:
    """A service as the file says."""

    run_id: UUID
    project: str
    name: str
    ready: tuple[FakeReplica, ...]
    auth: bool = True
    strip_prefix: bool = True
    model: str | None = None
    model_prefix: str = "/v1"
    problem: str | None = None


class FakeDirectory:
    """The services in the file `services.json` of the home folder: names, and the ports of the ready replicas."""

    def __init__(self, home: Path, service: FakeService) -> None:
        self._file = home / "services.json"
        self._service = service
        self._suspects: set[UUID] = set()
        self._stamp = (0, 0)
        self._services: dict[str, dict[str, Any]] = {}

    async def find(self, project: str, run_name: str) -> FakeView:
        self._service._check(project)
        return self._view(run_name)

    async def models(self, project: str) -> list[FakeView]:
        self._service._check(project)
        views = [self._view(name) for name in self._read()]
        return [view for view in views if view.model is not None]

    async def wait_for_ready(self, run_id: UUID, seconds: float) -> FakeView:
        name = next((name for name in self._read() if uuid5(NAMES, name) == run_id), "gone")
        end = asyncio.get_running_loop().time() + min(seconds, self._services.get(name, {}).get("patience", seconds))
        self._service.note("waiting for a replica")
        try:
            while not (view := self._view(name)).ready and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  # looks at a file
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self._service.note("wait cancelled")
            raise
        return view

    def suspect(self, run_id: UUID, key: UUID) -> None:
        self._suspects.add(key)
        self._service.note(f"suspect {key.int}")

    def _read(self) -> dict[str, dict[str, Any]]:
        found = self._file.stat() if self._file.exists() else None
        stamp = (found.st_mtime_ns, found.st_ino) if found else (0, 0)
        if stamp != self._stamp:
            self._stamp = stamp
            self._services = json.loads(self._file.read_text()) if found else {}
            self._suspects.clear()
        return self._services

    def _view(self, name: str) -> FakeView:
        if name not in self._read():
            raise NotFoundError(f"There is no service named {name}.")
        fields = dict(self._services[name])
        fields.pop("patience", None)
        replicas = [FakeReplica(UUID(int=port), port) for port in fields.pop("ports")]
        ready = tuple(replica for replica in replicas if replica.key not in self._suspects)
        return FakeView(uuid5(NAMES, name), "main", name, ready, **fields)


@contextlib.asynccontextmanager
async def composed(home: Path) -> AsyncIterator[Parts]:
    """In place of `app.composed`."""
    if (home / "server" / "config.yml").exists():
        raise ConfigurationError("server/config.yml, line 1: no such backend")
    service = FakeService(home)
    yield Parts(service, FakeBackends(), service.is_idle, FakeDirectory(home, service))
    service.note("engine stopped")


if __name__ == "__main__":
    if "FAKE_WITHOUT_UVLOOP" in os.environ:
        # As where it is not installed: to import `None` is an ImportError.
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # documented, but not typed
    sys.exit(main(sys.argv[1:], composed))
