"""Probes: what is asked over real sockets, what counts as an answer, and what the answers add up to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dstack_core._engine.probes import SLOW_ANSWERS, Answer, Watch, ask
from dstack_core._engine.seams import SystemClock
from dstack_core._models.instances import Endpoint
from dstack_core._models.services import ProbeConfig
from dstack_core._transport import AgentUnreachable, LocalTransport

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HERE = Endpoint(unix_socket=Path("/nowhere"))
GOOD, BAD, SLOW = Answer(True, "200"), Answer(False, "refused"), Answer(False, "late", slow=True)

Serve = Callable[[bytes], Awaitable[int]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers that send given bytes to whoever connects, and close; says their ports."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes) -> int:
        async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n") + (await reader.read(100) if b"POST" in answer else b""))
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(answered, "127.0.0.1", 0)
        servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    asked.clear()
    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


asked: list[bytes] = []
"""What the servers of the current test were sent."""


async def probed(port: int, config: ProbeConfig | None = None) -> Answer:
    """What comes of one probe of a port."""
    transport = LocalTransport()
    return await ask(SystemClock(), lambda: transport.open_port(HERE, port), config)


def probe(**fields: object) -> ProbeConfig:
    """A configured probe."""
    return ProbeConfig(type="http", **fields)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("status", "default", "configured"),
    [(200, True, True), (204, True, True), (302, True, False), (404, True, False), (500, False, False)],
)
async def test_which_statuses_are_good(serve: Serve, status: int, default: bool, configured: bool) -> None:
    """Anything below 500 by default; 200 to 299 for a probe that somebody wrote."""
    port = await serve(b"HTTP/1.1 %d Whatever\r\n\r\n" % status)
    assert await probed(port) == Answer(default, f"answered with status {status}")
    assert (await probed(port, probe())).good is configured


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\n\n", b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 \r\n\r\n"])
async def test_old_and_provisional_answers(serve: Serve, answer: bytes) -> None:
    """HTTP/1.0 is fine, and an answer that announces another one is not yet the answer."""
    assert (await probed(await serve(answer), probe())).good


async def test_what_is_sent(serve: Serve) -> None:
    """Method, path, headers and body as configured, and nothing that a value could smuggle in."""
    port = await serve(b"HTTP/1.1 200 OK\r\nX: POST\r\n\r\n")
    headers = [{"name": "Host", "value": "me"}, {"name": "X-A", "value": "1\r\nX-B: 2"}]
    assert (await probed(port, probe(url="/a b?c=d%20e", method="post", headers=headers, body="hej"))).good
    (request,) = asked
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /a%20b?c=d%20e HTTP/1.1"
    assert {b"Host: me", b"Content-Length: 3", b"Connection: close", b"X-A: 1 X-B: 2"} <= set(lines)
    assert body == b"hej"


async def test_what_is_no_answer(serve: Serve) -> None:
    """Something that is not HTTP, a connection that just ends, and a port where nobody listens."""
    assert "not HTTP: b'SSH-2.0-hello" in (await probed(await serve(b"SSH-2.0-hello\r\n"))).said
    assert (await probed(await serve(b""))).said == "closed the connection without an answer"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert await probed(port) == Answer(False, "connection refused: nothing listens there")


async def test_silence_is_told_apart() -> None:
    """No answer in time is not the same as a wrong one: the program may be busy."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = await probed(silent.getsockname()[1], probe(timeout=1))
    assert answer == Answer(False, "no answer within 1 s", slow=True)


async def test_a_machine_out_of_reach() -> None:
    """The transport's own words."""

    async def nowhere() -> socket.socket:
        raise AgentUnreachable("no way there")

    assert await ask(SystemClock(), nowhere, None) == Answer(False, "no way there")


def watch(**fields: object) -> Watch:
    """A watch of a configured probe, from now on."""
    return Watch(probe(**fields), NOW)


def test_so_many_good_answers_in_a_row() -> None:
    """`ready_after` of them, and a bad one in between starts the count again."""
    it = watch(ready_after=2)
    goods = []
    for answer in (GOOD, BAD, GOOD, GOOD, BAD, GOOD, GOOD):
        it.take(answer, NOW)
        goods.append(it.good)
    assert goods == [False, False, False, True, False, False, True]


def test_a_ready_replica_may_be_busy() -> None:
    """Some time-outs in a row are taken for work, and asked again at once; more are not; a refusal never is."""
    it = watch()
    it.take(GOOD, NOW)
    for _ in range(SLOW_ANSWERS - 1):
        it.take(SLOW, NOW)
        assert (it.good, it.pause(NOW)) == (True, 0.0)
    it.take(SLOW, NOW)
    assert not it.good
    it.take(GOOD, NOW)
    assert (it.good, it.pause(NOW)) == (True, 15.0)
    it.take(BAD, NOW)
    assert not it.good


def test_how_often_it_is_asked() -> None:
    """Every 50 ms at first, slowing to once a second; at the interval when all is well."""
    it = watch(interval=7)
    pauses = [it.pause(NOW + timedelta(seconds=seconds)) for seconds in (0, 0.5, 3, 12, 1000)]
    assert pauses == [0.05, 0.05, 0.25, 1.0, 1.0]
    it.take(GOOD, NOW)
    assert it.pause(NOW) == 7.0


def test_a_doubt_counts_once() -> None:
    """It takes a good one out and asks at once; what is not good already is left alone."""
    it = watch()
    it.doubt(NOW)
    assert (it.doubts, it.asked.is_set()) == (0, False)
    it.take(GOOD, NOW)
    it.doubt(NOW + timedelta(seconds=1))
    assert (it.good, it.doubts, it.asked.is_set()) == (False, 1, True)


def test_the_problem_in_words() -> None:
    """Method, path, port, what came of it, and since when."""
    it = watch(url="/health", method="head")
    assert it.problem("port 8000") == "HEAD /health on port 8000: not probed yet (since 03:04:05 UTC)"
    it.take(BAD, NOW + timedelta(seconds=9))
    assert it.problem("port 8000") == "HEAD /health on port 8000: refused (since 03:04:05 UTC)"
    it.take(GOOD, NOW)
    assert it.problem("port 8000") is None
