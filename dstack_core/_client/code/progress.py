"""Tells the person in front of a terminal how far it is. Everyone else is left alone, and so is who need not wait."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 0.5
"""Seconds for which nothing is shown."""


class UploadProgress:
    """A line on the terminal: what is being done, and how much of it."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._start = time.monotonic()
        self._line: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._total: int | None = None
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.stop()

    def begin(self, what: str, total: int | None = None) -> None:
        """Begins something else.

        Args:
            what: for people.
            total: bytes; `None` if nobody knows.
        """
        self._what, self._total, self._done = what, total, 0
        self._show()

    def advance(self, size: int) -> None:
        """So many more bytes are done."""
        self._done += size
        self._show()

    def _show(self) -> None:
        if not self._shown or time.monotonic() - self._start < PATIENCE:
            return
        if self._line is None:
            self._open()
        if self._line is not None and self._task is not None:
            self._line.update(self._task, description=self._what, total=self._total, completed=self._done)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._line = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._line.add_task(self._what, total=self._total)
        self._line.start()
        # Ctrl+C may end the program at any moment, and is not to leave a terminal without a cursor.
        self._line.console.show_cursor(show=True)
