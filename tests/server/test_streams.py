"""Log streams: fast, flat in memory, and ended by whoever leaves first."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from dstack_core.testing import wait_until

RUN = UUID(int=1)
PATH = f"/api/project/main/runs/{RUN}/logs"
PIECE = bytes(range(256)) * 4096


def rss_mib(pid: int) -> float:
    """Resident memory of a process, at its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def test_every_byte(client: httpx.Client) -> None:
    """The bytes arrive as they are, under the header that says where they start."""
    with client.stream("GET", PATH) as answer:
        assert answer.headers["X-Dstack-Log-Offset"] == "0"
        assert "X-Dstack-Log-End" not in answer.headers
        size = 0
        for chunk in answer.iter_raw(len(PIECE)):
            assert chunk == PIECE
            size += len(chunk)
    assert size == 256 << 20


def test_end(client: httpx.Client) -> None:
    """At the end there is a header and no body."""
    answer = client.get(PATH, params={"offset": 2})
    assert answer.headers["X-Dstack-Log-End"] == "1"
    assert answer.content == b""


def test_first_bytes_come_at_once(client: httpx.Client, server: Any) -> None:
    """What is there is sent while the stream goes on; a client that leaves ends it in the server."""
    with client.stream("GET", PATH, params={"offset": 1}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"hello\n"
        assert "stream closed" not in server.events()
    wait_until(lambda: "stream closed" in server.events(), what="the end of the stream")


def test_source_that_breaks(client: httpx.Client, server: Any) -> None:
    """A failure in the middle ends the body properly, and is in the log."""
    assert client.get(PATH, params={"offset": 3}).content == b"hello\n"
    wait_until(lambda: "A stream broke off" in server.log(), what="the line in the log")


def test_slow_client(client: httpx.Client, server: Any) -> None:
    """A client that does not read costs the server neither memory nor its other clients."""
    client.get("/api/server/info").raise_for_status()
    before = rss_mib(server.process.pid)
    slow = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    for connection in slow:
        connection.connect(str(server.socket))
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
    with client.stream("GET", PATH) as answer:
        size = sum(len(chunk) for chunk in answer.iter_raw())
    assert size == 256 << 20
    assert rss_mib(server.process.pid) - before < 64
    for connection in slow:
        connection.close()
    wait_until(lambda: server.events().count("stream closed") == 9, what="the end of all streams")
