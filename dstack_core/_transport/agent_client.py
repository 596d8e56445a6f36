"""The exchange with one agent: HTTP/1.1 over stream sockets, straight on the event loop.

No HTTP library: the agent's answers are always one head and one body of known length, so the body is received
directly into its place, and a connection costs a socket and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dstack_core._transport.agent_protocol import (
    PROTOCOL,
    AgentHealth,
    AgentJobSpec,
    AgentRefused,
    AgentState,
    AgentUnreachable,
    JobMetrics,
    LogChunk,
)

T = TypeVar("T")

Open = Callable[[], Coroutine[Any, Any, socket.socket]]
"""Makes a new non-blocking, connected stream socket to the agent; raises `OSError`."""

_HEAD = 1 << 16
_MISDIRECTED = 421
_PATIENCE = 30.0
"""Seconds without an answer, beyond what was asked to wait, after which an agent counts as unreachable."""


class Answer:
    """Status, headers and body of one response."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


class AgentClient:
    """An `AgentConnection` over the sockets that `open` makes; as many as there are calls at the same time."""

    def __init__(self, open_socket: Open, name: str, patience: float = _PATIENCE) -> None:
        self._open = open_socket
        self._name = name
        self._patience = patience
        self._idle: list[socket.socket] = []

    async def health(self) -> AgentHealth:
        """Who answers."""
        return await self._call(AgentHealth.parse, "GET", "/v1/health")

    async def put_job(self, job_id: str, spec: AgentJobSpec) -> AgentState:
        """Starts the job, once."""
        return await self._call(AgentState.parse, "PUT", f"/v1/jobs/{job_id}", spec.document())

    async def job_state(self, job_id: str, after: int = -1, wait: float = 0) -> AgentState:
        """As soon as `seq` is greater than `after`, or after `wait` seconds."""
        return await self._call(AgentState.parse, "GET", f"/v1/jobs/{job_id}?after={after}&wait={wait:g}", wait=wait)

    async def read_log(self, job_id: str, offset: int, wait: float = 0.0, limit: int = 1 << 20) -> LogChunk:
        """As soon as there is something from `offset` on, or after `wait` seconds."""
        target = f"/v1/jobs/{job_id}/log?offset={offset}&wait={wait:g}&limit={limit}"
        answer = await self._request("GET", target, wait=wait)
        with self._understanding():
            index = answer.headers.get("x-log-index", "")
            return LogChunk(
                offset=int(answer.headers["x-log-offset"]),
                data=answer.body,
                index=tuple(_pair(item) for item in index.split(",") if item),
                end="x-log-end" in answer.headers,
            )

    async def code_size(self, code_hash: str) -> int:
        """How much of an archive the agent has."""
        return await self._call(_size, "GET", f"/v1/code/{code_hash}")

    async def put_code(self, code_hash: str, offset: int, data: bytes) -> int:
        """Adds a piece of an archive."""
        answer = await self._send("PUT", f"/v1/code/{code_hash}?offset={offset}", data)
        with self._understanding():
            return _size(json.loads(answer.body))

    async def note_activity(self, job_id: str) -> None:
        """Somebody is at work."""
        await self._request("POST", f"/v1/jobs/{job_id}/activity", {})

    async def stop_job(self, job_id: str, grace: float) -> AgentState:
        """SIGTERM, and SIGKILL to all that is left after `grace` seconds."""
        return await self._call(AgentState.parse, "POST", f"/v1/jobs/{job_id}/stop", {"grace": grace})

    async def metrics(self, job_id: str) -> JobMetrics:
        """What the job uses."""
        return await self._call(JobMetrics.parse, "GET", f"/v1/jobs/{job_id}/metrics")

    async def renew_lease(self, seconds: float) -> None:
        """Without a renewal the agent ends itself after this time, when no job runs."""
        await self._request("PUT", "/v1/lease", {"seconds": seconds})

    async def shutdown(self) -> None:
        """Ends the agent; a job that still runs is killed."""
        await self._request("POST", "/v1/shutdown", {})

    async def aclose(self) -> None:
        """Closes the idle sockets; the agent goes on."""
        self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    # ----------------------------------------------------------------------------------------------- exchange --

    async def _call(
        self, parse: Callable[[dict[str, Any]], T], method: str, target: str, document: object = None, wait: float = 0.0
    ) -> T:
        answer = await self._request(method, target, document, wait)
        with self._understanding():
            return parse(json.loads(answer.body))

    @contextmanager
    def _understanding(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AgentUnreachable(f"What answers at {self._name} is no agent of protocol {PROTOCOL}.") from error

    async def _request(self, method: str, target: str, document: object = None, wait: float = 0.0) -> Answer:
        return await self._send(method, target, b"" if document is None else json.dumps(document).encode(), wait)

    async def _send(self, method: str, target: str, body: bytes, wait: float = 0.0) -> Answer:
        request = f"{method} {target} HTTP/1.1\r\nHost: agent\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            async with asyncio.timeout(wait + self._patience):
                answer = await self._exchange(request)
        except TimeoutError:
            raise AgentUnreachable(f"The agent at {self._name} has not answered for {self._patience:g} s.") from None
        except OSError as error:
            raise AgentUnreachable(f"No agent answers at {self._name} ({error.strerror or error}).") from error
        if answer.status == _MISDIRECTED:
            raise AgentUnreachable(f"At {self._name} another machine answers: {_detail(answer)}.")
        if answer.status >= 400:
            raise AgentRefused(answer.status, _detail(answer))
        return answer

    async def _exchange(self, request: bytes) -> Answer:
        """On an idle socket if there is one. If that turns out to be broken, once more on a new one."""
        while self._idle:
            try:
                return await self._on(self._idle.pop(), request)
            except OSError:
                self._close_idle()
        return await self._on(await self._open(), request)

    async def _on(self, connection: socket.socket, request: bytes) -> Answer:
        try:
            await asyncio.get_running_loop().sock_sendall(connection, request)
            answer = await _receive(connection)
        except BaseException:
            # Cancelled, too: nobody must find the rest of this answer on the socket.
            connection.close()
            raise
        self._idle.append(connection)
        return answer


async def _receive(connection: socket.socket) -> Answer:
    loop = asyncio.get_running_loop()
    head = bytearray()
    while (end := head.find(b"\r\n\r\n")) < 0:
        piece = await loop.sock_recv(connection, _HEAD)
        if not piece or len(head) > _HEAD:
            raise ConnectionResetError("it closed the connection")
        head += piece
    status, headers = _parse_head(head[:end].decode("latin-1"))
    body = bytearray(int(headers["content-length"]))
    begun = head[end + 4 :]
    body[: len(begun)] = begun
    await _fill(connection, memoryview(body)[len(begun) :])
    return Answer(status, headers, bytes(body))


def _parse_head(head: str) -> tuple[int, dict[str, str]]:
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    words = first.split(" ", 2)
    if len(words) < 2 or not words[1].isdigit() or not headers.get("content-length", "").isdigit():
        raise ConnectionError("it does not speak HTTP as an agent does")
    return int(words[1]), headers


async def _fill(connection: socket.socket, rest: memoryview) -> None:
    loop = asyncio.get_running_loop()
    while rest:
        count = await loop.sock_recv_into(connection, rest)
        if not count:
            raise ConnectionResetError("it closed the connection")
        rest = rest[count:]


def _size(document: dict[str, Any]) -> int:
    return int(document["size"])


def _pair(item: str) -> tuple[int, int]:
    offset, _, stamp = item.partition(":")
    return int(offset), int(stamp)


def _detail(answer: Answer) -> str:
    try:
        return str(json.loads(answer.body)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the agent answered {answer.status}"
