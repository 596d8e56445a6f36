"""WebSockets, and other protocols that a connection may switch to."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from dstack_core.testing import wait_until
from tests.server.conftest import TOKEN, Services, address
from tests.server.test_proxy_streams import forget_peak, memory_mib
from tests.support.upstreams import LoopThread, Seen, exactly, respond


class WebSockets:
    """A WebSocket server, as real as its library.

    Attributes:
        port: where it listens.
        paths: what was asked for.
        headers: with which headers.
        ends: close codes of the connections that have ended.
    """

    def __init__(self, loop: LoopThread, handler: Callable[[ServerConnection], Awaitable[None]]) -> None:
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.ends: list[int | None] = []
        self._handler = handler
        self._done = asyncio.Event()
        self.port = loop.run(self._start())
        self.loop = loop

    async def _start(self) -> int:
        self._server = await serve(self._serve, "127.0.0.1", 0, max_size=64 << 20, compression=None)
        return int(next(iter(self._server.sockets)).getsockname()[1])

    async def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.paths.append(connection.request.path)
        self.headers.append(dict(connection.request.headers.raw_items()))
        try:
            await self._handler(connection)
        finally:
            await connection.wait_closed()
            self.ends.append(connection.close_code)

    def close(self) -> None:
        """Ends it."""

        async def end() -> None:
            self._server.close()
            await self._server.wait_closed()

        self.loop.run(end())


async def echo(connection: ServerConnection) -> None:
    """Sends back what comes."""
    async for message in connection:
        await connection.send(message)


@pytest.fixture
def sockets(services: Services) -> Iterator[WebSockets]:
    """A service `ws` that echoes, for whoever has the token."""
    server = WebSockets(services.loop, echo)
    services.set("ws", [server.port], auth=True)
    yield server
    server.close()


def opened(services: Services, path: str = "/services/main/ws/", **options: Any) -> ClientConnection:
    """A WebSocket to a service."""
    headers = {"Authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
    url = services.url.replace("http", "ws") + path
    connected: ClientConnection = connect(url, additional_headers=headers, max_size=64 << 20, proxy=None, **options)
    return connected


def test_messages(services: Services, sockets: WebSockets) -> None:
    """Text, binary, empty and large messages come back as they are; the path is the replica's own."""
    with opened(services, "/services/main/ws/a%20b?c=d") as client:
        for message in ("hello", "é" * 1000, b"\0\1\2", "", bytes(range(256)) * 40_960, "x" * 10_000_000):
            client.send(message)
            assert client.recv() == message
    assert sockets.paths == ["/a%20b?c=d"]


def test_large_messages_both_ways_at_once(services: Services, sockets: WebSockets) -> None:
    """Ten messages of 10 MB under way at the same time all come back, and the server's memory stays flat."""
    pid = services.server.process.pid
    with opened(services, compression=None) as client:
        client.send("x")
        client.recv()
        forget_peak(pid)
        before = memory_mib(pid)
        sent = [bytes([number]) * 10_000_000 for number in range(10)]

        def send() -> None:
            for message in sent:
                client.send(message)

        sender = threading.Thread(target=send)
        sender.start()
        found = [hashlib.sha256(client.recv()).digest() for _ in sent]  # type: ignore[arg-type]  # bytes went out
        sender.join(60)
    assert found == [hashlib.sha256(message).digest() for message in sent]
    assert memory_mib(pid) - before < 16


def test_pings(services: Services, sockets: WebSockets) -> None:
    """A ping is answered by the replica, and a subprotocol and compression are agreed upon with it."""
    with opened(services, compression="deflate") as client:
        for _ in range(3):
            assert client.ping().wait(30)


def test_ends(services: Services, sockets: WebSockets) -> None:
    """The code with which one side closes reaches the other one."""
    with opened(services) as client:
        client.close(4001, "enough")
    wait_until(lambda: sockets.ends, what="the end at the replica")
    assert sockets.ends == [4001]


