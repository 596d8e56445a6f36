"""Submitting so that Ctrl+C cannot leave it unknown whether the run exists."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core._models.runs import Run, RunSpec

PATIENCE = 10.0
"""Seconds after Ctrl+C in which the server may still say what became of the run."""
REST = 0.5
"""Seconds for which a thread waits for another submission: starting one takes as long as a good part of that."""


class _Submission:
    """The work, in another thread, which Ctrl+C does not reach."""

    def __init__(self, prepare: Callable[[], RunSpec], send: Callable[[RunSpec], Run]) -> None:
        self._prepare = prepare
        self._send = send
        self._lock = threading.Lock()
        self._cancelled = False
        self._sending = False
        self._done = threading.Event()
        self.run: Run | None = None
        self.error: BaseException | None = None

    def result(self) -> Run:
        """The run, once it is submitted; or the error, raised."""
        _in_thread(self._work)
        self._done.wait()
        if self.run is None:
            raise self.error or RuntimeError("The request ended without an answer")
        return self.run

    def _work(self) -> None:
        try:
            spec = self._prepare()
            if self._may_send():
                self.run = self._send(spec)
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            self.error = error
        finally:
            self._done.set()

    def _may_send(self) -> bool:
        with self._lock:
            self._sending = not self._cancelled
            return self._sending

    def account(self) -> str:
        """Ends the submission if it is not under way yet, and says whether the run exists."""
        # Ctrl+C once more: no time to wait.
        with contextlib.suppress(KeyboardInterrupt):
            with self._lock:
                self._cancelled = True
                under_way = self._sending
            if not under_way:
                return "The run was not submitted."
            self._done.wait(PATIENCE)
        if self.run is not None:
            name = self.run.run_name
            return f"The run '{name}' was submitted before that, and goes on. To stop it: dstack stop {name}"
        if self.error is not None:
            return f"The run was not submitted: {self.error}"
        return "It is not known whether the run was submitted: `dstack ps` shows it."


_Work = Callable[[], None]
_resting: deque[tuple[int, SimpleQueue[_Work]]] = deque()
"""Threads without work, by the process that they are in: a forked child has none of them."""


def _in_thread(work: _Work) -> None:
    """Has work done that does not raise, in a thread that rests or in a new one."""
    pid, inbox = 0, SimpleQueue[_Work]()
    with contextlib.suppress(IndexError):
        pid, inbox = _resting.pop()
    if pid != os.getpid():
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="dstack-submit", daemon=True).start()
    inbox.put(work)


def _serve(inbox: SimpleQueue[_Work]) -> None:
    entry = (os.getpid(), inbox)
    work: _Work | None = inbox.get()
    while work is not None:
        work()
        del work
        _resting.append(entry)
        work = _next(entry)


def _next(entry: tuple[int, SimpleQueue[_Work]]) -> _Work | None:
    """The next work; `None` if none came."""
    with contextlib.suppress(Empty):
        return entry[1].get(timeout=REST)
    try:
        _resting.remove(entry)
    except ValueError:  # taken at this very moment: work follows
        return entry[1].get()
    return None


def submitted(prepare: Callable[[], RunSpec], send: Callable[[RunSpec], Run]) -> Run:
    """Submits a run. A `KeyboardInterrupt` meanwhile gets a note that says whether the run exists.

    Args:
        prepare: makes what is sent.
        send: makes the request.
    """
    if threading.current_thread() is not threading.main_thread():
        # Ctrl+C is a matter of the main thread.
        return send(prepare())
    submission = _Submission(prepare, send)
    try:
        return submission.result()
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(submission.account())
        raise
