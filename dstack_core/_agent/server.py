"""HTTP/1.1 over the unix socket: just what the protocol needs, keep-alive and long polls included."""

from __future__ import annotations

import os
import sys

from . import lean
from .lean import quiet
from .loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

_LONGEST_HEAD = 16 << 10
_LONGEST_BODY = 64 << 20
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Too Large",
    421: "Misdirected Request",
    507: "Insufficient Storage",
}


class Refusal(Exception):
    """An answer in the 400s, or that there is no room."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request:
    """One request, complete."""

    __slots__ = ("body", "method", "path", "query")

    def __init__(self, method: str, target: str, body: bytes) -> None:
        self.method = method
        self.path, _, query = target.partition("?")
        self.query = dict(item.partition("=")[::2] for item in query.split("&") if item)
        self.body = body

    def number(self, name: str, default: float) -> float:
        """A number from the query."""
        try:
            return float(self.query.get(name, default))
        except ValueError:
            raise Refusal(400, name + " must be a number") from None


class Server:
    """Accepts connections and hands each complete request to `handle(request, connection)`."""

    def __init__(self, loop: Loop, path: str, handle: Callable[[Request, Connection], None]) -> None:
        self._loop, self._handle, self._path = loop, handle, path
        # Bound under another name first: who finds the socket can connect to it.
        self._socket = lean.listen(path + ".new")
        os.rename(path + ".new", path)
        loop.watch(self._socket.fileno(), READ, self._accept)

    def _accept(self, _: int) -> None:
        with quiet:
            while True:
                fd = self._socket._accept()[0]  # noqa: SLF001 - `socket.socket.accept` of the C core
                Connection(self._loop, fd, self._handle)

    def close(self) -> None:
        """Nobody can connect any more."""
        os.unlink(self._path)
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()


class Connection:
    """One client. Requests are answered one after the other, in their order."""

    def __init__(self, loop: Loop, fd: int, handle: Callable[[Request, Connection], None]) -> None:
        self._loop, self._fd, self._handle = loop, fd, handle
        self._input = bytearray()
        self._output = b""
        self._file: tuple[int, int, int] | None = None
        self._answering = False
        self.on_close: Callable[[], None] | None = None
        self.on_sent: Callable[[], None] | None = None
        os.set_blocking(fd, False)
        loop.watch(fd, READ, self._ready)

    # ------------------------------------------------------------------------------------------------ answers --

    def reply(self, status: int, value: object) -> None:
        """Sends one JSON document."""
        body = lean.to_json(value).encode()
        self._send(status, body, len(body), "Content-Type: application/json\r\n")

    def reply_file(self, file: int, position: int, count: int, headers: str) -> None:
        """Sends `count` bytes of an open file, which is closed then."""
        self._file = (file, position, count) if file >= 0 else None
        self._send(200, b"", count, "Content-Type: application/octet-stream\r\n" + headers)

    def _send(self, status: int, body: bytes, length: int, headers: str) -> None:
        head = "HTTP/1.1 %d %s\r\n%sContent-Length: %d\r\n\r\n" % (
            status,
            _REASONS.get(status, "Error"),
            headers,
            length,
        )
        self._output = head.encode("latin-1") + body
        self._flush()

    # ------------------------------------------------------------------------------------------------- engine --

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        elif events:
            self._receive()

    def _receive(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        self._input += data
        self._next()

    def _next(self) -> None:
        """Hands over the next request, if it is complete and the one before is answered."""
        while not self._answering and self._fd >= 0:
            try:
                request = self._parse()
                if request is None:
                    return
                self._answering = True
                self._handle(request, self)
            except Refusal as refusal:
                self.reply(refusal.status, {"detail": str(refusal)})
            except Exception as error:  # noqa: BLE001 - a mistake of ours must not end the job
                sys.excepthook(*sys.exc_info())
                self.reply(500, {"detail": "the agent failed: " + type(error).__name__})

    def _parse(self) -> Request | None:
        end = self._input.find(b"\r\n\r\n")
        if end < 0:
            self._limit(len(self._input), _LONGEST_HEAD)
            return None
        first, *lines = self._input[:end].decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = headers.get("content-length", "0")
        words = first.split(" ")
        if not length.isdigit() or len(words) != 3:
            self._refuse_all(400, "not an HTTP request that this agent understands")
        self._limit(int(length), _LONGEST_BODY)
        if len(self._input) < end + 4 + int(length):
            return None
        body = bytes(self._input[end + 4 : end + 4 + int(length)])
        del self._input[: end + 4 + int(length)]
        return Request(words[0], words[1], body)

    def _limit(self, size: int, limit: int) -> None:
        if size > limit:
            self._refuse_all(413, "the request is longer than %d bytes" % limit)

    def _refuse_all(self, status: int, message: str) -> None:
        """After this nobody knows where the next request begins."""
        self._answering = True
        self.on_sent = self._close
        raise Refusal(status, message)

    def _flush(self) -> None:
        try:
            self._write()
        except BlockingIOError:
            self._loop.watch(self._fd, WRITE, self._ready)
            return
        except OSError:
            self._close()
            return
        self._answered()

    def _write(self) -> None:
        while self._output:
            self._output = self._output[os.write(self._fd, self._output) :]
        while self._file:
            file, position, count = self._file
            if not count:
                self._close_file()
                return
            sent = _send_file(self._fd, file, position, count)
            if not sent:
                raise OSError("the file is shorter than announced")
            self._file = (file, position + sent, count - sent)

    def _answered(self) -> None:
        self._answering = False
        self.on_close = None
        self._loop.watch(self._fd, READ, self._ready)
        sent, self.on_sent = self.on_sent, None
        if sent:
            sent()
        if self._input:
            self._next()

    def _close_file(self) -> None:
        if self._file:
            os.close(self._file[0])
            self._file = None

    def _close(self) -> None:
        if self._fd < 0:
            return
        self._loop.unwatch(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._close_file()
        for callback in (self.on_close, self.on_sent):
            if callback:
                callback()
        self.on_close = self.on_sent = None


def _send_file(connection: int, file: int, position: int, count: int) -> int:
    try:
        return os.sendfile(connection, file, position, count)
    except BlockingIOError:
        raise
    except OSError:
        # Not every system does that with unix sockets.
        return os.write(connection, os.pread(file, min(count, 1 << 16), position))


class Waiters:
    """Answers that wait for something to happen."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def answer(
        self, connection: Connection, ready: Callable[[], bool], patience: float, reply: Callable[[], None]
    ) -> None:
        """Calls `reply` when `ready()` is true, or after `patience` seconds; not at all if the client goes away."""
        if patience <= 0 or ready():
            reply()
            return

        def finish() -> None:
            forget()
            reply()

        def forget() -> None:
            timer.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)

        entry = (ready, finish)
        timer = self._loop.later(patience, finish)
        self._waiting.append(entry)
        connection.on_close = forget

    def when(self, ready: Callable[[], bool], callback: Callable[[], None]) -> None:
        """Calls `callback` once, when `ready()` is true after something happened."""
        self._waiting.append((ready, callback))

    def wake(self) -> None:
        """Something happened: looks at everyone."""
        for entry in list(self._waiting):
            if entry in self._waiting and entry[0]():
                self._waiting.remove(entry)
                entry[1]()
