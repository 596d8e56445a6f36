"""The port for browsers of a server that has only its unix socket.

It is opened on 127.0.0.1 when there is a service, and closed with the server. Its number is kept in the home folder,
so that an address in somebody's browser works after a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

from dstack_core._server.sockets import BACKLOG

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 12000
"""Where a port is looked for: above well-known ones, below those that systems give to outgoing connections."""
TRIES = 16

Listen = Callable[[socket.socket], Awaitable[None]]
"""Starts to accept connections on a socket."""


class BrowserFront:
    """The port of one home folder.

    Args:
        file: where its number is kept.

    Attributes:
        url: where it is, as `http://127.0.0.1:21234`; `None` before it is open.
    """

    def __init__(self, file: Path) -> None:
        self.url: str | None = None
        self._file = file
        self._listener: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._listens = False

    @property
    def was_open(self) -> bool:
        """Whether this home folder ever had a service."""
        return self._file.exists()

    def reserve(self) -> None:
        """Takes the port, so that `url` is known. That there is none is in the log: services work without it."""
        if self._listener is not None:
            return
        try:
            self._listener = self._bound()
        except OSError as error:
            log.warning("Services have no address for browsers: cannot listen on %s (%s)", HOST, error)
            return
        port = self._listener.getsockname()[1]
        self._keep(port)
        self.url = f"http://{HOST}:{port}"
        log.info("Services are at %s", self.url)

    async def open(self, listen: Listen) -> None:
        """Opens it unless it is open."""
        async with self._lock:
            self.reserve()
            if self._listener is not None and not self._listens:
                self._listens = True
                await listen(self._listener)

    def _bound(self) -> socket.socket:
        for port in self._candidates():
            with suppress(OSError):
                return socket.create_server((HOST, port), backlog=BACKLOG)
        return socket.create_server((HOST, 0), backlog=BACKLOG)

    def _candidates(self) -> Iterator[int]:
        """The number that is kept, and some that follow from the name of the folder: rarely those of another home."""
        with suppress(OSError, ValueError):
            kept = int(self._file.read_text())
            if 0 < kept < 1 << 16:
                yield kept
        seed = int.from_bytes(hashlib.sha256(str(self._file).encode()).digest()[:8])
        for number in range(TRIES):
            yield FIRST_PORT + (seed + number) % PORTS

    def _keep(self, port: int) -> None:
        draft = self._file.with_name(f"{self._file.name}.new")
        try:
            draft.write_text(f"{port}\n")
            draft.replace(self._file)
        except OSError as error:
            log.warning("The port for browsers is not kept: %s", error)
