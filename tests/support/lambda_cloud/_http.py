"""The way in: HTTP/1.1 with kept connections, one thread for each."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        method: `GET` or `POST`.
        path: as it came, quoted.
        authorization: that header.
        body: what was in it; `None` without one.
    """

    method: str
    path: str
    authorization: str
    body: bytes | None


@dataclass(frozen=True)
class Answer:
    """One answer."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


class Listener(ThreadingHTTPServer):
    """Listens on a port of this computer until it is closed; then it closes what is still open.

    Args:
        answer: what answers a call; `None` hangs up.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[Call], Answer | None]) -> None:
        self.answer = answer
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remembers the connection."""
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forgets it."""
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no error of the cloud's."""

    def close(self) -> None:
        """Stops listening, and hangs up."""
        self.shutdown()
        self.server_close()
        with self._guard:
            left = list(self._open)
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """Reads."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Changes."""
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _answer(self, method: str) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else None
        answer = self.server.answer(Call(method, self.path, self.headers.get("Authorization", ""), body))
        if answer is None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = json.dumps(answer.body).encode()
        with contextlib.suppress(OSError):
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
