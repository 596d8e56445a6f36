"""The routes: see the server's `agent_protocol` for what each document holds."""

from __future__ import annotations

import os
import time

from . import lean
from .code import Archives
from .gpus import read_gpus
from .job import Job
from .server import Refusal
from .spec import Spec
from .steps import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .loop import Loop, Timer
    from .server import Connection, Request
    from .steps import Steps

VERSION = "0.1.0"
PROTOCOL = 1
_LARGEST_PIECE = 8 << 20
_LONGEST_WAIT = 120.0


class Agent:
    """Holds the job and the lease, and answers requests about them."""

    def __init__(
        self, loop: Loop, directory: str, watchdog: int, first_lease: float, instance: str | None = None
    ) -> None:
        self._loop, self._directory, self._watchdog, self._instance = loop, directory, watchdog, instance
        self._job: Job | None = None
        self._archives = Archives(directory)
        self._lease: Timer
        self._lease_end = ""
        self._grace = first_lease
        self._lengthen(first_lease)
        self._leaving = False
        self._routes: dict[tuple[str, ...], Any] = {
            ("GET", "health"): self._health,
            ("PUT", "jobs", "ID"): self._put,
            ("GET", "jobs", "ID"): self._state,
            ("GET", "jobs", "ID", "log"): self._log,
            ("GET", "jobs", "ID", "metrics"): self._metrics,
            ("POST", "jobs", "ID", "stop"): self._stop,
            ("POST", "jobs", "ID", "activity"): self._activity,
            ("GET", "code", "ID"): self._code_size,
            ("PUT", "code", "ID"): self._put_code,
            ("PUT", "lease"): self._renew,
            ("POST", "shutdown"): self._shutdown,
        }

    def handle(self, request: Request, connection: Connection) -> None:
        """Answers one request, now or later."""
        _, version, *path = request.path.split("/")
        if version != "v1":
            raise Refusal(404, "this agent speaks protocol %d" % PROTOCOL)
        named = path[:1] in (["jobs"], ["code"])
        route = (request.method, *([path[0], "ID", *path[2:]] if named else path))
        answer = self._routes.get(route)
        if answer is None:
            raise Refusal(404, "no such thing: %s %s" % (request.method, request.path))
        answer(request, connection, *path[1:2])

    def leave(self) -> None:
        """Stops the job, then ends the agent."""
        if self._leaving:
            return
        self._leaving = True
        job = self._job
        if job is None or job.ended:
            self._loop.stop()
            return
        job.stop(job.spec.stop_grace)
        job.changed.when(lambda: job.ended, self._loop.stop)

    # ------------------------------------------------------------------------------------------------- routes --

    def _health(self, _: Request, connection: Connection) -> None:
        connection.reply(
            200,
            {
                "version": VERSION,
                "protocol": PROTOCOL,
                "pid": os.getpid(),
                "watchdog_pid": self._watchdog,
                "jobs": [self._job.id] if self._job else [],
                "lease_expires_at": self._lease_end,
                "instance": self._instance,
            },
        )

    def _put(self, request: Request, connection: Connection, job_id: str) -> None:
        document = _document(request)
        if self._job is None:
            self._job = Job(self._loop, job_id, self._complete(_spec(document)), self._directory)
            self._job.start()
        elif self._job.id != job_id:
            raise Refusal(409, "this agent already has job " + self._job.id)
        elif not self._job.spec.is_same(document):
            raise Refusal(409, "job %s is already there and asks for something else" % job_id)
        connection.reply(200, self._job.describe())

    def _state(self, request: Request, connection: Connection, job_id: str) -> None:
        job = self._find(job_id)
        after = request.number("after", -1)
        job.changed.answer(
            connection, lambda: job.seq > after, _wait(request), lambda: connection.reply(200, job.describe())
        )

    def _log(self, request: Request, connection: Connection, job_id: str) -> None:
        job = self._find(job_id)
        offset = int(request.number("offset", 0))
        limit = min(int(request.number("limit", 1 << 20)), _LARGEST_PIECE)
        if offset < 0 or limit < 1:
            raise Refusal(400, "offset must not be negative, and limit must be positive")
        job.written.answer(
            connection,
            lambda: job.spool.end > offset or job.ended,
            _wait(request),
            lambda: _reply_log(job, connection, offset, limit),
        )

    def _stop(self, request: Request, connection: Connection, job_id: str) -> None:
        job = self._find(job_id)
        grace = _document(request).get("grace", job.spec.stop_grace)
        if not isinstance(grace, (int, float)) or grace < 0:
            raise Refusal(400, "grace must be a number of seconds")
        job.stop(grace)
        connection.reply(200, job.describe())

    def _activity(self, _: Request, connection: Connection, job_id: str) -> None:
        self._find(job_id).note_activity()
        connection.reply(200, {})

    def _metrics(self, _: Request, connection: Connection, job_id: str) -> None:
        job = self._find(job_id)

        def steps() -> Steps:
            gpus = yield from read_gpus(job.spec.gpus)
            connection.reply(200, dict(job.usage(), gpus=gpus))

        Work(self._loop, steps(), lambda error: connection.reply(500, {"detail": str(error)}))

    def _complete(self, spec: Spec) -> Spec:
        """Which is meant for this machine, and whose code is here."""
        if spec.instance is not None and self._instance is not None and spec.instance != self._instance:
            raise Refusal(421, "this is instance %s, and the job is for %s" % (self._instance, spec.instance))
        if spec.code is not None and self._archives.size(spec.code["hash"]) != spec.code["size"]:
            raise Refusal(409, "the job's code is not here: %d bytes of it are to be sent first" % spec.code["size"])
        return spec

    def _code_size(self, _: Request, connection: Connection, name: str) -> None:
        connection.reply(200, {"size": self._size_of(name)})

    def _put_code(self, request: Request, connection: Connection, name: str) -> None:
        offset = int(request.number("offset", -1))
        if self._size_of(name) != offset:
            raise Refusal(
                409, "%d bytes of this archive are here, so nothing is added at %d" % (self._size_of(name), offset)
            )
        connection.reply(200, {"size": self._archives.append(name, offset, request.body)})

    def _size_of(self, name: str) -> int:
        """What the job was given counts as here, though it may be unpacked and gone."""
        code = self._job.spec.code if self._job else None
        return int(code["size"]) if code and code["hash"] == name else self._archives.size(name)

    def _renew(self, request: Request, connection: Connection) -> None:
        seconds = _document(request).get("seconds")
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            raise Refusal(400, "seconds must be a positive number")
        self._lease.cancel()
        self._lengthen(seconds)
        connection.reply(200, {"lease_expires_at": self._lease_end})

    def _lengthen(self, seconds: float) -> None:
        self._grace = seconds
        self._lease_end = lean.iso(time.time() + seconds)
        self._lease = self._loop.later(seconds, self._expired)

    def _expired(self) -> None:
        """Nobody cares for this instance any more. A job that runs is not to suffer for it."""
        job, lease = self._job, self._lease
        if job is None or job.ended:
            self._loop.stop()
        else:
            job.changed.when(lambda: job.ended, lambda: self._ended_alone(lease))

    def _ended_alone(self, lease: Timer) -> None:
        """A job ended after its server was given up: what it printed is kept for one more lease."""
        if self._lease is lease:
            self._lengthen(self._grace)

    def _shutdown(self, _: Request, connection: Connection) -> None:
        connection.on_sent = self._leave_at_once
        connection.reply(200, {})

    def _leave_at_once(self) -> None:
        if self._job:
            self._job.stop(0)
        self.leave()

    def _find(self, job_id: str) -> Job:
        if self._job is None or self._job.id != job_id:
            raise Refusal(404, "this agent has no job " + job_id)
        return self._job


def _spec(document: dict[str, Any]) -> Spec:
    try:
        return Spec(document)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(400, "no job: %s" % error) from None


def _reply_log(job: Job, connection: Connection, offset: int, limit: int) -> None:
    piece = job.spool.read(offset, limit)
    headers = "X-Log-Offset: %d\r\n" % piece.offset
    if piece.index:
        headers += "X-Log-Index: %s\r\n" % ",".join("%d:%d" % entry for entry in piece.index)
    if job.ended and piece.offset + piece.count >= job.spool.end:
        headers += "X-Log-End: 1\r\n"
    connection.reply_file(piece.file, piece.position, piece.count, headers)


def _wait(request: Request) -> float:
    return min(request.number("wait", 0), _LONGEST_WAIT)


def _document(request: Request) -> dict[str, Any]:
    try:
        document = lean.from_json(request.body.decode())
    except ValueError as error:
        raise Refusal(400, "the body is %s" % error) from None
    if not isinstance(document, dict):
        raise Refusal(400, "the body must be a JSON object")
    return document
