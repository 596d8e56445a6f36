"""Bodies that are large, slow, or never end; and clients and replicas that go away in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from dstack_core.testing import wait_until
from tests.server.conftest import TOKEN, Services, address
from tests.support.upstreams import Handler, Seen, exactly, respond

MIB = 1 << 20
PIECE = bytes(range(256)) * 4096
HEAD = b"HTTP/1.1 200 OK\r\n"


def memory_mib(pid: int) -> float:
    """Resident memory of a process at its peak."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak(pid: int) -> None:
    """Has the kernel begin its measurement of the peak again."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def pieces(count: int, *, chunked: bool) -> Handler:
    """A handler that answers with so many MiB."""

    async def handler(request: Seen) -> None:
        await request.body()
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (count * MIB)
        await request.answer(HEAD + length + b"\r\n\r\n")
        for _ in range(count):
            await request.answer(b"%x\r\n%b\r\n" % (MIB, PIECE) if chunked else PIECE)
        if chunked:
            await request.answer(b"0\r\n\r\n")

    return handler


@pytest.mark.parametrize("chunked", [False, True])
def test_a_gigabyte_down(services: Any, chunked: bool) -> None:
    """A gigabyte comes through as it is, and the server's memory stays flat."""
    services.add("web", pieces(1024, chunked=chunked))
    services.add("quick", respond())
    services.get("/services/main/quick/")
    pid = services.server.process.pid
    forget_peak(pid)
    before = memory_mib(pid)
    size = 0
    with services.client() as client, client.stream("GET", "/services/main/web/") as answer:
        for piece in answer.iter_raw(MIB):
            assert piece == PIECE
            size += len(piece)
    assert size == 1024 * MIB
    assert memory_mib(pid) - before < 16


