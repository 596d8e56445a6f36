"""Where the engine touches time, chance and identity. Production and simulation pass in different ones.

Nothing else in `_engine` reads a clock, draws a random number, makes an id, or starts a thread.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeVar
from uuid import UUID

T = TypeVar("T")


class Clock(Protocol):
    """Wall-clock time and waiting."""

    def now(self) -> datetime:
        """The time, aware, in UTC."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""

    async def wait_for(self, awaitable: Awaitable[T], timeout: float) -> T:
        """Waits for a result, at most `timeout` seconds; then cancels it and raises `TimeoutError`."""


class Rng(Protocol):
    """Chance, for names and for the spread of pauses."""

    def random(self) -> float:
        """A number in [0, 1)."""

    def getrandbits(self, k: int, /) -> int:
        """`k` random bits."""


class Ids(Protocol):
    """New identities."""

    def uuid7(self) -> UUID:
        """A UUID of version 7: sorted by time of making."""


class SystemClock:
    """The computer's clock and asyncio's timers."""

    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)

    async def wait_for(self, awaitable: Awaitable[T], timeout: float) -> T:
        """Waits for a result, at most `timeout` seconds."""
        # Not asyncio.wait_for: that of Python 3.11 swallows a cancellation that comes together with the result.
        async with asyncio.timeout(timeout):
            return await awaitable


class SystemIds:
    """UUIDs of version 7 as in RFC 9562, monotonic within this process."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._last = 0

    def uuid7(self) -> UUID:
        """A UUID of version 7: milliseconds and a sub-millisecond counter first, then chance."""
        # 48 bits of milliseconds and 12 bits of a fraction: RFC 9562, section 6.2, method 3.
        now = time.time_ns()
        stamp = ((now // 1_000_000) << 12) | ((now % 1_000_000) * 4096 // 1_000_000)
        self._last = max(stamp, self._last + 1)
        millis, fraction = self._last >> 12, self._last & 0xFFF
        tail = self._rng.getrandbits(62)
        return UUID(int=(millis << 80) | (0x7 << 76) | (fraction << 64) | (0b10 << 62) | tail)


@dataclass(frozen=True)
class Seams:
    """All of them together."""

    clock: Clock
    rng: Rng
    ids: Ids


def real_seams() -> Seams:
    """The seams of production."""
    rng = random.SystemRandom()
    return Seams(clock=SystemClock(), rng=rng, ids=SystemIds(rng))
