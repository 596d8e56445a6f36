"""Asks one address again and again over many connections, and says how long each answer took and what failed.

    python load.py URL CONNECTIONS SECONDS RATE [HEADER…]

RATE requests a second, spread evenly over the connections, whether or not answers come (0: as many as get answers).
A connection that is closed is made again. The answer must say how long it is.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import uvloop


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.transport: asyncio.Transport | None = None
        self.waiting = False
        self.began = 0.0
        self.answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self.transport = cast("asyncio.Transport", transport)

    def ask(self) -> None:
        """Sends the request."""
        assert self.transport is not None
        self.waiting, self.answer, self.began = True, b"", time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        """A part of the answer, as a rule all of it."""
        answer = self.answer = self.answer + data if self.answer else data
        head = answer.find(b"\r\n\r\n")
        if head < 0 or not self.waiting:
            return
        if len(answer) >= head + 4 + length_of(answer[:head]):
            self.waiting = False
            self.load.answered(self, "" if answer[9:12] == b"200" else f"status {answer[9:12].decode()}")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.transport = None
        if self.waiting:
            self.waiting = False
            self.load.answered(self, f"closed ({exc})")


def length_of(head: bytes) -> int:
    """What the head of an answer says about its body."""
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


class Load:
    """The whole load."""

    def __init__(self, url: str, connections: int, headers: list[str]) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "127.0.0.1", parts.port or 80)
        lines = "".join(f"{header}\r\n" for header in headers)
        self.request = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n{lines}\r\n".encode()
        self.connections = connections
        self.seconds: list[float] = []
        self.failed: collections.Counter[str] = collections.Counter()
        self.free: asyncio.Queue[Client] = asyncio.Queue()
        self.late = 0
        self.closed_loop = False
        self.over = False

    def answered(self, client: Client, problem: str) -> None:
        """One request has ended."""
        if problem:
            self.failed[problem] += 1
        else:
            self.seconds.append(time.perf_counter() - client.began)
        if self.closed_loop and not self.over and client.transport is not None:
            client.ask()
        else:
            self.free.put_nowait(client)

    async def client(self) -> Client:
        """A connection that is free."""
        client = await self.free.get()
        if client.transport is None:
            client = await self.new()
        return client

    async def new(self) -> Client:
        """A new connection."""
        client = Client(self)
        await asyncio.get_running_loop().create_connection(lambda: client, *self.address)
        return client

    async def run(self, seconds: float, rate: float) -> dict[str, object]:
        """All of it."""
        for _ in range(self.connections):
            self.free.put_nowait(await self.new())
        begin = time.perf_counter()
        await (self.steady(begin, seconds, rate) if rate else self.as_fast(begin, seconds))
        took = time.perf_counter() - begin
        self.over = True
        async with asyncio.timeout(30):
            for _ in range(self.connections):
                await self.free.get()
        return {"seconds": self.seconds, "failed": self.failed, "rate": len(self.seconds) / took, "late": self.late}

    async def steady(self, begin: float, seconds: float, rate: float) -> None:
        """One request every so often."""
        for number in range(int(seconds * rate)):
            pause = begin + number / rate - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            self.late += self.free.empty()
            (await self.client()).ask()

    async def as_fast(self, begin: float, seconds: float) -> None:
        """Each connection asks again as soon as it is answered."""
        self.closed_loop = True
        while (left := begin + seconds - time.perf_counter()) > 0:
            try:
                async with asyncio.timeout(left):
                    # Only connections that were closed come back.
                    (await self.client()).ask()
            except TimeoutError:
                break
        # Nothing that is free any more may be counted twice.
        self.closed_loop = False


url, connections, duration, rate, *headers = sys.argv[1:]
load = Load(url, int(connections), headers)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    print(json.dumps(runner.run(load.run(float(duration), float(rate)))))
