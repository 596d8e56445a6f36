"""Reading a run's output as one stream: that of its attempts, one after the other, from any place on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstack_core._engine.journal import Wakeups
from dstack_core._engine.seams import Seams
from dstack_core._models.runs import RunStatus
from dstack_core._models.wire import LogQuery
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.tables import EventRow, JobRow, RunRow

CHUNK = 2 << 20
PATIENCE = 20.0
"""Seconds an answer waits for its first byte before it ends empty; the reader then asks again."""
_OTHER_SERVERS = 1.0


@dataclass(frozen=True, slots=True)
class LogStream:
    """A piece of a stream. `offset` is that of its first byte; `end`: nothing more will come, `chunks` is empty."""

    offset: int
    end: bool
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class _Attempts:
    """The attempts of one replica, oldest first, and whether the last one is the last for ever.

    `lengths` is how much each one that ended has printed, be it stored or not.
    """

    jobs: tuple[UUID, ...]
    finished: tuple[bool, ...]
    lengths: tuple[int, ...]
    run_finished: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of one attempt; `base` is where this attempt begins in the stream of its replica."""

    job: UUID
    base: int
    start: int
    data: bytes


class OutputReader:
    """Serves output from the log store, and follows it while it grows."""

    def __init__(self, seams: Seams, store: Store, logs: LogStore, wakeups: Wakeups) -> None:
        self._clock = seams.clock
        self._store = store
        self._logs = logs
        self._wakeups = wakeups

    async def stream(self, run_id: UUID, query: LogQuery) -> LogStream:
        """The output from an offset or a time on. Waits for its first byte."""
        offset = query.offset
        if query.start_time is not None:
            offset = await self._offset_at(run_id, query.replica_num, query.start_time)
        replica = query.replica_num
        news = self._wakeups.watch(run_id)
        try:
            patience = self._clock.now().timestamp() + (PATIENCE if query.follow else 0)
            while True:
                news.clear()
                attempts = await self._store.read(lambda session: _attempts(session, run_id, replica))
                piece, ended, behind = await self._piece(attempts, offset)
                if piece is not None:
                    return LogStream(piece.base + piece.start, False, self._go_on(run_id, piece, query))
                if ended or not query.follow or self._clock.now().timestamp() >= patience:
                    return LogStream(max(offset, behind), ended or not query.follow, _nothing())
                await self._wait(attempts, news)
        finally:
            self._wakeups.unwatch(run_id, news)

    async def _piece(self, attempts: _Attempts, offset: int) -> tuple[_Piece | None, bool, int]:
        """The bytes at an offset of the stream; or nothing, whether nothing will ever come there, and where that is."""
        base = 0
        for job, finished, length in zip(attempts.jobs, attempts.finished, attempts.lengths, strict=True):
            stored = await self._logs.end(job)
            if offset < base + stored:
                start, data = await self._logs.read(job, max(0, offset - base), CHUNK)
                if data:
                    return _Piece(job, base, start, data), False, base
            if not finished:
                return None, False, base
            base += max(stored, length)
        return None, attempts.run_finished, base

    async def _go_on(self, run_id: UUID, piece: _Piece, query: LogQuery) -> AsyncIterator[bytes]:
        """The bytes after a piece, up to the next gap, the end of the attempt, or a pause that is too long."""
        yield piece.data
        at = piece.start + len(piece.data)
        news = self._wakeups.watch(run_id)
        # What was said before the watch began is not news: the first wait looks for it.
        news.set()
        try:
            while not query.follow or await self._more(run_id, query.replica_num, piece.job, at, news):
                start, data = await self._logs.read(piece.job, at, CHUNK)
                if not data or start != at:
                    return
                yield data
                at += len(data)
        finally:
            self._wakeups.unwatch(run_id, news)

    async def _more(self, run_id: UUID, replica: int, job: UUID, at: int, news: asyncio.Event) -> bool:
        """Waits for output behind `at`; False when the reader had better look around again."""
        while not self._logs.has(job, at):
            if news.is_set():
                news.clear()
                if await self._attempt_ended(run_id, replica, job):
                    return False
            grown = await self._grown(job, at, news, PATIENCE)
            if not grown and not news.is_set():
                return False
        return True

    async def _wait(self, attempts: _Attempts, news: asyncio.Event) -> None:
        """Waits for output, or for news of the run."""
        unfinished = [job for job, done in zip(attempts.jobs, attempts.finished, strict=True) if not done]
        if unfinished:
            await self._grown(unfinished[0], await self._logs.end(unfinished[0]), news, _OTHER_SERVERS)
        else:
            await self._told(news)

    async def _grown(self, job: UUID, at: int, news: asyncio.Event, patience: float) -> bool:
        """Waits for output behind `at`, or for news; says whether there is output."""
        growth = asyncio.ensure_future(self._logs.wait(job, at, patience))
        told = asyncio.ensure_future(news.wait())
        try:
            await asyncio.wait((growth, told), return_when=asyncio.FIRST_COMPLETED)
            if growth.done() and growth.result().complete and growth.result().end <= at:
                # All is there; that the attempt is over is about to be written down.
                await self._told(news)
            return growth.done() and growth.result().end > at
        finally:
            growth.cancel()
            told.cancel()

    async def _told(self, news: asyncio.Event) -> None:
        """Waits for news of the run; looks again after a while, in case another server made them."""
        try:
            await self._clock.wait_for(news.wait(), _OTHER_SERVERS)
        except TimeoutError:
            return

    async def _attempt_ended(self, run_id: UUID, replica: int, job: UUID) -> bool:
        attempts = await self._store.read(lambda session: _attempts(session, run_id, replica))
        return dict(zip(attempts.jobs, attempts.finished, strict=True)).get(job, True)

    async def _offset_at(self, run_id: UUID, replica: int, start_time: datetime) -> int:
        """The offset of the first byte that was written at `start_time` or later."""
        attempts = await self._store.read(lambda session: _attempts(session, run_id, replica))
        base = 0
        for job, length in zip(attempts.jobs, attempts.lengths, strict=True):
            at = await self._logs.offset_at(job, start_time)
            stored = await self._logs.end(job)
            if at < stored:
                return base + at
            base += max(stored, length)
        return base

    async def account(self, run_id: UUID, query: LogQuery) -> LogStream:
        """The engine's own account of a run from an offset on, one line for each event."""
        news = self._wakeups.watch(run_id)
        patience = self._clock.now().timestamp() + (PATIENCE if query.follow else 0)
        try:
            while True:
                news.clear()
                text, finished = await self._store.read(lambda session: _account(session, run_id))
                if len(text) > query.offset:
                    return LogStream(query.offset, False, _once(text[query.offset :]))
                if finished or not query.follow or self._clock.now().timestamp() >= patience:
                    return LogStream(query.offset, finished or not query.follow, _nothing())
                await self._told(news)
        finally:
            self._wakeups.unwatch(run_id, news)


