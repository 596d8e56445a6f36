"""HTTP/1.1 over a unix socket, as a transport of httpx. Imported with the first request only, as it needs httpx.

It is here because a request to the server of this computer takes less time than httpx's own transport spends on it,
and because output comes through it in large pieces, without a copy in between.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import httpx

PIECE = 1 << 18
"""Bytes that are asked of a socket at once: more than it holds."""
LONGEST_HEAD = 64 << 10
"""Bytes that the head of an answer may have."""
_SMALL = 1 << 16


class UnixTransport(httpx.BaseTransport):
    """Keeps connections for the next request. Safe to use from several threads.

    Args:
        address: the address of the socket.
        limits: how many idle connections are kept, and for how long.
    """

    def __init__(self, address: str, limits: httpx.Limits) -> None:
        self._address = address
        self._most = limits.max_keepalive_connections
        self._expiry = limits.keepalive_expiry
        self._idle: deque[_Link] = deque()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request, and returns its answer when the head of that is here."""
        timeouts = request.extensions.get("timeout", {})
        link = self._kept() or _Link(self._address, timeouts.get("connect"))
        try:
            with _told(httpx.WriteTimeout, httpx.WriteError):
                link.send(request, timeouts.get("write"))
            with _told(httpx.ReadTimeout, httpx.ReadError):
                status, headers = link.head(timeouts.get("read"))
            body = _Body(self, link, _pieces(link, request.method, status, headers), _stays_open(headers))
        except BaseException:
            link.close()
            raise
        return httpx.Response(status, headers=headers, stream=body)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def keep(self, link: _Link) -> None:
        """Has a connection whose answer was read wait for the next request."""
        link.idle_since = time.monotonic()
        if self._most is not None and len(self._idle) >= self._most:
            link.close()
        else:
            self._idle.append(link)

    def _kept(self) -> _Link | None:
        """The connection that was used last, unless the server has closed it meanwhile."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                link = self._idle.pop()
                if link.is_good(self._expiry):
                    return link
                link.close()
        return None


class _Link:
    """One connection, and what was read ahead of it."""

    def __init__(self, address: str, timeout: float | None) -> None:
        self._ahead = b""
        self.idle_since = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _told(httpx.ConnectTimeout, httpx.ConnectError):
                self._socket.settimeout(timeout)
                self._socket.connect(address)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Closes it."""
        self._socket.close()

    def is_good(self, expiry: float | None) -> bool:
        """Whether another request may be sent: there is nothing to read, not even its end."""
        if expiry is not None and time.monotonic() - self.idle_since > expiry:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not self._ahead and not poll.poll(0)

    def send(self, request: httpx.Request, timeout: float | None) -> None:
        """Sends a request. A server that has refused it already may have stopped to read: its answer is here then."""
        self._socket.settimeout(timeout)
        chunked = request.headers.get("transfer-encoding") == "chunked"
        waiting = _head_of(request)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in _framed(request, chunked=chunked):
                # What is small goes together.
                if len(waiting) + len(piece) > _SMALL:
                    self._socket.sendall(waiting)
                    waiting = b""
                waiting += piece
            self._socket.sendall(waiting)

    def head(self, timeout: float | None) -> tuple[int, list[tuple[bytes, bytes]]]:
        """The head of the answer: its status, and its headers."""
        self._socket.settimeout(timeout)
        while True:
            first, *lines = self._until(b"\r\n\r\n", LONGEST_HEAD).split(b"\r\n")
            status = _status_of(first)
            if status >= 200:
                pairs = (line.partition(b":") for line in lines)
                return status, [(name, value.strip()) for name, _, value in pairs]

    def line(self) -> bytes:
        """The next line, without its end."""
        return self._until(b"\r\n", LONGEST_HEAD)

    def some(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end of the connection."""
        if not self._ahead:
            self._ahead = self._read()
        if len(self._ahead) <= most:
            taken, self._ahead = self._ahead, b""
        else:
            taken, self._ahead = self._ahead[:most], self._ahead[most:]
        return taken

    def _until(self, mark: bytes, most: int) -> bytes:
        while (end := self._ahead.find(mark)) < 0:
            more = self._read()
            if not more or len(self._ahead) > most:
                raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
            self._ahead += more
        found, self._ahead = self._ahead[:end], self._ahead[end + len(mark) :]
        return found

    def _read(self) -> bytes:
        return self._socket.recv(PIECE)


class _Body(httpx.SyncByteStream):
    """The body of an answer, as it comes. Read to its end, it gives the connection back; closed before, it ends it."""

    def __init__(self, transport: UnixTransport, link: _Link, pieces: Iterator[bytes], stays_open: bool) -> None:
        self._transport = transport
        self._link = link
        self._pieces = pieces
        self._stays_open = stays_open
        self._done = False

    def __iter__(self) -> Iterator[bytes]:
        with _told(httpx.ReadTimeout, httpx.ReadError):
            yield from self._pieces
        if self._stays_open and not self._done:
            self._done = True
            self._transport.keep(self._link)

    def close(self) -> None:
        """Whoever does not read on needs the connection no more."""
        if not self._done:
            self._done = True
            self._link.close()


def _head_of(request: httpx.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("A header has a line break in it.")
    return head + b"\r\n\r\n"


def _framed(request: httpx.Request, *, chunked: bool) -> Iterator[bytes]:
    """The body of a request, as it is sent."""
    stream: Any = request.stream
    for piece in stream:
        if not chunked:
            yield piece
        elif piece:
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
    if chunked:
        yield b"0\r\n\r\n"


def _status_of(line: bytes) -> int:
    protocol, _, rest = line.partition(b" ")
    if protocol not in {b"HTTP/1.1", b"HTTP/1.0"} or not rest[:3].isdigit():
        raise httpx.RemoteProtocolError("What answers speaks no HTTP.")
    return int(rest[:3])


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value.lower() for key, value in headers if key.lower() == name), b"")


def _stays_open(headers: list[tuple[bytes, bytes]]) -> bool:
    framed = _header(headers, b"content-length") or _header(headers, b"transfer-encoding")
    return bool(framed) and _header(headers, b"connection") != b"close"


def _pieces(link: _Link, method: str, status: int, headers: list[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The body of an answer, by how it says where it ends."""
    if method == "HEAD" or status in {204, 304}:
        return iter(())
    if _header(headers, b"transfer-encoding") == b"chunked":
        return _in_chunks(link)
    length = _header(headers, b"content-length")
    if not length:
        return iter(lambda: link.some(PIECE), b"")
    if not length.isdigit():
        raise httpx.RemoteProtocolError("The length of an answer is no number.")
    return _exactly(link, int(length))


def _exactly(link: _Link, length: int) -> Iterator[bytes]:
    while length:
        piece = link.some(length)
        if not piece:
            raise httpx.RemoteProtocolError("The connection was closed in the middle of an answer.")
        length -= len(piece)
        yield piece


def _in_chunks(link: _Link) -> Iterator[bytes]:
    while length := _chunk_length(link.line()):
        yield from _exactly(link, length)
        link.line()
    while link.line():  # trailers
        pass


def _chunk_length(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise httpx.RemoteProtocolError("A piece of an answer has no length.") from None


class _told:  # noqa: N801  # used as a context manager
    """Errors of the socket as those of httpx."""

    def __init__(self, late: type[httpx.TimeoutException], broken: type[httpx.NetworkError]) -> None:
        self._late, self._broken = late, broken

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, TimeoutError):
            raise self._late("timed out") from error
        if isinstance(error, OSError):
            raise self._broken(str(error)) from error
