"""The HTTP API: from a request to a call of the service, and back. The routes are listed in `_models/wire.py`."""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC
from typing import Protocol
from uuid import UUID

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dstack_core._models.runs import Run, RunPlan, RunSpec
from dstack_core._models.server_config import DEFAULT_PROJECT
from dstack_core._models.wire import (
    END_HEADER,
    OFFSET_HEADER,
    BackendStatus,
    DeleteRunsRequest,
    GetPlanRequest,
    GetRunRequest,
    JobMetrics,
    ListRunsRequest,
    LogQuery,
    ServerInfo,
    StopRunsRequest,
    SubmitRequest,
)
from dstack_core._server.auth import LOCAL
from dstack_core._server.bodies import answer, answers, empty_answer, project_of, read
from dstack_core._server.refusals import no_such_route, refusal
from dstack_core._server.serving import OPEN_PATH, Life, Streamed, disconnected, unless_ended
from dstack_core.errors import NotFoundError, ServerClientError

Handler = Callable[[Request], Awaitable[Response]]

LONGEST_POLL = 60.0
REMOTE_USER = "admin"
"""The user of whoever has the token."""


class LogSource(Protocol):
    """A run's output from some offset on."""

    @property
    def offset(self) -> int:
        """Where the bytes start."""

    @property
    def end(self) -> bool:
        """True if there is nothing more to come, ever; then there are no chunks."""

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, in pieces of at most a few MiB."""


class Service(Protocol):
    """What the engine does for the API (`_engine.service.RunService`)."""

    async def get_plan(self, project: str, user: str, spec: RunSpec) -> RunPlan:
        """What would happen."""

    async def submit(self, project: str, user: str, spec: RunSpec, submit_key: UUID) -> Run:
        """Submits, once for each key."""

    async def get(self, project: str, request: GetRunRequest) -> Run:
        """One run, waiting for news if asked to."""

    async def list(self, project: str, all: bool, limit: int) -> list[Run]:
        """The runs of a project."""

    async def stop(self, project: str, request: StopRunsRequest) -> None:
        """Stops runs."""

    async def delete(self, project: str, names: Sequence[str]) -> None:
        """Deletes finished runs."""

    async def logs(self, project: str, run_id: UUID, query: LogQuery) -> LogSource:
        """A run's output."""

    async def metrics(self, project: str, run_id: UUID) -> JobMetrics:
        """What a run uses now."""

    async def note_activity(self, project: str, run_id: UUID) -> None:
        """Somebody is at work with a run."""


class Backends(Protocol):
    """What the hub of backends does for the API."""

    async def refresh(self) -> None:
        """Notices changed configuration and newly installed packages."""

    async def status(self, *, check: bool) -> Sequence[BackendStatus]:
        """All backends, with what is wrong with them."""


class Routes(Protocol):
    """Routes that are written elsewhere."""

    def routes(self) -> Iterator[tuple[str, str, Handler]]:
        """Method, path, handler."""


