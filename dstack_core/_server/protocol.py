"""uvicorn's protocol, with what it lacks: who the peer is, an end to long heads, hang-ups that are told, upgrades."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Protocol, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dstack_core._server.auth import LOCAL, peer_uid
from dstack_core._server.hangup import HANGUP, Hangup
from dstack_core._server.sockets import keep_alive

log = logging.getLogger(__name__)

LONGEST_HEAD = 64 << 10
"""Bytes that the head of a request may have."""

_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Upgrades(Protocol):
    """What takes over a connection whose client asks for another protocol."""

    def wants(self, url: bytes, protocol: bytes) -> bool:
        """Whether it takes this one; otherwise the request is answered as if it had not asked."""

    def take(self, connection: ServerProtocol, rest: bytes) -> None:
        """Takes the connection. `rest` is what came after the head of the request."""


class ServerProtocol(HttpToolsProtocol):
    """One connection of a client."""

    upgrades: Upgrades | None = None
    _refused = False
    _in_head = False
    _body_follows = False
    _head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Hangs up on other users, and marks the requests of this one."""
        connection = transport.get_extra_info("socket")
        self.hangup = Hangup()
        self.app_state = {**self.app_state, HANGUP: self.hangup}
        if connection.family == socket.AF_UNIX:
            uid = peer_uid(connection)
            if uid != os.geteuid():
                log.warning("Refused a connection from user %d", uid)
                self._refused = True
                transport.abort()
                return
            self.app_state[LOCAL] = True
        else:
            keep_alive(connection)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whoever is at work for this client."""
        if not self._refused:
            super().connection_lost(exc)
            self.hangup.happened()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        self._unset_keepalive_if_required()
        while data:
            data = self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        """Has the parser read; the bytes that it left."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._after_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(b"")
            return b""
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > LONGEST_HEAD:
                self._refuse(_TOO_LONG)
        return b""

    def _after_upgrade(self, rest: bytes) -> bytes:
        if self._should_upgrade():
            self.connections.discard(self)
            cast("Upgrades", self.upgrades).take(self, rest)
            return b""
        # An offer that nobody takes up: the body of this request follows, or the next one.
        if self._body_follows:
            self._body_follows = False
            self.parser = _inside_body(self)
        return rest

    def _unfinished(self) -> RequestResponseCycle | None:
        """The request that is being answered on this connection."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return None if cycle is None or cycle.response_complete else cycle

    def _refuse(self, answer: bytes) -> None:
        """Ends a connection on which no further request can be found."""
        cycle = self._unfinished()
        if cycle is not None and cycle.response_started:
            # Not into the middle of another answer.
            self.transport.abort()
        elif answer:
            self.transport.write(answer)
            self.transport.close()
        else:
            self.send_400_response("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_size = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head of a request is complete."""
        self._in_head = False
        self._body_follows = self.parser.should_upgrade() and self._has_body()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete, unless the parser has left out its body."""
        if not self._body_follows:
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        """Only where somebody takes it, nothing else is under way on this connection, and the request has no body."""
        if self.upgrades is None or self._unfinished() is not None:
            return False
        protocol = self._get_upgrade()
        return protocol is not None and self.upgrades.wants(self.url, protocol) and not self._has_body()

    def _has_body(self) -> bool:
        return any(name in _FRAMING and value != b"0" for name, value in self.headers)


_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class _Resumed:
    """What a parser calls that was put into the middle of a request; the head that brought it there is no news."""

    def __init__(self, connection: ServerProtocol) -> None:
        self._connection = connection
        self.news = False

    def on_message_begin(self) -> None:
        if self.news:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self.news:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.news:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.news:
            self._connection.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._connection.on_body(body)

    def on_message_complete(self) -> None:
        self._connection.on_message_complete()


def _inside_body(connection: ServerProtocol) -> httptools.HttpRequestParser:
    """A parser that goes on with the body of the request whose head is known.

    httptools takes all that follows a request with an upgrade for bytes of the other protocol. A client that merely
    offers HTTP/2 with its request, as Java's does, would lose the body, or see it taken for the next request.
    """
    resumed = _Resumed(connection)
    parser = httptools.HttpRequestParser(resumed)
    lines = [b"%b: %b\r\n" % header for header in connection.headers if header[0] in _FRAMING]
    parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(lines))
    resumed.news = True
    return parser


def server_protocol(upgrades: Upgrades | None) -> type[ServerProtocol]:
    """The protocol of a server that hands upgrades over to that object."""
    return type("BoundProtocol", (ServerProtocol,), {"upgrades": upgrades})
