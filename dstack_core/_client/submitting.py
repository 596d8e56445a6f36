"""Submitting so that Ctrl+C cannot leave it unknown whether the run exists."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core._models.runs import Run, RunSpec

PATIENCE = 10.0
"""Seconds after Ctrl+C in which the server may still say what became of the run."""


class _Submission:
    """The work, in a thread of its own, which Ctrl+C does not reach."""

    def __init__(self, prepare: Callable[[], RunSpec], send: Callable[[RunSpec], Run]) -> None:
        self._prepare = prepare
        self._send = send
        self._lock = threading.Lock()
        self._cancelled = False
        self._sending = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dstack-submit", daemon=True)
        self.run: Run | None = None
        self.error: BaseException | None = None

    def result(self) -> Run:
        """The run, once it is submitted; or the error, raised."""
        self._thread.start()
        self._done.wait()
        self._thread.join()
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
