"""Which replica gets a request, and what happens when it does not answer."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

import httpx
import pytest

from tests.support.upstreams import Handler, Seen, respond

HEAD = b"HTTP/1.1 200 OK\r\n"


def named(name: str) -> Handler:
    """A handler that says who it is."""
    return respond(name.encode())


async def dies(request: Seen) -> None:
    """Takes a request and goes."""
    await request.body()
    raise ConnectionError("killed")


async def dies_in_the_body(request: Seen) -> None:
    """Begins a small answer and goes."""
    await request.answer(HEAD + b"Content-Length: 100\r\n\r\nabc")
    raise ConnectionError("killed")


def test_in_turn(services: Any) -> None:
    """Idle replicas get requests in turn, whatever other services do in between."""
    services.add("web", *(named(name) for name in "abc"))
    services.add("other", *(named(name) for name in "xyz"))
    with services.client() as client:
        found = []
        for _ in range(30):
            found.append(client.get("/services/main/web/").text)
            client.get("/services/main/other/")
    assert collections.Counter(found) == {"a": 10, "b": 10, "c": 10}
    assert found[:3] == found[3:6]


def test_least_busy(services: Any) -> None:
    """A replica that is still at work on something gets no more while another one has nothing to do."""
    go = asyncio.Event()

    async def slow(request: Seen) -> None:
        await request.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        await go.wait()
        await request.answer(b"0\r\n\r\n")

    busy, idle = services.add("web", slow, named("idle"))
    with services.client() as client:
        streams = []
        while not busy.seen:
            streams.append(client.stream("GET", "/services/main/web/"))
            streams[-1].__enter__()
        assert [client.get("/services/main/web/").text for _ in range(10)] == ["idle"] * 10
        services.loop.loop.call_soon_threadsafe(go.set)
        for stream in streams:
            stream.__exit__(None, None, None)
    assert len(busy.seen) == 1
    assert len(idle.seen) >= 10


def closed_port(services: Any) -> int:
    """A port on which nothing listens any more."""
    replica = services.replica(respond())
    replica.stop()
    return int(replica.port)


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_replica_that_cannot_be_reached(services: Any, method: str) -> None:
    """No request fails, of whatever method, because a replica refuses connections or its machine is away."""
    alive = services.replica(named("alive"))
    refusing = closed_port(services)
    services.set("web", [refusing, 0, alive.port], auth=False)
    with services.client() as client:
        for _ in range(6):
            assert client.request(method, "/services/main/web/", content=b"x" * 100_000).text == "alive"
    assert sorted(event for event in services.events() if event.startswith("suspect")) == [
        "suspect 0",
        f"suspect {refusing}",
    ]


@pytest.mark.parametrize(
    ("method", "handler"),
    [
        ("HEAD", dies),
        *((method, how) for method in ("GET", "OPTIONS", "PUT", "DELETE") for how in (dies, dies_in_the_body)),
    ],
)
def test_replica_that_dies(services: Any, method: str, handler: Handler) -> None:
    """A request that may be repeated is, when its replica dies before a small answer is complete."""
    dead, _ = services.add("web", handler, named("alive"))
    with services.client() as client:
        for _ in range(4):
            answer = client.request(method, "/services/main/web/", content=b"x" if method == "PUT" else None)
            assert (answer.status_code, answer.headers["content-length"]) == (200, "5")
    assert len(dead.seen) == 1


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_request_that_may_have_been_carried_out(services: Any, method: str) -> None:
    """A request that must not be repeated is not, and the client is told that it may have been carried out."""
    dead, _ = services.add("web", dies, named("alive"))
    with services.client() as client:
        answers = [client.request(method, "/services/main/web/", content=b"x") for _ in range(2)]
    assert sorted(answer.status_code for answer in answers) == [200, 502]
    (failed,) = (answer for answer in answers if answer.status_code == 502)
    assert "may have been carried out" in failed.json()["detail"][0]["msg"]
    assert len(dead.seen) == 1
    assert f"suspect {dead.port}" in services.events()


def test_large_body_that_is_gone(services: Any) -> None:
    """A large body is passed on as it comes, so that a request with one is not repeated once it was begun."""
    dead, _ = services.add("web", dies, named("alive"))
    with services.client() as client:
        answers = [client.put("/services/main/web/", content=b"x" * 300_000) for _ in range(2)]
    assert sorted(answer.status_code for answer in answers) == [200, 502]
    assert len(dead.seen) == 1


def test_request_that_kills(services: Any) -> None:
    """A request that ends every replica it reaches does not reach all of them."""
    replicas = services.add("web", *([dies] * 6))
    assert services.get("/services/main/web/").status_code == 502
    assert sum(len(replica.seen) for replica in replicas) == 3


def test_nobody_left(services: Any) -> None:
    """When every replica has failed, the client is told so within the time that a request waits."""
    services.set("web", [closed_port(services), closed_port(services)], auth=False, patience=0.2)
    answer = services.get("/services/main/web/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_connection_that_was_closed_meanwhile(services: Any) -> None:
    """A kept connection that its replica has closed is no reason to suspect the replica."""

    async def once(request: Seen) -> None:
        await request.answer(HEAD + b"Content-Length: 4\r\n\r\nonce")
        if request.target == "/second":
            raise ConnectionError("closed as the next request comes")
        await request.reader.readexactly(1)
        raise ConnectionError("closed instead of an answer")

    (replica,) = services.add("web", once)
    with services.client() as client:
        for path in ("first", "second", "first", "second"):
            assert client.get(f"/services/main/web/{path}").text == "once"
    assert not [event for event in services.events() if event.startswith("suspect")]
    assert replica.connections > 1


def test_many_at_once(services: Any) -> None:
    """Each of many requests at once gets its own answer."""

    async def echo(request: Seen) -> None:
        body = await request.body()
        await asyncio.sleep(0)
        await request.answer(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    services.add("web", echo, echo, echo)

    async def ask() -> list[bool]:
        async with httpx.AsyncClient(base_url=services.url, timeout=60) as client:

            async def one(number: int) -> bool:
                body = f"{number} ".encode() * (number % 7 * 5000 + 1)
                answer = await client.post("/services/main/web/", content=body)
                return answer.content == body

            return await asyncio.gather(*(one(number) for number in range(300)))

    assert all(asyncio.run(ask()))
