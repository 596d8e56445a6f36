"""The job's output on disk: byte-exact, stamped with times, and never longer than its limit.

The output is one stream of bytes with offsets from 0. It lies in segments, files named for the offset of their first
byte; beside each lies its index, records of (offset, microseconds since the epoch). What cannot be kept leaves a hole:
the offsets go on, the bytes are counted as lost.

    log/00000000000000000000        bytes 0 to 67108863
    log/00000000000000000000.idx
    log/00000000000067108864        …
"""

from __future__ import annotations

import os
import struct
import time

from .lean import quiet

DEFAULT_LIMIT = 2 << 30
_LARGEST_SEGMENT = 64 << 20
_SMALLEST_SEGMENT = 64 << 10
_SEGMENTS = 8
_RECORD = struct.Struct("=QQ")
_SPACING = 10_000
"""Microseconds between two records of the index, at least."""
MOST_RECORDS = 256


class Segment:
    """A run of bytes without a hole: one file and its index."""

    def __init__(self, directory: str, start: int) -> None:
        self.start = self.end = start
        self.path = os.path.join(directory, "%020d" % start)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._index = -1
        self._records = 0
        self._stamped = 0
        self.refused = False

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self.end - self.start

    def write(self, data: memoryview, now: int) -> int:
        """Appends as much as the disk takes, and says how much that was."""
        try:
            count = os.write(self.file, data)
        except OSError:
            return 0
        if count and now - self._stamped >= _SPACING:
            self._stamp(now)
        self.end += count
        return count

    def _stamp(self, now: int) -> None:
        # A missing record makes a time less exact, no more; so a full disk is no error here.
        try:
            if self._index < 0:
                self._index = os.open(self.path + ".idx", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.pwrite(self._index, _RECORD.pack(self.end, now), self._records * _RECORD.size)
        except OSError:
            return
        self._records += 1
        self._stamped = now

    def stamps(self, offset: int) -> list[tuple[int, int]]:
        """Records from the one that `offset` falls under: one more than `MOST_RECORDS` at most."""
        low, high = 0, self._records
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._read(middle, 1)[0][0] <= offset else (low, middle)
        return self._read(max(0, low - 1), MOST_RECORDS + 1) if self._records else []

    def _read(self, first: int, count: int) -> list[tuple[int, int]]:
        count = min(count, self._records - first)
        raw = os.pread(self._index, count * _RECORD.size, first * _RECORD.size)
        return [(offset, stamp) for offset, stamp in _RECORD.iter_unpack(raw)]

    def close(self) -> None:
        """No more reads or writes; the files stay."""
        for fd in (self.file, self._index):
            if fd >= 0:
                os.close(fd)

    def delete(self) -> None:
        """Gone, and its space free."""
        self.close()
        for path in (self.path, self.path + ".idx"):
            with quiet:
                os.unlink(path)


class Piece:
    """Bytes to send: `count` of them at `position` of `file`, which begin at `offset` of the stream."""

    __slots__ = ("count", "file", "index", "offset", "position")

    def __init__(self, offset: int, file: int, position: int, count: int, index: list[tuple[int, int]]) -> None:
        self.offset, self.file, self.position, self.count, self.index = offset, file, position, count, index


class Spool:
    """The whole stream.

    Attributes:
        end: bytes that the job has written so far, kept or not.
        lost: bytes that could not be kept until a reader had them.
    """

    def __init__(self, directory: str, limit: int | None = None) -> None:
        self.end = 0
        self.lost = 0
        self._limit = max(limit or DEFAULT_LIMIT, 2 * _SMALLEST_SEGMENT)
        self._segment_size = min(_LARGEST_SEGMENT, max(_SMALLEST_SEGMENT, self._limit // _SEGMENTS))
        self._directory = directory
        self._segments: list[Segment] = []
        self._acknowledged = 0
        os.makedirs(directory, 0o700, exist_ok=True)

    def append(self, data: memoryview) -> None:
        """Keeps what can be kept. Never raises, never waits for anything but the disk."""
        now = time.time_ns() // 1000
        while data:
            segment = self._current()
            written = segment.write(data[: self._segment_size - segment.size], now) if segment else 0
            self.end += written
            data = data[written:]
            if not written and not self._make_room(segment):
                self.lost += len(data)
                self.end += len(data)
                return

    def read(self, offset: int, limit: int) -> Piece:
        """What there is from `offset` on: at most `limit` bytes, from one segment, with at most `MOST_RECORDS` times.

        Asking for an offset says that everything before it has arrived. The caller closes the piece's file.
        """
        offset = min(offset, self.end)
        self._acknowledged = max(self._acknowledged, offset)
        for segment in self._segments:
            if segment.end > offset:
                return _piece(segment, max(offset, segment.start), limit)
        return Piece(self.end, -1, 0, 0, [])

    def _current(self) -> Segment | None:
        """The segment to append to; a new one after a full one or a hole; `None` if the disk refuses."""
        last = self._segments[-1] if self._segments else None
        if last and last.end == self.end and last.size < self._segment_size and not last.refused:
            return last
        if last and not last.size:
            self._segments.pop().delete()
        while self._segments and sum(s.size for s in self._segments) > self._limit - self._segment_size:
            self._drop_oldest()
        try:
            self._segments.append(Segment(self._directory, self.end))
        except OSError:
            return None
        return self._segments[-1]

    def _make_room(self, refused: Segment | None) -> bool:
        """After a refusal: whether trying again makes sense."""
        if refused and refused.size:
            # It may be this one file that may grow no further.
            refused.refused = True
            return True
        if self._segments and self._segments[0].size and self._segments[0].end <= self._acknowledged:
            self._drop_oldest()
            return True
        return False

    def _drop_oldest(self) -> None:
        segment = self._segments.pop(0)
        self.lost += max(0, segment.end - max(segment.start, self._acknowledged))
        segment.delete()


def _piece(segment: Segment, offset: int, limit: int) -> Piece:
    count = min(limit, segment.end - offset)
    index = segment.stamps(offset)
    if len(index) > MOST_RECORDS:
        count = min(count, index.pop()[0] - offset)
    index = [(max(offset, start), stamp) for start, stamp in index if start < offset + count]
    return Piece(offset, os.dup(segment.file), offset - segment.start, count, index)
