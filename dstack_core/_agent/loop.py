"""The agent's one loop: readiness of file descriptors, timers, and ends of children."""

from __future__ import annotations

import os
import select
import sys
import time

from .lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ = select.POLLIN
WRITE = select.POLLOUT


class Timer:
    """A callback at a time. Cancelling twice, or after it ran, is harmless."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """It will not run."""
        self.callback = None


class Loop:
    """Runs callbacks until `stop()`. A callback that raises is reported and does not end the loop."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._children: dict[int, Callable[[int], None]] = {}
        self._signals: dict[int, Callable[[], None]] = {}
        self._running = True
        self.reaped_cpu = 0.0
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        signal.set_wakeup_fd(self._wake_in)
        self.watch(self._wake_out, READ, self._woken)
        self.on_signal(signal.SIGCHLD, self._child_ended)

    # ------------------------------------------------------------------------------------------ registrations --

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Calls `handler(events)` whenever `fd` is ready. Watching again replaces what was there."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """No more calls for `fd`. To be said before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls `callback` once, after `seconds`."""
        timer = Timer(time.monotonic() + seconds, callback)
        self._timers.append(timer)
        return timer

    def on_exit(self, pid: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(exit code)` when this child has ended; 128 + N when signal N ended it."""
        self._children[pid] = callback

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Calls `callback` from the loop, never in the middle of something, after this signal."""
        self._signals[number] = callback
        signal.signal(number, _nothing)

    def children(self) -> list[int]:
        """The children somebody waits for."""
        return list(self._children)

    def stop(self) -> None:
        """`run` returns after the current round."""
        self._running = False

    # ------------------------------------------------------------------------------------------------ running --

    def run(self) -> None:
        """Until `stop()`."""
        while self._running:
            for fd, events in self._poll.poll(self._pause()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    _guarded(handler, events)
            if self._timers:
                self._run_due()

    def _pause(self) -> float | None:
        if not self._timers:
            return None
        first = min(timer.when for timer in self._timers)
        return max(0.0, (first - time.monotonic()) * 1000 + 0.5)

    def _run_due(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer.callback is None or timer.when <= now]
        if due:
            self._timers = [timer for timer in self._timers if timer not in due]
        for timer in due:
            if timer.callback is not None:
                _guarded(timer.callback)

    def _woken(self, _: int) -> None:
        for number in set(os.read(self._wake_out, 4096)):
            callback = self._signals.get(number)
            if callback is not None:
                _guarded(callback)

    def _child_ended(self) -> None:
        self.reap()

    def reap(self) -> bool:
        """Takes note of all that have ended: our own children, and orphans of the job that fell to us.

        Returns:
            Whether there are others that have not. That is exact: without a child there is no descendant either.
        """
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self.reaped_cpu += usage.ru_utime + usage.ru_stime
            callback = self._children.pop(pid, None)
            if callback is not None:
                _guarded(callback, exit_code(status))


def exit_code(status: int) -> int:
    """What a shell would report for this wait status."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _nothing(_number: int, _frame: object) -> None:
    """The signal's number is already in the wake-up pipe."""


def _guarded(callback: Callable[..., None], *arguments: int) -> None:
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001 - the job must survive a mistake of ours; it is in agent.log
        sys.excepthook(*sys.exc_info())
