"""What a live account may cost: price x time of everything that was started, and the cap that it stays under."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

LIVE = "DSTACK_LIVE"
CAP = "DSTACK_LIVE_CAP"
_AT_LEAST = 600.0


class OverCap(Exception):
    """Starting this would go over the cap; the message says by how much."""


@dataclass
class Meter:
    """Adds up. Each instance counts for ten minutes at least, as some clouds bill.

    Args:
        cap: USD.
    """

    cap: float
    _ended: float = 0.0
    _running: dict[tuple[UUID, UUID], tuple[float, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spent(self) -> float:
        """USD so far; what still runs counts for ten minutes at least."""
        with self._lock:
            return self._ended + sum(map(self._cost, self._running.values()))

    def start(self, owner: UUID, intent: UUID, price: float) -> None:
        """Counts an instance from now on, once.

        Raises:
            OverCap: it, and all that runs, could cost more than the cap; nothing is counted.
        """
        if (owner, intent) not in self._running:
            self.afford(price, 1)
        with self._lock:
            self._running.setdefault((owner, intent), (price, time.monotonic()))

    def afford(self, price: float, count: int) -> None:
        """Raises `OverCap` unless so many more instances at this price are affordable."""
        wanted, spent = price * count * _AT_LEAST / 3600, self.spent()
        if spent + wanted > self.cap:
            raise OverCap(
                f"the spend cap {CAP} of ${self.cap:g} would be passed: ${spent:.4f} is spent, and this case needs up "
                f"to ${wanted:.4f}"
            )

    def end_all(self, owners: Sequence[UUID]) -> None:
        """Stops counting the instances of these owners: they are confirmed gone."""
        with self._lock:
            for key in [key for key in self._running if key[0] in owners]:
                self._ended += self._cost(self._running.pop(key))

    def _cost(self, entry: tuple[float, float]) -> float:
        price, since = entry
        return price * max(_AT_LEAST, time.monotonic() - since) / 3600


_METER: list[Meter] = []


def is_live() -> bool:
    """Whether a live account is to be used."""
    return os.environ.get(LIVE) == "1"


def meter() -> Meter:
    """The one of this process. Workers of pytest-xdist share the cap.

    Raises:
        ValueError: there is no cap.
    """
    if not _METER:
        text = os.environ.get(CAP, "")
        try:
            cap = float(text)
        except ValueError:
            raise ValueError(
                f"{LIVE}=1 uses a live account, so say how many USD this run may cost: {CAP}=2.50 (now {text!r})"
            ) from None
        _METER.append(Meter(cap / int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    return _METER[0]
