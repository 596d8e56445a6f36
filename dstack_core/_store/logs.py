"""The bytes of jobs, in files: exactly once by offset, whatever is killed and when.

Each job has two files. In `JOB.log`, byte N of the job's output is byte N of the file: its size is the end of what is
stored, and bytes that the agent had to drop are holes. `JOB.idx` is a row of records of 16 bytes, in the order of their
offsets, each of one kind:

    time     offset, microseconds since 1970      the bytes from here on were printed then
    gap      offset, end                          these bytes were lost before they could be copied
    complete offset, 0                            nothing follows

What belongs to new bytes goes to the index *before* the bytes go to the data file. So the size of the data file says
which records count: those whose offset lies before it. Records behind it are what a killed writer left; the next one
cuts them off, and its bytes come again. A half-written record cannot be taken for a whole one for the same reason.

Writers of one job exclude each other by a lock on the index file, between threads as well as between processes (files
are opened anew each time, which costs less than keeping them). Readers need no lock.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import fcntl
import math
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar
from uuid import UUID
from weakref import WeakValueDictionary

from dstack_core._store import LogStoreClosed, LogStoreFull

__all__ = ["LogState", "LogStore", "LogStoreClosed", "LogStoreFull"]

T = TypeVar("T")

POLL = 1.0
"""Seconds after which a follower looks by itself, for what another process wrote."""

_RECORD = struct.Struct("<QQ")
_GAP, _COMPLETE = 1 << 62, 1 << 63
_OFFSET = _GAP - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CACHED_JOBS = 4096


class LogState(NamedTuple):
    """How much of a log there is, whether more will come, and how many of its bytes were lost."""

    end: int
    complete: bool
    lost: int


class Runner(Protocol):
    """Runs blocking work: in a thread, or at once in a simulator."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """Returns what `work` returns."""


@dataclass(frozen=True, slots=True)
class _View:
    """What is known of a job's files. Only ever replaced by one that knows more."""

    end: int = 0
    position: int = 0
    """End of the index records that count and were read."""
    last_us: int = 0
    gap_starts: tuple[int, ...] = ()
    gap_ends: tuple[int, ...] = ()
    complete: bool = False

    def state(self) -> LogState:
        lost = sum(end - start for start, end in zip(self.gap_starts, self.gap_ends, strict=True))
        return LogState(self.end, self.complete, lost)

    def grown(self, end: int, records: Iterable[tuple[int, int]]) -> _View:
        """Returns the view with those of the next records that count for a data file of that size."""
        count, last_us, complete = 0, self.last_us, self.complete
        gaps: list[tuple[int, int]] = []
        for first, second in records:
            offset = first & _OFFSET
            if complete or offset > end or (offset == end and not first & _COMPLETE):
                break
            count += 1
            if first & _COMPLETE:
                complete = True
            elif first & _GAP:
                gaps.append((offset, second))
            else:
                last_us = second
        return _View(
            end=end,
            position=self.position + count * _RECORD.size,
            last_us=last_us,
            gap_starts=self.gap_starts + tuple(start for start, _ in gaps),
            gap_ends=self.gap_ends + tuple(stop for _, stop in gaps),
            complete=complete,
        )

    def piece(self, offset: int, limit: int) -> tuple[int, int]:
        """Returns where the first stored bytes at or after `offset` lie, without a gap among them."""
        following = bisect.bisect_right(self.gap_starts, offset)
        while following and offset < self.gap_ends[following - 1]:
            offset = self.gap_ends[following - 1]
            following = bisect.bisect_right(self.gap_starts, offset)
        stop = self.gap_starts[following] if following < len(self.gap_starts) else self.end
        return offset, max(offset, min(stop, offset + limit))


