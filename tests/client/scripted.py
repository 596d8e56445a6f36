"""A real HTTP server (uvicorn and Starlette, in a thread) whose answers a test writes."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dstack_core import __version__
from dstack_core._models.configurations import AppSpec, Task
from dstack_core._models.offers import Requirements
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import (
    InstanceResources,
    InstanceType,
    Job,
    JobProvisioningData,
    JobSpec,
    JobSubmission,
    Run,
    RunSpec,
    RunStatus,
)
from dstack_core._models.wire import API_VERSION, END_HEADER, OFFSET_HEADER, ServerInfo
from dstack_core.testing import wait_until

TOKEN = "a-token-that-nobody-may-see"
NOW = datetime(2026, 1, 1, tzinfo=UTC)

Answer = Callable[[dict[str, Any]], Response]


def info(**changes: Any) -> ServerInfo:
    """What a server of this version says about itself."""
    facts: dict[str, Any] = {
        "version": __version__,
        "api": API_VERSION,
        "pid": 1,
        "local": False,
        "home": "/nowhere",
        "prefix": "/usr",
        "python": "3.11.0",
        "started_at": NOW,
    }
    return ServerInfo(**{**facts, **changes})


def located(**changes: Any) -> JobProvisioningData:
    """An instance on the server's computer."""
    machine = InstanceType(name="this", resources=InstanceResources(cpus=2, memory_mib=4096))
    facts: dict[str, Any] = {
        "backend": "local",
        "instance_type": machine,
        "hostname": "127.0.0.1",
        "region": "local",
        "same_host_as_server": True,
    }
    return JobProvisioningData(**{**facts, **changes})


def run_model(
    status: RunStatus = RunStatus.RUNNING,
    *,
    ports: Sequence[tuple[int, int | None]] = (),
    at: JobProvisioningData | None = None,
    **changes: Any,
) -> Run:
    """A run with one job and one attempt."""
    specs = tuple(AppSpec(port=port, map_to_port=local, app_name=f"app-{port}") for port, local in ports)
    job = JobSpec(job_name="a-run-0-0", app_specs=specs, requirements=Requirements())
    attempt = JobSubmission(
        id=uuid.UUID(int=2), submission_num=0, submitted_at=NOW, status=status, job_provisioning_data=at
    )
    facts: dict[str, Any] = {
        "id": uuid.UUID(int=1),
        "project_name": "main",
        "user": "somebody",
        "run_name": "a-run",
        "submitted_at": NOW,
        "status": status,
        "run_spec": RunSpec(configuration=Task(commands=["true"]), profile=Profile()),
        "jobs": (Job(job_spec=job, job_submissions=(attempt,)),),
        "version": 1,
    }
    return Run(**{**facts, **changes})


def json_of(model: Any) -> Response:
    """A model as an answer."""
    return Response(model.model_dump_json(), media_type="application/json")


def refusal(status: int, code: str, *messages: str) -> Response:
    """A refusal as the real server writes it."""
    import json

    details = [{"code": code, "msg": message, "fields": []} for message in messages]
    return Response(json.dumps({"detail": details}), status, media_type="application/json")


def log_piece(offset: int, *pieces: bytes, breaks: bool = False) -> Response:
    """A piece of a run's output; `breaks` cuts the connection after it."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(0)
        if breaks:
            raise ConnectionAbortedError("scripted")

    return StreamingResponse(body(), headers={OFFSET_HEADER: str(offset)})


def lost(_: object) -> Response:
    """An answer that does not arrive: the connection dies in the middle of it."""

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        raise ConnectionAbortedError("scripted")

    return StreamingResponse(body(), headers={"content-length": "1000"})


def log_end(offset: int) -> Response:
    """The end of a run's output."""
    return Response(b"", headers={OFFSET_HEADER: str(offset), END_HEADER: "1"})


class ScriptedServer:
    """Answers each path with what `on` was told: one answer per request, the last one again and again.

    Attributes:
        url: its address.
        requests: what was asked: path, and body or query.
        headers: the headers of the latest request.
    """

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[str, str] = {}
        self._scripts: dict[str, list[Answer]] = {}
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST"])])
        # What it was told to raise is no news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self.on("server/info", lambda _: json_of(info()))

    def on(self, path: str, *answers: Answer) -> Self:
        """Says what requests to paths with this end are answered with."""
        self._scripts[path] = list(answers)
        return self

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The requests to paths with this end."""
        return [what for where, what in self.requests if where.endswith(path)]

    async def _answer(self, request: Request) -> Response:
        import json

        body = await request.body()
        path = request.path_params["path"]
        asked = json.loads(body) if body else dict(request.query_params)
        self.requests.append((path, asked))
        self.headers = dict(request.headers)
        for end, answers in self._scripts.items():
            if path.endswith(end):
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                return await asyncio.to_thread(answer, asked)
        return refusal(404, "not_found", f"nothing is scripted for {path}")

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._server.started, what="the scripted server")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
