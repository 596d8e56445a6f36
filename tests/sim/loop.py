"""An event loop on virtual time: one thread, no sockets, one seed is one history.

Time stands still while anything can run, and then jumps to the next timer. Callbacks that are ready run in the order
that asyncio promises; timers that are due at the same moment run in an order that the seed decides.

A `Process` is what can be killed or frozen: all that was started from within it, and nothing else, stops there and
then. Nothing of a killed one runs any more, not even its `finally`.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio import base_events, events
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

T = TypeVar("T")

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""When every history begins."""

_PROCESS: ContextVar[Process] = ContextVar("process")


class Deadlock(Exception):
    """Nothing can run, and nothing ever will."""


class Killed(BaseException):
    """Comes out of whatever a process was in the middle of when it was killed."""


class Process:
    """What stops as one.

    Attributes:
        name: for people.
        dead: it was killed.
        frozen: it stands still until `thaw`.
    """

    def __init__(self, loop: SimLoop, name: str) -> None:
        self._loop = loop
        self.name = name
        self.dead = False
        self.frozen = False
        self._held: list[events.Handle] = []
        self._deaths: dict[int, Callable[[], None]] = {}
        self._context: Context = copy_context()
        self._context.run(_PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task that belongs to this process, as will all that it starts."""
        return self._loop.create_task(work, context=self._context.copy())

    def hold(self, handle: events.Handle) -> None:
        """Keeps a callback for the time after `thaw`."""
        self._held.append(handle)

    def freeze(self) -> None:
        """Has it stand still."""
        self.frozen = True

    def thaw(self) -> None:
        """Has it go on: what came meanwhile comes now, in its order."""
        self.frozen = False
        held, self._held = self._held, []
        self._loop.resume(held)

    def kill(self) -> None:
        """Ends it there and then."""
        if self.dead:
            return
        self.dead = True
        self._held.clear()
        deaths, self._deaths = list(self._deaths.values()), {}
        for tell in deaths:
            tell()

    def on_death(self, tell: Callable[[], None]) -> None:
        """Has `tell` called when it is killed."""
        self._deaths[id(tell)] = tell

    async def ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs `work()` within this process, for somebody outside of it.

        Raises:
            ConnectionError: it was killed meanwhile. What came of the work is not known.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        key = id(answer)

        def lost() -> None:
            if not answer.done():
                answer.set_exception(ConnectionError(f"{self.name} was killed"))

        if self.dead:
            raise ConnectionError(f"{self.name} is not there")
        self._deaths[key] = lost
        _ = self.start(_deliver(work, answer))
        try:
            return await answer
        finally:
            self._deaths.pop(key, None)


async def _deliver(work: Callable[[], Coroutine[Any, Any, T]], answer: asyncio.Future[T]) -> None:
    try:
        result = await work()
    except Exception as error:  # noqa: BLE001  # whatever it is, the one who asked gets it
        if not answer.done():
            answer.set_exception(error)
    else:
        if not answer.done():
            answer.set_result(result)


def current_process() -> Process | None:
    """The process that this code runs in; `None` outside of all."""
    return _PROCESS.get(None)


class _Future(asyncio.Future[Any]):
    """Hashed by its number: the order of a set of them is the same in every run."""

    def __init__(self, number: int, loop: SimLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Task(asyncio.Task[Any]):
    """As `_Future`."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        # Before all else: asyncio puts it into a set at once.
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimLoop(base_events.BaseEventLoop):
    """The loop. `run(main)` runs a history to its end.

    Args:
        seed: decides all that is left open.

    Attributes:
        steps: how many callbacks have run.
    """

    # asyncio's own, which its stubs do not show.
    _ready: Any
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._now = 0.0
        self._order = random.Random(seed)
        self._tasks: list[_Task] = []
        self._numbers = 0
        self.steps = 0
        self.set_exception_handler(self._note_problem)
        self.problems: list[str] = []

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def create_future(self) -> _Future:
        """One that is hashed by its number."""
        self._numbers += 1
        return _Future(self._numbers, self)

    def create_task(  # type: ignore[override]  # the stubs differ from version to version
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        """One that is hashed by its number."""
        self._numbers += 1
        task = _Task(self._numbers, coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) > 2000:
            self._tasks = [task for task in self._tasks if not task.done()]
        return task

    def run_in_executor(self, *_: object) -> Any:
        """Never: threads would make two runs of a seed differ."""
        raise RuntimeError("a thread was asked for, and there are none in a simulation")

    def call_soon_threadsafe(  # type: ignore[override]  # as `create_task`
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """There is only this thread."""
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, _: asyncio.TimerHandle) -> None:
        """Cancelled timers are passed over when their time has come."""

    def _run_once(self) -> None:
        ready = self._ready
        if not ready and not self._stopping:
            self._jump()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_PROCESS)
            if process is not None:
                if process.dead:
                    continue
                if process.frozen:
                    process.hold(handle)
                    continue
            self.steps += 1
            handle._run()

    def _jump(self) -> None:
        """Goes on to the next moment at which there is something to do."""
        timers = self._scheduled
        due: list[asyncio.TimerHandle] = []
        while timers and (not due or timers[0].when() <= self._now):
            timer = heapq.heappop(timers)
            if not timer.cancelled():
                self._now = max(self._now, timer.when())
                due.append(timer)
        if not due:
            raise Deadlock(f"at {self._now:.3f} s nothing can run, and no timer is set")
        if len(due) > 1:
            # A heap leaves the order of equals open, and so does asyncio.
            due.sort(key=_number_of)
            self._order.shuffle(due)
        self._ready.extend(due)

    def call_at(  # type: ignore[override]  # as `create_task`
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Each timer has a number, so that equals can be put in an order before the seed changes it."""
        timer = _Timer(when, callback, args, self, context)
        self._numbers += 1
        timer.number = self._numbers
        heapq.heappush(self._scheduled, timer)
        return timer

    def _note_problem(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Killed):
            self.problems.append(f"{context.get('message')}: {error!r}")

    # -- what the simulation asks --------------------------------------------------------------------------------

    def resume(self, handles: list[events.Handle]) -> None:
        """Puts callbacks that were held back where they would have been."""
        self._ready.extend(handles)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs until `main` is done, and then takes apart whatever is left."""
        try:
            return self.run_until_complete(main)
        finally:
            self._take_apart()
            self.close()

    def _take_apart(self) -> None:
        """Ends what a killed process, or the end of the history, left in the middle."""
        self._ready.clear()
        self._scheduled.clear()
        events._set_running_loop(self)
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # as asyncio's own shutdown has it
                _close(task.get_coro())
        self._tasks.clear()
        events._set_running_loop(None)


class _Timer(asyncio.TimerHandle):
    number = 0


def _number_of(timer: asyncio.TimerHandle) -> int:
    return timer.number if isinstance(timer, _Timer) else 0


def _close(coroutine: Any) -> None:
    """Closes a coroutine however often it awaits in its `finally`."""
    for _ in range(20):
        try:
            coroutine.close()
        except RuntimeError:
            continue
        except BaseException:  # noqa: BLE001  # its last words interest nobody
            return
        return


# ---------------------------------------------------------------------------------------------------------------------
# The seams of the engine
# ---------------------------------------------------------------------------------------------------------------------


class VirtualClock:
    """`seams.Clock` on the loop's time.

    Args:
        loop: whose time.
        skew: seconds by which this computer's clock is ahead.
    """

    def __init__(self, loop: SimLoop, skew: float = 0.0) -> None:
        self._loop = loop
        self._epoch = EPOCH + timedelta(seconds=skew)

    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return self._epoch + timedelta(seconds=self._loop.time())

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)

    async def wait_for(self, awaitable: Any, timeout: float) -> Any:
        """Waits for a result, at most `timeout` seconds."""
        async with asyncio.timeout(timeout):
            return await awaitable


class VirtualIds:
    """UUIDs of version 7 from virtual time and seeded bits, monotonic within one process."""

    def __init__(self, clock: VirtualClock, rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._last = 0

    def uuid7(self) -> UUID:
        """A UUID of version 7."""
        micros = (self._clock.now() - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        self._last = max(((micros // 1000) << 12) | (micros % 1000 * 4096 // 1000), self._last + 1)
        millis, fraction = self._last >> 12, self._last & 0xFFF
        tail = self._rng.getrandbits(62)
        return UUID(int=(millis << 80) | (0x7 << 76) | (fraction << 64) | (0b10 << 62) | tail)


async def pass_time(seconds: float) -> None:
    """Lets virtual time pass."""
    await asyncio.sleep(seconds)
