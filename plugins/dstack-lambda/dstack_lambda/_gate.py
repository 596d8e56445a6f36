"""Lambda's limits, kept by all processes of this user together: when the next request may be made, and the next launch.

What is known is in a file. Whoever wants to ask takes the next turn out of it under a lock, and waits for it outside.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dstack_core.plugin import RateLimitedError

PATIENCE = 13.0
"""Seconds that somebody waits for a turn; who would have to wait longer is told so, and comes again."""
LINE = 4
"""So many of a process stand in line for a launch at once; more would keep others from looking and ending."""
MARGIN = 1.05
"""Turns are so much further apart than they need be: requests do not all travel equally long."""

_REQUEST, _LAUNCH, _PAUSE = "request", "launch", "pause"
_SANE = 3600.0


class Gate:
    """Turns for the requests of one account. Safe to use from several threads and processes.

    Args:
        folder: where the file is; shared by all processes of this user.
        request_interval: seconds from one request to the next.
        launch_interval: seconds from one launch to the next; a launch is a request, too.
        clock: seconds since the epoch, the same for all processes.
        sleep: lets so many seconds pass.
    """

    def __init__(
        self,
        folder: Path,
        request_interval: float,
        launch_interval: float,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._path = folder / "turns.json"
        self._intervals = {_REQUEST: request_interval * MARGIN, _LAUNCH: launch_interval * MARGIN}
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._line = threading.Semaphore(LINE)
        self._alone: dict[str, float] = {}

    def wait(self, *, launch: bool = False) -> None:
        """Returns when it is this request's turn.

        Raises:
            RateLimitedError: it would take longer than `PATIENCE`, or the line is too long; says how long.
        """
        until = self._clock() + PATIENCE
        while True:
            seconds, mine = self._take(until, launch=launch)
            if not mine:
                self._stand_in_line(seconds)
            elif seconds > 0:
                self._sleep(seconds)
            if mine and not self._is_held():
                return

    def hold(self, seconds: float) -> None:
        """Lambda asks for a pause: nobody asks anything for so long."""
        with self._turns() as turns:
            turns[_PAUSE] = max(turns.get(_PAUSE, 0.0), self._clock() + seconds)

    def _stand_in_line(self, seconds: float) -> None:
        """Waits for a turn to launch to come."""
        if not self._line.acquire(blocking=False):
            raise self._busy(_LAUNCH, seconds)
        try:
            self._sleep(seconds)
        finally:
            self._line.release()

    def _busy(self, what: str, seconds: float) -> RateLimitedError:
        interval = self._intervals[what] / MARGIN
        said = f"Lambda takes one {what} in {interval:g} s, and others are before this one"
        return RateLimitedError(said, retry_after=round(seconds, 3))

    def _is_held(self) -> bool:
        """Whether somebody was told to pause while we waited."""
        with self._turns() as turns:
            return turns.get(_PAUSE, 0.0) > self._clock()

    def _take(self, until: float, *, launch: bool) -> tuple[float, bool]:
        """How long to wait, and whether that is then our turn: a turn to launch is taken only when it has come."""
        with self._turns() as turns:
            now = self._clock()
            start = max(now, turns.get(_REQUEST, 0.0), turns.get(_PAUSE, 0.0))
            free = turns.get(_LAUNCH, 0.0) if launch else now
            if max(start, free) > until:
                raise self._busy(_LAUNCH if launch and free > start else _REQUEST, max(start, free) - now)
            if free > now:
                return free - now, False
            turns[_REQUEST] = start + self._intervals[_REQUEST]
            if launch:
                turns[_LAUNCH] = start + self._intervals[_LAUNCH]
            return start - now, True

    @contextmanager
    def _turns(self) -> Iterator[dict[str, float]]:
        """What is known, to be changed; written back unless something is raised."""
        with self._lock:
            file = self._opened()
            if file is None:
                yield self._alone
                return
            with file:
                fcntl.flock(file, fcntl.LOCK_EX)
                turns = _sane(_read(file), self._clock())
                before = dict(turns)
                yield turns
                if turns != before:
                    file.seek(0)
                    file.truncate()
                    file.write(json.dumps(turns))
                    file.flush()

    def _opened(self) -> IO[str] | None:
        """The file; `None` where there is no room or no permission, and each process keeps the limits alone."""
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._path.open("a+")
        return None


def _read(file: IO[str]) -> dict[str, float]:
    """What is written there. What cannot be read is as good as nothing."""
    file.seek(0)
    with suppress(ValueError, TypeError, AttributeError):
        return {str(key): float(value) for key, value in json.loads(file.read()).items()}
    return {}


def _sane(turns: dict[str, float], now: float) -> dict[str, float]:
    """Without what lies far in the future: the clock was set back meanwhile."""
    return {key: value for key, value in turns.items() if value < now + _SANE}
