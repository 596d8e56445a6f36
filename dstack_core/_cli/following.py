"""Following a run that was just submitted, to its end: its output, its ports, and what Ctrl+C means meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from dstack_core.errors import AttachError, ClientError, PortUsedError

if TYPE_CHECKING:
    from types import FrameType

    from dstack_core._client.client import Client
    from dstack_core._client.run import Run


class Interrupts:
    """While in its block, Ctrl+C stops the run politely, once more at once, and a third time leaves it alone.

    The output goes on meanwhile, so that what the run says at its end is seen.
    """

    def __init__(self, client: Client, run: Run) -> None:
        self._client = client
        self._run = run
        self._count = 0

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 2:
            raise KeyboardInterrupt
        abort = self._count == 2
        said = "Aborting" if abort else "Stopping"
        hint = "once more leaves it" if abort else "again aborts it"
        # Not print: this may come in the middle of one.
        os.write(2, f"\n{said} {self._run.name}; Ctrl+C {hint}\n".encode())
        # Not here: this may come in the middle of another request.
        threading.Thread(target=self._stop, args=(abort,), name="dstack-stop", daemon=True).start()

    def _stop(self, abort: bool) -> None:
        try:
            self._client.client.stop_runs(self._client.project, ids=[self._run.id], abort=abort)
        except ClientError as error:
            os.write(2, f"{self._run.name} could not be stopped: {error}\n".encode())


def follow(client: Client, run: Run) -> int:
    """Attaches, prints the output to its end, and says how the run ended.

    Returns:
        Exit code: that of the run, or 1 if it ended badly without one.
    """
    say(f"{run.name} is submitted. Ctrl+C stops it.")
    with ends_in_order(), Interrupts(client, run), run:
        with _waiting(f"{run.name} is being started"):
            _attach(run)
        show_ways(run)
        print_output(client, run, lambda: _tell_break(run))
        run.refresh()
    if run.message:
        say(run.message)
    return 0 if run.status.value == "done" else run.exit_code or 1


def _attach(run: Run) -> None:
    """Its output can be read even if its ports cannot be reached."""
    try:
        run.attach()
    except (AttachError, PortUsedError) as error:
        say(f"dstack: {error}")


def _tell_break(run: Run) -> None:
    """Whoever submitted it follows it to its end, whatever becomes of its ports."""
    try:
        run.check_attached()
    except AttachError as error:
        say(f"dstack: {error}")


def print_output(client: Client, run: Run, check: Callable[[], None]) -> None:
    """Prints all that a run prints, and asks now and then whether to go on."""
    from dstack_core._client.output import OutputReader

    reader = OutputReader(client.client, client.project, run.id, None, diagnose=False, check=check)
    for chunk in reader.chunks():
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def show_ways(run: Run) -> None:
    """Says where an attached run is reached."""
    from dstack_core._client.ssh.config import leads_to

    for port, local in sorted((run.ports or {}).items()):
        say(f"Port {port} of {run.name} is at 127.0.0.1:{local}")
    if run.ports is not None and leads_to(run.name):
        say(f"To log in: ssh {run.name}")


@contextmanager
def ends_in_order() -> Iterator[None]:
    """While in its block, a closed terminal, or SIGTERM, ends the program as an error would: it detaches.

    What is ignored, as under `nohup`, stays ignored.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def say(text: str) -> None:
    """To whoever watches, apart from the output."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Shows that something goes on, where somebody looks."""
    from rich.console import Console

    shown = Console(stderr=True, highlight=False)
    if not shown.is_terminal:
        yield
        return
    with shown.status(text):
        yield