class LogStore:
    """The logs of all jobs, below one directory. Belongs to one event loop; file work is done in threads.

    Following a log, from any offset, while it is written or later:

        while True:
            offset, data = await logs.read(job_id, offset)
            if data:
                yield data
                offset += len(data)
            elif (state := await logs.wait(job_id, offset, timeout=30)).complete and state.end <= offset:
                break

    Args:
        directory: made when it is missing, for this user alone.
        run: runs the blocking parts, in place of the store's own threads.
        poll: seconds after which followers look for what another process wrote.
    """

    def __init__(self, directory: Path, *, run: Runner | None = None, poll: float = POLL) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._threads = None if run else ThreadPoolExecutor(4, "dstack-logs")
        self._run: Runner = run or self._in_thread
        self._poll = poll
        self._views: OrderedDict[str, _View] = OrderedDict()
        self._news: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._told_at: dict[str, float] = {}
        self._tails: dict[str, tuple[int, bytes]] = {}

    async def append(
        self, job_id: UUID | str, offset: int, data: bytes | memoryview, index: Sequence[tuple[int, int]] = ()
    ) -> int:
        """Stores bytes, and returns the new end. Bytes that are there already are ignored: repeat it freely.

        An offset behind the end records what lies between as lost; so does one with no data.

        Args:
            job_id: whose bytes they are.
            offset: of the first byte of `data` in the job's output.
            data: the bytes.
            index: pairs of offset and microseconds since 1970, growing: when the bytes from there on were printed.

        Raises:
            LogStoreFull: there is no room. What fitted is stored.
            LogStoreClosed: the log is complete, and ends before these bytes do.
        """
        job = _name(job_id)
        self._tails.pop(job, None)
        try:
            end = (await self._run(lambda: self._append(job, offset, data, index))).end
            if job in self._news and isinstance(data, bytes) and end == offset + len(data):
                # Somebody waits for just these bytes.
                self._tails[job] = (offset, data)
            self._told_at[job] = asyncio.get_running_loop().time()
            return end
        finally:
            self._wake(job)

    async def read(self, job_id: UUID | str, offset: int, limit: int = 1 << 20) -> tuple[int, bytes]:
        """Returns stored bytes from `offset` on, at most `limit`, and the offset of the first.

        That is `offset` itself, or the end of the gap in which it lies. No bytes: none are there yet.
        """
        job = _name(job_id)
        start, tail = self._tails.get(job, (0, b""))
        if tail and start == offset and len(tail) <= limit:
            return offset, tail
        return await self._run(lambda: self._read(job, offset, limit))

    def has(self, job_id: UUID | str, offset: int) -> bool:
        """Whether bytes at `offset` or later are known to be there, without looking: `wait` finds out for sure."""
        return self._known(_name(job_id)).end > offset

    async def end(self, job_id: UUID | str) -> int:
        """Returns the offset of the next byte to be stored; 0 for an unknown job."""
        return (await self.state(job_id)).end

    async def state(self, job_id: UUID | str) -> LogState:
        """Returns how far a log is."""
        job = _name(job_id)
        return (await self._run(lambda: self._look(job))).state()

    async def wait(self, job_id: UUID | str, offset: int, timeout: float) -> LogState:
        """Returns as soon as there are bytes behind `offset` or the log is complete, or after `timeout` seconds."""
        job = _name(job_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        state = self._known(job).state()
        while not (state.end > offset or state.complete):
            # First the event, then the look: what comes in between sets the event.
            news = self._news.setdefault(job, asyncio.Event())
            if not self._tells(job, loop.time()):
                state = (await self._run(lambda: self._look(job))).state()
            remaining = deadline - loop.time()
            if state.end > offset or state.complete or remaining <= 0:
                break
            await _set_within(news, min(remaining, self._poll))
            state = self._known(job).state()
        return state

    def _tells(self, job: str, now: float) -> bool:
        """Whether this process writes the log, so that nothing new can be there without its followers being told."""
        return now - self._told_at.get(job, -math.inf) < self._poll / 2

    async def close_job(self, job_id: UUID | str) -> None:
        """Marks a log as complete, wakes its followers, and puts it on the disk for good. Twice is fine.

        Raises:
            LogStoreFull: there is no room for the mark.
        """
        job = _name(job_id)
        self._forget_writing(job)
        await self._run(lambda: self._complete(job))
        self._wake(job)
        await self._run(lambda: self._sync(job))

    async def offset_at(self, job_id: UUID | str, when: datetime) -> int:
        """Returns the offset of the first byte printed at `when` or later; the end, if there is none yet."""
        job = _name(job_id)
        us = (when - _EPOCH) // timedelta(microseconds=1)
        return await self._run(lambda: self._offset_at(job, us))

    async def delete(self, job_id: UUID | str) -> None:
        """Removes a log. An unknown one is fine."""
        job = _name(job_id)
        self._forget_writing(job)
        await self._run(lambda: self._delete(job))
        self._wake(job)

    async def aclose(self) -> None:
        """Ends the threads, after what they are doing."""
        if self._threads:
            await asyncio.to_thread(self._threads.shutdown)

    def _forget_writing(self, job: str) -> None:
        self._tails.pop(job, None)
        self._told_at.pop(job, None)

    def _in_thread(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _wake(self, job: str) -> None:
        if news := self._news.pop(job, None):
            news.set()

    # What follows runs in threads.

    def _paths(self, job: str) -> tuple[Path, Path]:
        return self._directory / f"{job}.log", self._directory / f"{job}.idx"

    def _known(self, job: str) -> _View:
        return self._views.get(job, _View())

    def _remember(self, job: str, view: _View) -> _View:
        self._views[job] = view
        if len(self._views) > _CACHED_JOBS:
            self._views.popitem(last=False)
        return view

    def _look(self, job: str) -> _View:
        known = self._known(job)
        if known.complete:
            return known
        try:
            with _opened(self._paths(job), os.O_RDONLY) as files:
                return self._remember(job, _refresh(known, *files))
        except FileNotFoundError:
            self._views.pop(job, None)
            return _View()

    def _append(self, job: str, offset: int, data: bytes | memoryview, index: Sequence[tuple[int, int]]) -> _View:
        with self._writing(job) as (data_fd, index_fd, view):
            stop = offset + len(data)
            if stop <= view.end:
                return view
            if view.complete:
                raise LogStoreClosed(f"The log of job {job} is complete with {view.end} bytes; {stop} is behind that.")
            fresh = max(offset, view.end)
            _write(index_fd, _records(view, range(offset, stop), index), view.position)
            _write(data_fd, memoryview(data)[fresh - offset :], fresh)
            if fresh == stop:
                os.ftruncate(data_fd, stop)
            return self._remember(job, _refresh(view, data_fd, index_fd))

    def _complete(self, job: str) -> None:
        with self._writing(job) as (data_fd, index_fd, view):
            if not view.complete:
                _write(index_fd, _RECORD.pack(_COMPLETE | view.end, 0), view.position)
                self._remember(job, _refresh(view, data_fd, index_fd))

    def _sync(self, job: str) -> None:
        with suppress(FileNotFoundError), _opened(self._paths(job), os.O_RDWR) as files:
            for file in files:
                os.fsync(file)

    @contextmanager
    def _writing(self, job: str) -> Iterator[tuple[int, int, _View]]:
        """Opens both files, waits for other writers, and cuts off what a killed one left."""
        try:
            with _opened(self._paths(job), os.O_RDWR | os.O_CREAT) as (data_fd, index_fd):
                fcntl.flock(index_fd, fcntl.LOCK_EX)
                view = _refresh(self._known(job), data_fd, index_fd)
                if os.fstat(index_fd).st_size != view.position:
                    os.ftruncate(index_fd, view.position)
                yield data_fd, index_fd, view
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise LogStoreFull(
                    f"No room for the log of job {job} in {self._directory} ({error.strerror}). Free some space there."
                ) from error
            raise

    def _read(self, job: str, offset: int, limit: int) -> tuple[int, bytes]:
        view = self._known(job)
        if offset >= view.end:
            view = self._look(job)
        start, stop = view.piece(offset, limit)
        if start >= stop:
            return start, b""
        with suppress(FileNotFoundError), _opened(self._paths(job)[:1], os.O_RDONLY) as (data_fd,):
            if data := os.pread(data_fd, stop - start, start):
                return start, data
        # Deleted by another process.
        self._views.pop(job, None)
        return offset, b""

    def _offset_at(self, job: str, us: int) -> int:
        view = self._look(job)
        if not view.position:
            return view.end
        with _opened(self._paths(job)[1:], os.O_RDONLY) as (index_fd,):
            return _bisect(index_fd, view, us)

    def _delete(self, job: str) -> None:
        self._views.pop(job, None)
        for path in self._paths(job):
            path.unlink(missing_ok=True)


def _name(job_id: UUID | str) -> str:
    name = str(job_id)
    if not re.fullmatch(r"\w[\w.-]{0,127}", name, re.ASCII):
        raise ValueError(f"{name!r} cannot be the id of a job")
    return name


async def _set_within(event: asyncio.Event, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        pass


@contextmanager
def _opened(paths: Iterable[Path], flags: int) -> Iterator[list[int]]:
    """Opens files anew, so that their locks exclude every other user."""
    files: list[int] = []
    try:
        # One by one: what was opened before a failure is closed, too.
        for path in paths:
            files += [os.open(path, flags | os.O_CLOEXEC, 0o600)]
        yield files
    finally:
        for file in files:
            os.close(file)


def _refresh(view: _View, data_fd: int, index_fd: int) -> _View:
    """Returns a view that knows what the files have now."""
    # The size first: records are written before the bytes that they belong to.
    end = os.fstat(data_fd).st_size
    if end < view.end:
        view = _View()
    if end == view.end and os.fstat(index_fd).st_size == view.position:
        return view
    return view.grown(end, _iterate(index_fd, view.position))


def _iterate(index_fd: int, position: int) -> Iterator[tuple[int, int]]:
    while piece := os.pread(index_fd, 1 << 16, position):
        whole = len(piece) - len(piece) % _RECORD.size
        yield from _RECORD.iter_unpack(memoryview(piece)[:whole])
        if whole < len(piece) or not whole:
            return
        position += whole


def _records(view: _View, chunk: range, index: Sequence[tuple[int, int]]) -> bytes:
    """Returns the index records for the bytes of a chunk that are new. A clock that goes back stands still here."""
    at, last_us = max(chunk.start, view.end), view.last_us
    times: dict[int, int] = {}
    for offset, us in index:
        at = max(at, offset)
        if at < chunk.stop and us > last_us:
            times[at] = last_us = us
    gap = [(_GAP | view.end, chunk.start)] if chunk.start > view.end else []
    return b"".join(_RECORD.pack(*record) for record in [*gap, *times.items()])


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _bisect(index_fd: int, view: _View, us: int) -> int:
    """Returns the offset of the first time record that is not before `us`."""
    low, high, found = 0, view.position // _RECORD.size, view.end
    while low < high:
        middle = at = (low + high) // 2
        first, second = _RECORD.unpack(os.pread(index_fd, _RECORD.size, at * _RECORD.size))
        while first & (_GAP | _COMPLETE) and (at := at + 1) < high:
            first, second = _RECORD.unpack(os.pread(index_fd, _RECORD.size, at * _RECORD.size))
        if at >= high:
            high = middle
        elif second < us:
            low = at + 1
        else:
            high, found = middle, first
    return found
