"""One connection to a replica: a request goes out, an answer comes in, both at the same time and no faster than wanted.

One consumer reads the answer (`head`, `whole`, `piece`); one producer may write the body of the request meanwhile
(`may_send_body`, `write`, `drain`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

if TYPE_CHECKING:
    from dstack_core._server.proxy.heads import Header

ENOUGH = 128 << 10
"""Bytes of an answer that may wait for the client before no more are read."""
LONGEST_HEAD = 64 << 10
"""Bytes that the head of an answer may have."""


class Broken(Exception):
    """The replica went away before its answer was complete, or what it sent is no answer.

    Args:
        reason: for people.
        nonsense: it did answer, but not as HTTP has it: the same request again would get the same.
    """

    def __init__(self, reason: str, *, nonsense: bool = False) -> None:
        super().__init__(reason)
        self.nonsense = nonsense


class Upstream(asyncio.Protocol):
    """One connection.

    Attributes:
        status, headers: of the answer; names in lower case.
        length: bytes of the body as its head says; `None` if it does not.
        has_head: true once status and headers are there.
        complete: true once the whole answer is there.
        sent: set by the producer when the whole request is out.
        switched: true after an answer 101: from now on these are bytes of another protocol, `tail` the first of them.
        reused: true from the second request on.
        lost: true once the connection is gone.
        idle_since: when the last exchange ended, by the loop's clock.
        on_lost: called when an idle connection ends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._consumer: asyncio.Future[None] | None = None
        self._producer: asyncio.Future[None] | None = None
        self._write_paused = False
        self._busy = False
        self.lost = False
        self.reused = False
        self.idle_since = 0.0
        self.on_lost: OnLost | None = None
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self.length: int | None = None
        self.has_head = self.complete = self.sent = self.switched = False
        self.tail = b""
        self._pieces: list[bytes] = []
        self._size = self._head_size = 0
        self._read_paused = False
        self._broken: Broken | None = None
        self._continue = self._until_close = self._keep_alive = self._extra = False
        self._bodiless = self._upgrades = False

    # ----------------------------------------------------------------------------------------------- one exchange --

    def begin(self, *, bodiless: bool, upgrades: bool) -> None:
        """Makes ready for the next exchange.

        Args:
            bodiless: the request is a HEAD: its answer has no body, whatever length it names.
            upgrades: an answer 101 makes sense.
        """
        if self._busy:
            self._reset()
            self.reused = True
        self._busy, self._bodiless, self._upgrades = True, bodiless, upgrades

    def write(self, data: bytes) -> None:
        """Sends a part of the request."""
        self.transport.write(data)

    async def drain(self) -> None:
        """Returns when more may be written."""
        while self._write_paused and not self.lost:
            await self._produced()

    async def may_send_body(self, patience: float) -> bool:
        """Waits until the replica asks for the body, but no longer than that; false if it has answered without it."""
        try:
            async with asyncio.timeout(patience):
                while not (self._continue or self.has_head or self.lost):
                    await self._produced()
        except TimeoutError:
            # A replica that does not know `Expect` waits for the body.
            return True
        return not (self.has_head or self.lost)

    async def head(self) -> None:
        """Returns when status and headers are there. Raises `Broken`."""
        while not self.has_head:
            if self._broken is not None:
                raise self._broken
            await self._consumed()

    async def whole(self) -> None:
        """Returns when the whole answer is there; it must be a small one. Raises `Broken`."""
        while not self.complete:
            if self._broken is not None:
                raise self._broken
            await self._consumed()

    async def piece(self) -> tuple[bytes, bool]:
        """The next bytes of the body, and whether there are more to come. Raises `Broken`."""
        while not (self._pieces or self.complete):
            if self._broken is not None:
                raise self._broken
            await self._consumed()
        pieces, self._pieces, self._size = self._pieces, [], 0
        if self._read_paused:
            self._read_paused = False
            if not self.lost:
                self.transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), not self.complete

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self.complete and self.sent and self._keep_alive and not (self._extra or self.lost or self.switched)

    def abort(self) -> None:
        """Ends the connection at once."""
        self.lost = True
        self.transport.abort()

    async def _consumed(self) -> None:
        self._consumer = self._loop.create_future()
        await self._consumer

    async def _produced(self) -> None:
        self._producer = self._loop.create_future()
        await self._producer

    def _wake(self) -> None:
        if (waiter := self._consumer) is not None:
            self._consumer = None
            if not waiter.done():
                waiter.set_result(None)
        if self._producer is not None:
            self._wake_producer()

    def _wake_producer(self) -> None:
        if (waiter := self._producer) is not None:
            self._producer = None
            if not waiter.done():
                waiter.set_result(None)

    # ------------------------------------------------------------------------------------------ what the loop calls --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if not self._busy or self.complete:
            # Nobody asked: whatever this is, it must not be taken for the answer to the next request.
            self._extra = True
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._nonsense(f"it sent what is not HTTP/1.1 ({error})")
        if not self.has_head:
            self._head_size += len(data)
            if self._head_size > LONGEST_HEAD:
                self._nonsense(f"the head of its answer is longer than {LONGEST_HEAD >> 10} KiB")
        elif self._size > ENOUGH and not self._read_paused and not self.complete:
            self._read_paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.lost = True
        if self._busy and not self.complete:
            if self.has_head and self._until_close and exc is None:
                self.complete = True
            elif self._broken is None:
                self._broken = Broken("it closed the connection before its answer was complete")
        self._wake()
        if self.on_lost is not None:
            self.on_lost(self)

    def pause_writing(self) -> None:
        """The replica does not take more for now."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """The replica takes more."""
        self._write_paused = False
        self._wake_producer()

    def _switch(self, tail: bytes) -> None:
        if self.status == 101 and self.has_head:
            self.switched, self.tail = True, tail
            self.transport.pause_reading()
        else:
            self._nonsense("it offers another protocol instead of an answer")

    def _nonsense(self, reason: str) -> None:
        self._extra = True
        if not self.complete and self._broken is None:
            self._broken = Broken(reason, nonsense=True)
        self.abort()

    # ---------------------------------------------------------------------------------------- what the parser calls --

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is dropped."""
        if not self.has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head of an answer is complete; those of interim answers are dropped."""
        if self.complete:
            self._extra = True
            return
        status = self._parser.get_status_code()
        if status < 200 and status != 101:
            self._continue = self._continue or status == 100
            self.headers = []
            self._wake_producer()
            return
        self.status = status
        self._keep_alive = self._parser.should_keep_alive()
        self._read_framing()
        if self._broken is not None:
            return
        self.has_head = True
        if self._bodiless:
            self.complete = True
            # The parser waits for the body that its head promised.
            self._parser, self._keep_alive = self._fresh_parser(), self._keep_alive and not self._until_close

    def _fresh_parser(self) -> httptools.HttpResponseParser:
        return httptools.HttpResponseParser(self)

    def _read_framing(self) -> None:
        chunked = False
        for name, value in self.headers:
            if name == b"content-length":
                self.length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
                if value.lower() != b"chunked":
                    self._nonsense(f"it uses the transfer-encoding {value.decode('latin-1')!r}")
        self._until_close = not chunked and self.length is None and self.status not in {204, 304}
        if chunked:
            self.length = None
        agreed = self._upgrades and self._parser.should_upgrade()
        if self.status > 599 or (self.status == 101 and not agreed):
            self._nonsense(f"it answered with status {self.status}")

    def on_body(self, data: bytes) -> None:
        """Bytes of the body."""
        if self.complete:
            self._extra = True
        else:
            self._pieces.append(data)
            self._size += len(data)

    def on_message_complete(self) -> None:
        """The answer is complete, or an interim one."""
        if self.has_head:
            self.complete = True


if TYPE_CHECKING:
    from collections.abc import Callable

    OnLost = Callable[[Upstream], None]
