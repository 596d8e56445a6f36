"""The routes of `dstack doctor`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from dstack_core._models.server_config import DEFAULT_PROJECT
from dstack_core._models.wire import DoctorReport, FixReport, FixRequest, InstanceId
from dstack_core._server.bodies import answer, empty_answer, project_of, read
from dstack_core.errors import NotFoundError

Handler = Callable[[Request], Awaitable[Response]]


class Doctor(Protocol):
    """What the engine does for these routes (`_engine.doctor.Doctor`)."""

    async def examine(self) -> DoctorReport:
        """What there is, and what is wrong with it."""

    async def fix(self, wanted: Sequence[InstanceId]) -> FixReport:
        """Ends what is named and should not be there."""

    async def confirm_restore(self) -> None:
        """A person says that the database may forget what it lost."""


class DoctorApi:
    """The handlers. The clouds belong to the server, whose one project has all of them."""

    def __init__(self, doctor: Doctor) -> None:
        self._doctor = doctor

    def routes(self) -> Iterator[tuple[str, str, Handler]]:
        """Method, path, handler."""
        base = "/api/project/{project}/doctor"
        yield "GET", base, self.examine
        yield "POST", f"{base}/fix", self.fix
        yield "POST", f"{base}/confirm_restore", self.confirm_restore

    async def examine(self, request: Request) -> Response:
        """What there is, and what is wrong with it."""
        _check_project(request)
        return answer(await self._doctor.examine())

    async def fix(self, request: Request) -> Response:
        """Ends what is named and should not be there."""
        _check_project(request)
        body = await read(request, FixRequest)
        return answer(await self._doctor.fix(body.instances))

    async def confirm_restore(self, request: Request) -> Response:
        """A person says that the database may forget what it lost."""
        _check_project(request)
        await self._doctor.confirm_restore()
        return empty_answer()


def _check_project(request: Request) -> None:
    if project_of(request) != DEFAULT_PROJECT:
        raise NotFoundError(f"There is no project '{project_of(request)}' on this server.")