@pytest.mark.parametrize("chunked", [False, True])
def test_a_gigabyte_up(services: Any, chunked: bool) -> None:
    """A gigabyte goes up to the replica as it is, and the server's memory stays flat."""
    wrong = []

    async def handler(request: Seen) -> None:
        if chunked:
            size = 0
            async for chunk in request.chunks():
                at = size % MIB
                wrong.extend([size] if chunk != (PIECE + PIECE)[at : at + len(chunk)] else [])
                size += len(chunk)
        else:
            size = int(request.header("content-length") or 0)
            for _ in range(size // MIB):
                wrong.extend([1] if await request.reader.readexactly(MIB) != PIECE else [])
        await request.answer(HEAD + b"Content-Length: 10\r\n\r\n%010d" % size)

    services.add("web", handler)
    pid = services.server.process.pid
    services.get("/api/server/info")
    forget_peak(pid)
    before = memory_mib(pid)
    headers = {} if chunked else {"content-length": str(1024 * MIB)}
    with services.client() as client:
        answer = client.put("/services/main/web/", content=(PIECE for _ in range(1024)), headers=headers)
    assert int(answer.text) == 1024 * MIB
    assert not wrong
    assert memory_mib(pid) - before < 16


def test_slow_reader(services: Any) -> None:
    """A client that does not read stops the replica, and costs the server no memory; another one is not held up."""
    sent = []

    async def handler(request: Seen) -> None:
        await request.answer(HEAD + b"Content-Length: %d\r\n\r\n" % (256 * MIB))
        for _ in range(256):
            await request.answer(PIECE)
            sent.append(request.target)

    services.add("web", handler)
    services.add("quick", respond())
    pid = services.server.process.pid
    services.get("/services/main/quick/")
    forget_peak(pid)
    before = memory_mib(pid)
    with services.connect() as slow:
        slow.sendall(b"GET /services/main/web/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(12) == b"HTTP/1.1 200"
        for _ in range(20):
            assert services.get("/services/main/quick/").text == "ok"
        assert len(sent) < 32
        assert memory_mib(pid) - before < 8
        size = 12
        while size < 256 * MIB:
            size += len(slow.recv(MIB))
    assert memory_mib(pid) - before < 16


def test_slow_replica(services: Any) -> None:
    """A replica that does not read stops the client, and costs the server no memory."""
    go = asyncio.Event()

    async def handler(request: Seen) -> None:
        await go.wait()
        await request.answer(HEAD + b"Content-Length: 2\r\n\r\nok")
        await request.body()

    services.add("web", handler)
    pid = services.server.process.pid
    forget_peak(pid)
    before = memory_mib(pid)
    with services.connect() as client:
        client.sendall(b"POST /services/main/web/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
        client.setblocking(False)
        sent = 0
        stuck = threading.Event()

        def send() -> bool:
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                sent += client.send(PIECE)
                return False
            stuck.set()
            return True

        # The kernel's buffers on both ways take some megabytes; then nothing moves, however often one tries.
        wait_until(lambda: all(send() for _ in range(50)), what="the client to be stopped")
        assert sent < 48 * MIB
        assert memory_mib(pid) - before < 8
        services.loop.loop.call_soon_threadsafe(go.set)
        client.setblocking(True)
        assert client.recv(12) == b"HTTP/1.1 200"


def test_events_come_at_once(services: Any) -> None:
    """Each event of a stream arrives before the next one is sent, and the end when the replica says so."""
    turns: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(request: Seen) -> None:
        await request.answer(HEAD + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        while event := await turns.get():
            await request.answer(b"%x\r\n%b\r\n" % (len(event), event))
        await request.answer(b"0\r\n\r\n")

    services.add("web", handler)
    with services.client() as client, client.stream("GET", "/services/main/web/") as answer:
        events = answer.iter_raw()
        for number in range(20):
            event = b"data: %d\n\n" % number
            services.loop.loop.call_soon_threadsafe(turns.put_nowait, event)
            assert next(events) == event
        services.loop.loop.call_soon_threadsafe(turns.put_nowait, b"")
        assert list(events) == []


def test_both_ways_at_once(services: Any) -> None:
    """A replica may answer while the body still comes: an echo of each chunk arrives before the next one is sent."""

    async def handler(request: Seen) -> None:
        await request.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        async for chunk in request.chunks():
            await request.answer(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        await request.answer(b"0\r\n\r\n")

    (replica,) = services.add("web", handler)
    with services.connect() as client:
        for _ in range(2):
            client.sendall(b"POST /services/main/web/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b"transfer-encoding: chunked\r\n\r\n" in client.recv(1 << 16)
            for number in range(20):
                chunk = b"4\r\n%04d\r\n" % number
                client.sendall(chunk)
                assert exactly(client, len(chunk)) == chunk
            client.sendall(b"0\r\n\r\n")
            assert exactly(client, 5) == b"0\r\n\r\n"
    assert replica.connections == 1


# -------------------------------------------------------------------------------------------- Expect: 100-continue --

EXPECTING = b"POST /services/main/web/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize("says_so", [True, False])
def test_body_that_is_asked_for(services: Any, says_so: bool) -> None:
    """The client is asked for its body when the replica asks, or when the replica seems not to know how to."""

    async def handler(request: Seen) -> None:
        assert request.header("expect") == "100-continue"
        if says_so:
            await request.answer(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.body()
        await request.answer(HEAD + b"Content-Length: 5\r\n\r\n" + body)

    services.add("web", handler)
    with services.connect() as client:
        for _ in range(2):
            client.sendall(EXPECTING)
            assert exactly(client, 25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"hello")
            answer = HEAD + b"content-length: 5\r\n\r\nhello"
            assert exactly(client, len(answer)) == answer


def test_body_that_is_not_wanted(services: Any) -> None:
    """A replica that refuses before the body gets none, and the client reads the refusal without sending it."""

    async def handler(request: Seen) -> None:
        await request.answer(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        assert await request.reader.read() == b""

    services.add("web", handler)
    with services.connect() as client:
        client.sendall(EXPECTING)
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert answer.endswith(b"no")


def test_refusal_before_the_body(services: Any) -> None:
    """A client that has to be refused is not asked for its body first."""
    services.add("web", respond(), auth=True)
    with services.connect() as client:
        client.sendall(EXPECTING)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401 ")


def test_early_answer(services: Any) -> None:
    """An answer that comes before the body is complete arrives, and the next request on the connection, too."""

    async def handler(request: Seen) -> None:
        await request.answer(HEAD + b"Content-Length: 2\r\n\r\nno")
        await request.body()

    services.add("web", handler)
    with services.client() as client:
        for _ in range(3):
            assert client.post("/services/main/web/", content=(PIECE for _ in range(8))).text == "no"
            assert client.get("/services/main/web/").text == "no"


# ------------------------------------------------------------------------------------------------------- hang-ups --

HANGUPS = {
    "before the answer": (b"GET /services/main/web/silent HTTP/1.1\r\nHost: x\r\n\r\n", b""),
    "in the answer": (b"GET /services/main/web/endless HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200"),
    "in the body": (b"PUT /services/main/web/ HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\nabc", b""),
    "in a chunk": (b"PUT /services/main/web/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", b""),
}


@pytest.mark.parametrize(("request_bytes", "answer"), HANGUPS.values(), ids=HANGUPS)
def test_client_hangs_up(services: Any, request_bytes: bytes, answer: bytes) -> None:
    """A replica learns at once that its client is gone, and the server holds nothing for it any more."""

    async def handler(request: Seen) -> None:
        if request.target == "/endless":
            await request.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        if request.target == "/":
            await request.body()
        # Bytes or the end: what comes next shows whether the client is there.
        assert await request.reader.read(1) == b""
        raise ConnectionError("the client is gone")

    (replica,) = services.add("web", handler)
    with services.connect() as client:
        client.sendall(request_bytes)
        wait_until(lambda: replica.seen, what="the request at the replica")
        assert exactly(client, len(answer)) == answer
        assert replica.open == 1
    wait_until(lambda: replica.open == 0, what="the end of the connection to the replica")
    assert replica.broken == 1


def test_client_that_waits_for_a_replica_hangs_up(services: Any) -> None:
    """Nobody waits for a replica on behalf of a client that is gone."""
    services.set("web", [], auth=False)
    with services.connect() as client:
        client.sendall(b"GET /services/main/web/ HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: "waiting for a replica" in services.events(), what="the wait")
    wait_until(lambda: "wait cancelled" in services.events(), what="the end of the wait")


def test_replica_that_goes_in_the_middle(services: Any) -> None:
    """Where the head of an answer is out already, the client sees that the body is not complete."""

    async def handler(request: Seen) -> None:
        length = b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
        if request.target == "/length":
            length = b"Content-Length: %d\r\n\r\na" % MIB
        await request.answer(HEAD + length)
        raise ConnectionError("killed")

    services.add("web", handler)
    for path in ("length", "chunked"):
        with pytest.raises(httpx.RemoteProtocolError):
            services.get(f"/services/main/web/{path}")


def test_stopping_server_ends_streams(start: Any, loop: Any) -> None:
    """A server that stops is not kept by a stream that would go on for ever."""
    server = start("--port", "0", env={"DSTACK_SERVER_TOKEN": TOKEN})
    services = Services(server, address(server), loop)

    async def handler(request: Seen) -> None:
        await request.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await request.reader.read(1)

    (replica,) = services.add("web", handler)
    with services.client() as client, client.stream("GET", "/services/main/web/") as answer:
        body = answer.iter_raw()
        assert next(body) == b"a"
        server.process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            next(body)
    assert server.ended(10) == 0
    wait_until(lambda: replica.open == 0, what="the end of the connection to the replica")
