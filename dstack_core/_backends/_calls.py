"""Running blocking hooks without blocking anybody: one daemon thread per call, bounded per backend."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
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


class ThreadCaller:
    """Runs each call in a daemon thread, so that one that hangs delays neither other backends nor the exit."""

    def __init__(self) -> None:
        self._places: dict[str, asyncio.Semaphore] = {}

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
        _start(key, loop, places, future, function)
        async with asyncio.timeout_at(deadline):
            return await future


def _start(
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
        threading.Thread(target=work, name=f"dstack-{key}", daemon=True).start()
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