_LAST_BYTES, _LAST_LINES, _LONGEST_LINE = 4096, 10, 300


async def last_lines(logs: LogStore, job_id: UUID) -> str:
    """The last lines that an attempt printed, indented, for a message; empty if it printed nothing."""
    end = await logs.end(job_id)
    start, data = await logs.read(job_id, max(0, end - _LAST_BYTES), _LAST_BYTES)
    lines = data.decode(errors="replace").rstrip().splitlines()
    if start > 0 and len(lines) > 1:
        # Most likely it begins in the middle.
        lines = lines[1:]
    return "\n".join(f"  {line.strip()[:_LONGEST_LINE]}" for line in lines[-_LAST_LINES:])


def _attempts(session: Session, run_id: UUID, replica_num: int) -> _Attempts:
    run = session.get_one(RunRow, run_id)
    rows = session.execute(
        select(JobRow.id, JobRow.status, JobRow.log_bytes)
        .where(JobRow.run_id == run_id, JobRow.replica_num == replica_num, JobRow.job_num == 0)
        .order_by(JobRow.attempt)
    ).all()
    return _Attempts(
        jobs=tuple(job for job, _, _ in rows),
        finished=tuple(RunStatus(status).is_finished for _, status, _ in rows),
        lengths=tuple(size or 0 if RunStatus(status).is_finished else 0 for _, status, size in rows),
        run_finished=RunStatus(run.status).is_finished,
    )


def _account(session: Session, run_id: UUID) -> tuple[bytes, bool]:
    run = session.get_one(RunRow, run_id)
    events = session.scalars(select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.id))
    lines = [f"{event.at:%Y-%m-%dT%H:%M:%S.%fZ} {event.text}\n" for event in events]
    return "".join(lines).encode(), RunStatus(run.status).is_finished


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