def test_replica_ends(services: Services) -> None:
    """A replica that closes, or dies, ends the client's connection."""

    async def goes(connection: ServerConnection) -> None:
        if await connection.recv() == "close":
            await connection.close(4002, "done")
        else:
            connection.transport.abort()

    server = WebSockets(services.loop, goes)
    services.set("ws", [server.port], auth=True)
    for how, code in (("close", 4002), ("die", 1006)):
        with opened(services) as client:
            client.send(how)
            with pytest.raises(ConnectionClosed) as end:
                client.recv()
            assert (end.value.rcvd.code if end.value.rcvd else 1006) == code
    server.close()


def test_client_vanishes(services: Services, sockets: WebSockets) -> None:
    """A replica learns that its client is gone without a word."""
    with opened(services) as client:
        client.send("x")
        client.recv()
        client.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: sockets.ends, what="the end at the replica")
    assert sockets.ends == [1006]


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Authorization": "Bearer wrong"}, "/services/main/ws/", 401),
        ({"Authorization": ""}, "/services/main/nope/", 401),
        ({}, "/services/main/nope/", 404),
        ({}, "/services/main/empty/", 503),
        ({}, "/services/main/dead/", 503),
        ({}, "/services/main/plain/", 200),
        ({}, "/services/main/nonsense/", 502),
    ],
)
def test_refused(services: Services, sockets: WebSockets, headers: dict[str, str], path: str, status: int) -> None:
    """A connection that cannot be is refused with the same words as a request, and closed."""

    async def nonsense(request: Seen) -> None:
        await request.answer(b"hello?\r\n\r\n")

    dead = services.replica(respond())
    dead.stop()
    services.set("empty", [], patience=0.1)
    services.set("dead", [dead.port], patience=0.1)
    services.add("plain", respond(b"no WebSocket here"))
    services.add("nonsense", nonsense)
    with pytest.raises(InvalidStatus) as refused, opened(services, path, headers=headers):
        pass
    assert refused.value.response.status_code == status
    assert refused.value.response.headers["connection"] == "close"
    assert not sockets.paths


def test_missing_slash(services: Services, sockets: WebSockets) -> None:
    """The address without its last slash leads to the one with it."""
    with opened(services, "/services/main/ws?a=b") as client:
        client.send("x")
        assert client.recv() == "x"
    assert sockets.paths == ["/?a=b"]


def test_replica_does_not_see_the_token(services: Services, sockets: WebSockets) -> None:
    """A WebSocket brings the token to us, and the client's own headers and address to the replica."""
    with opened(services, headers={"X-Mine": "1"}):
        wait_until(lambda: sockets.headers, what="the connection")
    headers = {name.lower(): value for name, value in sockets.headers[0].items()}
    assert TOKEN not in repr(headers)
    assert (headers["x-mine"], headers["host"]) == ("1", f"127.0.0.1:{services.port}")
    assert (headers["x-forwarded-for"], headers["x-forwarded-prefix"]) == ("127.0.0.1", "/services/main/ws")


def test_refused_connection_is_of_no_further_use(services: Services) -> None:
    """After an answer other than 101, what else the client sends reaches no replica."""
    (replica,) = services.add("web", respond(b"x" * 1000))
    head = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with services.connect() as client:
        client.sendall(f"GET /services/main/web/ HTTP/1.1\r\n{head}GET /secret HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n" + b"x" * 1000)
    assert [seen.target for seen in replica.seen] == ["/"]


def switching(services: Services, path: str = "/services/main/raw/", early: bytes = b"") -> socket.socket:
    """A connection that asks for a protocol that nobody knows."""
    client = services.connect()
    head = "Host: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: raw/1\r\n"
    client.sendall(f"POST {path} HTTP/1.1\r\n{head}Content-Length: 0\r\n\r\n".encode() + early)
    return client


async def raw_echo(request: Seen) -> None:
    """Switches to a protocol that sends every byte back."""
    assert (request.header("upgrade"), request.header("connection")) == ("raw/1", "Upgrade")
    await request.answer(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw/1\r\nX-A: b\r\n\r\nfirst"
    )
    while data := await request.reader.read(1 << 16):
        await request.answer(data)
    raise ConnectionError("the other side has ended")


