"""Running blocking hooks without blocking anybody: a daemon thread for each call, bounded per backend."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The call was not started: as many calls of this backend as are allowed are under way."""


class Caller(Protocol):
    """How hooks are run. The seam where a simulator runs them inline."""

    async def __call__(self, key: str, limit: int, timeout: float, function: Callable[[], T]) -> T:
        """Runs a function that may block.

        Args:
            key: whose call it is; at most `limit` calls of one key run at once.
            limit: see `key`.
            timeout: seconds until it is given up.
            function: raises only `BackendError`.

        Raises:
            Busy: no call ended in time, so this one never started.
            TimeoutError: it did not end in time. It goes on, and occupies its place until it ends.
        """


_Call = tuple[str, Callable[[], None]]


class _Threads:
    """Daemon threads: one that has nothing to do takes the next call, as starting one costs more than most calls do."""

    MOST = 4
    """How many wait for another call."""
    PATIENCE = 3.0
    """Seconds for which they do."""

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_Call]] = deque()

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Has work done that does not raise, in a thread of this name.

        Raises:
            RuntimeError: there are no more threads.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name=name, daemon=True).start()
        inbox.put((name, work))

    def _serve(self, inbox: SimpleQueue[_Call]) -> None:
        thread = threading.current_thread()
        call: _Call | None = inbox.get()
        while call is not None:
            thread.name, work = call
            work()
            del work
            if len(self._idle) >= self.MOST:
                return
            self._idle.append(inbox)
            call = self._next(inbox)

    def _next(self, inbox: SimpleQueue[_Call]) -> _Call | None:
        """The next call; `None` if none came."""
        with contextlib.suppress(Empty):
            return inbox.get(timeout=self.PATIENCE)
        try:
            self._idle.remove(inbox)
        except ValueError:  # taken at this very moment: a call follows
            return inbox.get()
        return None


class ThreadCaller:
    """Runs each call in a daemon thread, so that one that hangs delays neither other backends nor the exit."""

    def __init__(self) -> None:
        self._places: dict[str, asyncio.Semaphore] = {}
        self._threads = _Threads()

    async def __call__(self, key: str, limit: int, timeout: float, function: Callable[[], T]) -> T:
        """See `Caller`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        places = self._places.setdefault(key, asyncio.Semaphore(limit))
        try:
            async with asyncio.timeout_at(deadline):
                await places.acquire()
        except TimeoutError:
            raise Busy from None
        future: asyncio.Future[T] = loop.create_future()
        _start(self._threads, key, loop, places, future, function)
        async with asyncio.timeout_at(deadline):
            return await future


def _start(
    threads: _Threads,
    key: str,
    loop: asyncio.AbstractEventLoop,
    places: asyncio.Semaphore,
    future: asyncio.Future[T],
    function: Callable[[], T],
) -> None:
    def ended(deliver: Callable[[], None]) -> None:
        places.release()
        if not future.done():
            deliver()

    def work() -> None:
        deliver: Callable[[], None]
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  # delivered to the caller, whatever it is
            problem = error
            deliver = lambda: future.set_exception(problem)  # noqa: E731  # binds the error past the except block
        else:
            deliver = lambda: future.set_result(result)  # noqa: E731  # the twin of the one above
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(ended, deliver)

    try:
        threads.run(f"dstack-{key}", work)
    except RuntimeError:  # no more threads
        places.release()
        raise Busy from None


def in_time(functions: list[Callable[[], None]], timeout: float | None) -> list[bool]:
    """Runs functions side by side, each in a daemon thread, and says which ended in time.

    Args:
        functions: must not raise.
        timeout: seconds for all together; `None` runs them one after the other in this thread.
    """
    if timeout is None:
        for function in functions:
            function()
        return [True] * len(functions)
    ended = [threading.Event() for _ in functions]
    for function, event in zip(functions, ended, strict=True):
        threading.Thread(target=_then_set, args=(function, event), name="dstack-load", daemon=True).start()
    return _all_set(ended, timeout)


def _then_set(function: Callable[[], None], event: threading.Event) -> None:
    try:
        function()
    finally:
        event.set()


def _all_set(events: list[threading.Event], timeout: float) -> list[bool]:
    from time import monotonic

    deadline = monotonic() + timeout
    return [event.wait(max(0.0, deadline - monotonic())) for event in events]
