"""Speaking to an agent directly."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from dstack_core._home import socket_address


def agent_health(sock: Path) -> dict[str, int]:
    """Asks an agent who it is."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answer:
        connection.settimeout(5)
        connection.connect(socket_address(sock))
        connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: agent\r\n\r\n")
        length = 0
        while (line := answer.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return json.loads(answer.read(length))  # type: ignore[no-any-return]  # the protocol's health