class Api:
    """The handlers. One instance per server process."""

    def __init__(
        self,
        service: Service,
        backends: Backends,
        life: Life,
        info: Callable[[], ServerInfo],
        service_submitted: Callable[[], Awaitable[None]],
        more: Sequence[Routes] = (),
    ) -> None:
        self._service = service
        self._backends = backends
        self._life = life
        self._info = info
        self._service_submitted = service_submitted
        self._more = more
        self._local_user = _user_name()

    def app(self) -> FastAPI:
        """The application with every route."""
        app = FastAPI(openapi_url=None, redirect_slashes=False, exception_handlers={HTTPException: _no_such_route})
        for method, path, handler in self._routes():
            app.router.add_route(path, _guarded(handler), methods=[method])
        return app

    def _routes(self) -> Iterator[tuple[str, str, Handler]]:
        project = "/api/project/{project}"
        yield "GET", OPEN_PATH, self.info
        yield "POST", "/api/server/shutdown", self.shutdown
        yield "POST", f"{project}/runs/get_plan", self.get_plan
        yield "POST", f"{project}/runs/submit", self.submit
        yield "POST", f"{project}/runs/get", self.get
        yield "POST", f"{project}/runs/list", self.list
        yield "POST", f"{project}/runs/stop", self.stop
        yield "POST", f"{project}/runs/delete", self.delete
        yield "GET", f"{project}/runs/{{run_id}}/logs", self.logs
        yield "GET", f"{project}/runs/{{run_id}}/metrics", self.metrics
        yield "POST", f"{project}/runs/{{run_id}}/activity", self.note_activity
        yield "GET", f"{project}/backends/list", self.list_backends
        for more in self._more:
            yield from more.routes()

    async def info(self, _: Request) -> Response:
        """Who answers."""
        return answer(self._info())

    async def shutdown(self, request: Request) -> Response:
        """Stops the server, after this answer."""
        if not _is_local(request):
            raise ServerClientError("This works only over the unix socket, on the server's own computer.")
        self._life.stop("a client asked for it")
        return empty_answer()

    async def get_plan(self, request: Request) -> Response:
        """What would happen, with the backends that are installed and configured now."""
        body = await read(request, GetPlanRequest)
        await self._backends.refresh()
        return answer(await self._service.get_plan(project_of(request), self._user(request), body.run_spec))

    async def submit(self, request: Request) -> Response:
        """Submits a run."""
        body = await read(request, SubmitRequest)
        user = self._user(request)
        run = await self._service.submit(project_of(request), user, body.run_spec, body.submit_key)
        if body.run_spec.configuration.type == "service":
            await self._service_submitted()
        return answer(run)

    async def get(self, request: Request) -> Response:
        """One run; a wait for news ends as well when the client hangs up or the server stops."""
        body = await read(request, GetRunRequest)
        body = body.model_copy(update={"wait": max(0.0, min(body.wait, LONGEST_POLL))})
        project = project_of(request)
        if body.wait and not self._life.stopping.is_set():
            ends = (disconnected(request.receive), self._life.stopping.wait())
            run = await unless_ended(self._service.get(project, body), *ends)
            if run is not None:
                return answer(run)
        return answer(await self._service.get(project, body.model_copy(update={"wait": 0.0})))

    async def list(self, request: Request) -> Response:
        """The runs of a project, newest first."""
        body = await read(request, ListRunsRequest)
        return answers(await self._service.list(project_of(request), body.all, body.limit))

    async def stop(self, request: Request) -> Response:
        """Stops runs."""
        body = await read(request, StopRunsRequest)
        await self._service.stop(project_of(request), body)
        return empty_answer()

    async def delete(self, request: Request) -> Response:
        """Deletes finished runs."""
        body = await read(request, DeleteRunsRequest)
        await self._service.delete(project_of(request), body.runs_names)
        return empty_answer()

    async def logs(self, request: Request) -> Response:
        """A run's output from an offset on; an answer without a body when there is nothing more to come."""
        query = _log_query(request)
        stream = await self._service.logs(project_of(request), _run_id(request), query)
        headers = {OFFSET_HEADER: str(stream.offset)}
        if stream.end:
            return Response(b"", headers={**headers, END_HEADER: "1"}, media_type="application/octet-stream")
        return Streamed(stream.chunks, self._life, headers)

    async def metrics(self, request: Request) -> Response:
        """What a run uses now."""
        return answer(await self._service.metrics(project_of(request), _run_id(request)))

    async def note_activity(self, request: Request) -> Response:
        """Somebody is at work with a run."""
        await self._service.note_activity(project_of(request), _run_id(request))
        return empty_answer()

    async def list_backends(self, request: Request) -> Response:
        """All backends, installed or configured."""
        if project_of(request) != DEFAULT_PROJECT:
            raise NotFoundError(f"There is no project '{project_of(request)}' on this server.")
        await self._backends.refresh()
        check = request.query_params.get("check", "").lower() in {"1", "true", "yes"}
        return answers(await self._backends.status(check=check))

    def _user(self, request: Request) -> str:
        return self._local_user if _is_local(request) else REMOTE_USER


def _guarded(handler: Handler) -> Handler:
    """The handler, with every exception turned into an answer."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as exc:  # noqa: BLE001  # the last line of defence: becomes a 500 with a number, and a line in the log
            return refusal(exc)

    return endpoint


async def _no_such_route(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 404
    return no_such_route(status, request.method, request.url.path)


def _log_query(request: Request) -> LogQuery:
    query = LogQuery.model_validate(dict(request.query_params))
    if query.start_time is None or query.start_time.tzinfo is not None:
        return query
    return query.model_copy(update={"start_time": query.start_time.replace(tzinfo=UTC)})


def _run_id(request: Request) -> UUID:
    text = str(request.path_params["run_id"])
    try:
        return UUID(text)
    except ValueError:
        raise NotFoundError(f"There is no run with the id {text!r}: ids are UUIDs.") from None


def _is_local(request: Request) -> bool:
    return LOCAL in request.scope["state"]


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
