"""A replica that costs next to nothing: answers every GET with its process id. Listens on $PORT.

    python replica.py [FILE]

Adds a line to the file when it listens: its process id, its port, and the time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

BODY = b"%d\n" % os.getpid()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


class Replica(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """A request, which fits into one piece."""
        if data.endswith(b"\r\n\r\n"):
            self.transport.write(ANSWER)


def tell(path: Path, port: int) -> None:
    """Says that it listens."""
    with path.open("a") as file:
        file.write(f"{os.getpid()} {port} {time.time()}\n")


async def main() -> None:
    """Serves until it is killed."""
    port = int(os.environ["PORT"])
    await asyncio.get_running_loop().create_server(Replica, "127.0.0.1", port)
    for name in sys.argv[1:]:
        tell(Path(name), port)
    await asyncio.Event().wait()


uvloop.run(main())
