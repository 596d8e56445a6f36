"""Time that passes when it is told to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class SimClock:
    """Virtual time. It stands still until `advance`.

    A subclass may take its seconds from elsewhere, for example from an event loop that simulates: override `time`.

    Args:
        epoch: the date at second 0; the beginning of 2026 by default.
    """

    def __init__(self, epoch: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._epoch = epoch
        self._seconds = 0.0

    def time(self) -> float:
        """Seconds since the beginning."""
        return self._seconds

    def now(self) -> datetime:
        """The date, aware, in UTC."""
        return self.at(self.time())

    def at(self, seconds: float) -> datetime:
        """The date at a second."""
        return self._epoch + timedelta(seconds=seconds)

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds:g} s")
        self._seconds += seconds
