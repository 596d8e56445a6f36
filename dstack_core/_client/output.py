"""A run's output, read to its end across everything that may happen to the connection or the server."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from dstack_core._client.api import APIClient, BrokenStreamError, LogAnswer

if TYPE_CHECKING:
    from dstack_core._models.wire import LogQuery

LONGEST_PAUSE = 1.0


class LogsDroppedWarning(UserWarning):
    """Some of a run's output could not be kept: it grew over its limit, or a disk was full. `logs()` goes on."""


class OutputReader:
    """Reads the output of one run, from some place on.

    Args:
        api: the server.
        project: the project of the run.
        run_id: the run.
        start_time: where to start; `None` for the beginning.
        diagnose: the engine's account of the run instead of its output.
        replica_num: whose output.
        check: asked now and then whether to go on; it raises if not.
    """

    def __init__(
        self,
        api: APIClient,
        project: str,
        run_id: UUID,
        start_time: datetime | None,
        *,
        diagnose: bool,
        replica_num: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._api = api
        self._project = project
        self._run_id = run_id
        # Without a time zone it is meant as on the clock on the wall.
        self._start_time = start_time.astimezone(UTC) if start_time is not None else None
        self._diagnose = diagnose
        self._replica_num = replica_num
        self._check = check
        self._offset = 0
        self._useless = 0

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come, until the run has ended and all was said."""
        while True:
            self._check()
            before, asked = self._offset, time.monotonic()
            with self._api.open_logs(self._project, self._run_id, self._query()) as answer:
                self._start_at(answer.offset)
                if answer.end:
                    return
                yield from self._follow(answer)
            self._rest(useful=self._offset != before or time.monotonic() - asked > LONGEST_PAUSE)

    def _query(self) -> LogQuery:
        from dstack_core._models.wire import LogQuery

        return LogQuery(
            offset=self._offset, start_time=self._start_time, diagnose=self._diagnose, replica_num=self._replica_num
        )

    def _start_at(self, offset: int) -> None:
        if self._start_time is None and offset > self._offset:
            warnings.warn(
                f"{offset - self._offset} bytes of the output, from byte {self._offset} on, could not be kept.",
                LogsDroppedWarning,
                stacklevel=4,
            )
        self._start_time = None
        self._offset = offset

    def _follow(self, answer: LogAnswer) -> Iterator[bytes]:
        try:
            for chunk in answer.chunks:
                self._offset += len(chunk)
                yield chunk
                self._check()
        except BrokenStreamError:
            # Silence for long, or no server any more: the next request finds out.
            return

    def _rest(self, *, useful: bool) -> None:
        """Keeps a server that ends its answers at once, with nothing in them, from being asked without a pause."""
        self._useless = 0 if useful else self._useless + 1
        if self._useless > 1:
            time.sleep(min(0.01 * 2.0**self._useless, LONGEST_PAUSE))