def test_any_protocol(services: Services) -> None:
    """Bytes of any protocol go both ways as they are, those that came early or with the answer included."""
    (replica,) = services.add("raw", raw_echo)
    data = bytes(range(256)) * 1000
    with switching(services, early=b"early") as client:
        expected = (
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: raw/1\r\nx-a: b\r\n\r\nfirstearly"
        )
        assert exactly(client, len(expected)) == expected
        threading.Thread(target=client.sendall, args=(data,)).start()
        assert exactly(client, len(data)) == data
    wait_until(lambda: replica.open == 0, what="the end at the replica")


def test_client_that_does_not_read(services: Services) -> None:
    """A client that does not read stops the replica, and costs the server no memory."""
    sent = []

    async def flood(request: Seen) -> None:
        await request.answer(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw/1\r\n\r\n")
        for _ in range(100):
            await request.answer(bytes(1 << 20))
            sent.append(1)
        request.writer.close()

    services.add("raw", flood)
    services.add("web", respond())
    pid = services.server.process.pid
    forget_peak(pid)
    before = memory_mib(pid)
    with switching(services) as client:
        head = client.recv(1000).partition(b"\r\n\r\n")
        for _ in range(20):
            assert services.get("/services/main/web/").text == "ok"
        assert len(sent) < 32
        size = len(head[2])
        while piece := client.recv(1 << 20):
            size += len(piece)
    assert size == 100 << 20
    assert memory_mib(pid) - before < 8


def test_client_that_goes_before_the_replica_agrees(services: Services) -> None:
    """A replica that still thinks about it learns that the client is gone."""

    async def thinks(request: Seen) -> None:
        assert await request.reader.read(1) == b""
        raise ConnectionError("the client is gone")

    (replica,) = services.add("raw", thinks)
    with switching(services):
        wait_until(lambda: replica.seen, what="the request")
    wait_until(lambda: replica.open == 0, what="the end at the replica")
    assert replica.broken == 1


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET {} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
        b"POST {} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nGET /",
        b"POST {} HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n" + CHUNKED,
        b"GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=["HTTP/2", "with a body", "with chunks", "not meant"],
)
@pytest.mark.parametrize("parts", [1, 2, 1000])
def test_upgrade_that_is_not_taken(services: Services, request_bytes: bytes, parts: int) -> None:
    """An offer that we do not take up is a request like any other, and its connection goes on."""
    bodies = []

    async def handler(request: Seen) -> None:
        bodies.append(await request.body())
        await request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    (replica,) = services.add("web", handler)
    data = request_bytes.replace(b"{}", b"/services/main/web/") * 3
    size = len(data) // parts + 1
    with services.connect() as client:
        for start in range(0, len(data), size):
            client.sendall(data[start : start + size])
        expected = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" * 3
        assert exactly(client, len(expected)) == expected
    assert [seen.header("upgrade") for seen in replica.seen] == [None, None, None]
    assert bodies == [b"GET /" if b"POST" in request_bytes else b""] * 3
    assert "Unsupported upgrade" not in services.server.log()


def test_open_socket_is_activity(start: Any, loop: LoopThread) -> None:
    """A server does not exit for idleness while a WebSocket is open, and does after its end."""
    server = start("--port", "0", "--idle-exit", "1", env={"DSTACK_SERVER_TOKEN": TOKEN})
    services = Services(server, address(server), loop)
    services.add("raw", raw_echo)
    with switching(services) as client:
        assert client.recv(12) == b"HTTP/1.1 101"
        client.settimeout(2.5)
        with pytest.raises(TimeoutError):
            exactly(client, 1 << 16)
        assert server.process.poll() is None
    assert server.ended(30) == 0


def test_stopping_server_ends_sockets(start: Any, loop: LoopThread) -> None:
    """A server that stops ends WebSockets on both sides, at once."""
    server = start("--port", "0", env={"DSTACK_SERVER_TOKEN": TOKEN})
    services = Services(server, address(server), loop)
    sockets = WebSockets(loop, echo)
    services.set("ws", [sockets.port], auth=True)
    with opened(services) as client:
        client.send("x")
        client.recv()
        server.process.terminate()
        with pytest.raises(ConnectionClosed):
            client.recv()
    assert server.ended(10) == 0
    wait_until(lambda: sockets.ends, what="the end at the replica")
    sockets.close()
