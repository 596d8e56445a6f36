"""HTTP over a unix socket. Imported with the first request only, as it needs httpx."""

from __future__ import annotations

import socket
import traceback
from typing import Any

import httpx


class UnixTransport(httpx.HTTPTransport):
    """httpx's own, but for one thing: the library below forgets to close a socket whose connection is refused.

    Args:
        address: the address of the socket.
        limits: of the connection pool.
    """

    def __init__(self, address: str, limits: httpx.Limits) -> None:
        super().__init__(uds=address, verify=False, limits=limits)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request."""
        request.extensions = {**request.extensions, "trace": _traced}
        return super().handle_request(request)


def _traced(event: str, info: dict[str, Any]) -> None:
    if event == "connection.connect_unix_socket.failed":
        _close_sockets_of(info["exception"])


def _close_sockets_of(error: BaseException) -> None:
    """Closes the sockets that were on their way to be connected: nothing but the frames of the error knows them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in list(frame.f_locals.values()):
            if isinstance(value, socket.socket):
                value.close()
