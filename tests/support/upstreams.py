"""Replicas for tests of the proxy: real servers in this process that do exactly what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.servers: list[asyncio.Server] = []

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """The result of some work on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        """Ends all work, and the thread."""
        self.run(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def listen(self, start: Awaitable[asyncio.Server]) -> int:
        """Starts a server that ends with the loop. Its port."""
        self.servers.append(await start)
        return int(self.servers[-1].sockets[0].getsockname()[1])

    async def _cancel_all(self) -> None:
        for server in self.servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()


@dataclass
class Seen:
    """One request as a replica got it.

    Attributes:
        method, target: of the first line.
        headers: in their order; names in lower case.
        peer: number of the connection it came by.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    peer: int
    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)

    def header(self, name: str) -> str | None:
        """The value of a header, `None` if it is not there."""
        return next((value for known, value in self.headers if known == name), None)

    async def body(self) -> bytes:
        """The rest of the request."""
        if self.header("transfer-encoding") == "chunked":
            return b"".join([chunk async for chunk in self.chunks()])
        return await self.reader.readexactly(int(self.header("content-length") or 0))

    async def chunks(self) -> Any:
        """The chunks of a body without a length."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)

    async def answer(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()


Handler = Callable[[Seen], Awaitable[None]]


class Replica:
    """A server on a port of its own.

    Args:
        loop: where it runs.
        handler: answers one request; what it raises ends the connection.

    Attributes:
        port: where it listens.
        seen: all requests so far.
        connections: how many connections were made so far.
        open: how many are open now.
        broken: how many requests ended because the other side hung up.
    """

    def __init__(self, loop: LoopThread, handler: Handler) -> None:
        self.loop = loop
        self.handler = handler
        self.seen: list[Seen] = []
        self.connections = self.open = self.broken = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = loop.run(loop.listen(asyncio.start_server(self._serve, "127.0.0.1", 0)))
        self._server = loop.servers[-1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._writers.add(writer)
        peer = self.connections
        try:
            await self._answer_all(reader, writer, peer)
        except asyncio.CancelledError:
            # The test is over. Python 3.11's streams complain about a task that says so.
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: int) -> None:
        while True:
            try:
                request = await self._request(reader, writer, peer)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            try:
                await self.handler(request)
            except (asyncio.IncompleteReadError, ConnectionError):
                self.broken += 1
                return

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: int) -> Seen:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        self.seen.append(Seen(method, target, headers, peer, reader, writer))
        return self.seen[-1]

    def stop(self) -> None:
        """As if it were killed: nothing listens any more, and all connections are reset."""
        self.loop.run(self._stop())

    async def _stop(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()


def respond(body: bytes = b"ok", status: str = "200 OK", *headers: str) -> Handler:
    """A handler that reads the request and always answers the same."""
    lines = "".join(f"{header}\r\n" for header in headers)
    answer = f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def handler(request: Seen) -> None:
        await request.body()
        await request.answer(answer)

    return handler


def exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer at the end."""
    data = b""
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return data


@contextlib.contextmanager
def loop_thread() -> Iterator[LoopThread]:
    """An event loop in a thread, ended afterwards."""
    thread = LoopThread()
    try:
        yield thread
    finally:
        thread.close()
