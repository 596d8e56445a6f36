"""Probes: one small HTTP request that finds out whether a replica is ready, and what the answers add up to."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import quote

from dstack_core._engine.seams import Clock
from dstack_core._models.services import ProbeConfig
from dstack_core._transport import AgentUnreachable

Connect = Callable[[], Awaitable[socket.socket]]

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between the probes of a replica that is not ready: at first, and at last."""
SLOW_ANSWERS = 3
"""So many time-outs in a row make a ready replica unready: before that it is taken to be busy with its work."""
_MOST, _PIECE = 1 << 16, 1 << 14
_LAST_WORDS = 0.1
"""Seconds for the rest of an answer, so that the program does not see its connection break."""
_STATUS = re.compile(rb"HTTP/1\.[0-9] ([1-5][0-9][0-9])(?: |\r|\n)")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one probe: whether that is what was wanted, in words, and whether merely nothing came in time."""

    good: bool
    said: str
    slow: bool = False


@dataclass(slots=True)
class Watch:
    """What the answers to one probe add up to.

    Attributes:
        config: the probe; `None` for the default one: `GET /`, and any answer but a server's error is good.
        good: so many good answers in a row as are wanted, and no bad one since.
        said: what came of the last one; `None` before it.
        since: since when it is (not) good.
        doubts: how often it was doubted: an answer to a question from before that does not count.
        asked: set when the next probe is wanted at once.
    """

    config: ProbeConfig | None
    since: datetime
    good: bool = False
    said: str | None = None
    doubts: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    _streak: int = 0
    _slow: int = 0

    @property
    def probe(self) -> ProbeConfig:
        """What is sent."""
        return self.config or _DEFAULT

    def doubt(self, at: datetime) -> None:
        """It is not good until the next answers say so."""
        if self.good:
            self._turn(at, good=False)
            self.doubts += 1
            self._streak = 0
            self.asked.set()

    def take(self, answer: Answer, at: datetime) -> None:
        """Adds an answer."""
        self.said = answer.said
        self._streak = self._streak + 1 if answer.good else 0
        self._slow = self._slow + 1 if answer.slow else 0
        if answer.good and self._streak >= self.probe.ready_after:
            self._turn(at, good=True)
        elif not answer.good and not (self.good and answer.slow and self._slow < SLOW_ANSWERS):
            self._turn(at, good=False)

    def _turn(self, at: datetime, good: bool) -> None:
        if good is not self.good:
            self.good, self.since = good, at

    def pause(self, at: datetime) -> float:
        """Seconds to the next probe."""
        if self.good:
            return float(self.probe.interval) if not self._slow else 0.0
        return min(LONGEST_PAUSE, max(FIRST_PAUSE, (at - self.since).total_seconds() / 12))

    def problem(self, where: str) -> str | None:
        """For people: what was probed (`where`: on which port) and what came of it, if that is not good."""
        if self.good:
            return None
        what = f"{self.probe.method.upper()} {self.probe.url} on {where}"
        return f"{what}: {self.said or 'not probed yet'} (since {self.since:%H:%M:%S} UTC)"


_DEFAULT = ProbeConfig(type="http")


async def ask(clock: Clock, connect: Connect, config: ProbeConfig | None) -> Answer:
    """Sends a probe on a connection of its own, and judges the answer. Never raises but when cancelled."""
    probe = config or _DEFAULT
    try:
        status = await clock.wait_for(_exchange(clock, connect, _request(probe)), float(probe.timeout))
    except TimeoutError:
        return Answer(False, f"no answer within {probe.timeout} s", slow=True)
    except ConnectionRefusedError:
        return Answer(False, "connection refused: nothing listens there")
    except AgentUnreachable as error:
        return Answer(False, str(error))
    except (OSError, ValueError) as error:
        return Answer(False, str(error))
    good = status < 500 if config is None else 200 <= status < 300
    return Answer(good, f"answered with status {status}")


def _request(probe: ProbeConfig) -> bytes:
    headers = {"host": ("Host", "localhost"), "user-agent": ("User-Agent", "dstack-probe"), "accept": ("Accept", "*/*")}
    headers |= {one.name.lower(): (one.name, one.value) for one in probe.headers}
    body = (probe.body or "").encode()
    if body or probe.method in {"post", "put", "patch"}:
        headers["content-length"] = ("Content-Length", str(len(body)))
    headers["connection"] = ("Connection", "close")
    lines = [f"{probe.method.upper()} {quote(probe.url, safe=_IN_TARGET)} HTTP/1.1"]
    lines += [_one_line(f"{name}: {value}") for name, value in headers.values()]
    return "\r\n".join([*lines, "", ""]).encode() + body


_IN_TARGET = "/?&=%:@!$'()*+,;~-._"


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n\0]+", " ", text)


async def _exchange(clock: Clock, connect: Connect, request: bytes) -> int:
    connection = await connect()
    try:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, request)
        status = await _status(connection)
        with suppress(TimeoutError, OSError):
            await clock.wait_for(_drain(connection), _LAST_WORDS)
        return status
    finally:
        connection.close()


async def _status(connection: socket.socket) -> int:
    """Status of the answer.

    Raises:
        ConnectionError: there is none.
        ValueError: what answers does not speak HTTP.
    """
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < _MOST:
        status = _final_status(received)
        if status is not None:
            return status
        piece = await loop.sock_recv(connection, _PIECE)
        if not piece:
            break
        received += piece
    if not received:
        raise ConnectionResetError("closed the connection without an answer")
    raise ValueError(f"answered with something that is not HTTP: {received[:40]!r}")


def _final_status(received: bytes) -> int | None:
    """The status at the begin, after those of the provisional answers (100 to 199)."""
    while match := _STATUS.match(received):
        if int(match[1]) >= 200:
            return int(match[1])
        received = received.partition(b"\r\n\r\n")[2]
    return None


async def _drain(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    left = _MOST
    while left > 0 and (piece := await loop.sock_recv(connection, _PIECE)):
        left -= len(piece)
