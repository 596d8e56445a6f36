"""Whether somebody is at work with a job: a job that is for people ends when nobody has been for some time."""

from __future__ import annotations

import os
import sys
import time

from .lean import quiet
from .steps import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from .loop import Loop
    from .steps import Looks, Steps

WAITS = b"sleep\x002147483647\x00"
"""How the command line ends that the script of a dev environment becomes after its `init` commands, which are work."""

_LONGEST_PAUSE = 30.0
_BETWEEN_PIECES = 0.1
_ENTRIES = 4000
"""Files and folders of one look: some 20 milliseconds."""


class Idle:
    """Calls `over` once nobody has been at work for `limit` seconds.

    Args:
        look: says when somebody was last seen at work, and until when nobody can have been overlooked; both as
            `time.monotonic()` would.
        done: nothing is to be looked at any more.
    """

    def __init__(
        self, loop: Loop, limit: float, look: Callable[[], Looks], done: Callable[[], bool], over: Callable[[], None]
    ) -> None:
        self._loop, self._limit, self._look, self._done, self._over = loop, limit, look, done, over
        self._last = time.monotonic()
        self._again(0)

    def note(self) -> None:
        """Somebody is at work now."""
        self._last = time.monotonic()

    def _again(self, seconds: float) -> None:
        self._loop.later(seconds, self._check)

    def _check(self) -> None:
        if not self._done():
            Work(self._loop, self._steps(), self._failed)

    def _steps(self) -> Steps:
        seen, covered = yield from self._look()
        self._last = max(self._last, seen)
        due = self._last + self._limit
        left = due - time.monotonic()
        if self._done():
            return
        if left > 0:
            self._again(min(left, self._limit / 4, _LONGEST_PAUSE))
        elif covered < due:
            self._again(min(_BETWEEN_PIECES, self._limit))
        else:
            self._over()

    def _failed(self, error: Exception) -> None:
        """A look that went wrong says nothing; the next one may."""
        sys.excepthook(type(error), error, error.__traceback__)
        self._again(min(self._limit / 4, _LONGEST_PAUSE))


class Changes:
    """When something in a folder was last changed.

    Each look goes on where the one before had to stop, so that a folder of any size costs no more than a small one.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._walk: Iterator[float] | None = None
        self._began = 0.0
        self._covered = 0.0

    def look(self) -> tuple[float, float]:
        """The latest change that was found, and up to when all changes are known (`time.monotonic()`)."""
        now, clock = time.monotonic(), time.time()
        if self._walk is None:
            self._walk, self._began = _times(self._folder), now
        newest = 0.0
        for count, changed in enumerate(self._walk, 1):
            # What is from the future, by mistake or on purpose, says nothing about when it was written.
            newest = max(newest, changed if changed <= clock + 1 else 0.0)
            if count == _ENTRIES:
                break
        else:
            self._walk, self._covered = None, self._began
        return now - max(0.0, clock - newest), self._covered


def _times(folder: str) -> Iterator[float]:
    """When each file and folder below was last written, or got or lost an entry."""
    folders = [folder]
    with quiet:
        yield os.stat(folder).st_mtime
    while folders:
        with quiet, os.scandir(folders.pop()) as entries:
            for entry in entries:
                with quiet:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    yield entry.stat(follow_symlinks=False).st_mtime


def somebody_in(folders: Iterable[str], own: Container[int]) -> bool:
    """Whether a process of this user works in one of the folders, other than `own`: a terminal, an editor's helper.

    Where there is no /proc this is not known, and only files that change show it.
    """
    places = [os.path.realpath(folder) for folder in folders]
    places = [place for place in places if place != "/"]
    with quiet:
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in own and _works_in(name, places):
                return True
    return False


def _works_in(process: str, places: list[str]) -> bool:
    with quiet:
        where = os.readlink("/proc/%s/cwd" % process)
        if any(where == place or where.startswith(place + "/") for place in places):
            # Root may look into everybody's.
            return os.stat("/proc/" + process).st_uid == os.getuid()
    return False


def waits(processes: Iterable[int]) -> bool:
    """Whether a dev environment with these processes has done its `init` commands; true if that cannot be seen."""
    seen = False
    for process in processes:
        with quiet, open("/proc/%d/cmdline" % process, "rb") as line:
            seen = True
            if line.read().endswith(WAITS):
                return True
    return not seen
