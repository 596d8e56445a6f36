"""Forwards local ports to where a job listens, in one thread for all ports and connections of a run."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass

PIECE = 1 << 18
CONNECT_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0


@dataclass(frozen=True)
class Forward:
    """Connections accepted by `listener` go to `place`: a host and a port, or a unix socket."""

    listener: socket.socket
    place: tuple[str, int] | str


class Forwarder:
    """Forwards from its making until `close`, which ends the open connections, too."""

    def __init__(self, forwards: Iterable[Forward]) -> None:
        self._forwards = list(forwards)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="dstack-attach", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops, and gives the ports back. May be called twice."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for forward in self._forwards:
                server = await asyncio.start_server(self._handler(forward), sock=forward.listener, limit=PIECE)
                stack.callback(server.close)
            await self._stop.wait()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _handler(self, forward: Forward):  # type: ignore[no-untyped-def]  # noqa: ANN202  # a callback of asyncio's own shape
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(_connect(forward, reader, writer))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

        return accepted


async def _connect(forward: Forward, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, from its begin to its end. If nobody listens at the other side, it just ends."""
    with contextlib.suppress(OSError, TimeoutError), contextlib.closing(writer):
        async with asyncio.timeout(CONNECT_TIMEOUT):
            there = await _open(forward.place)
        with contextlib.closing(there[1]):
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, there[1]))
                both.create_task(_pump(there[0], writer))


async def _open(place: tuple[str, int] | str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(place, str):
        return await asyncio.open_unix_connection(place, limit=PIECE)
    return await asyncio.open_connection(*place, limit=PIECE)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies one direction; its end is passed on, so that the other side can finish what it says."""
    try:
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        # The connection is broken in both directions.
        writer.transport.abort()
