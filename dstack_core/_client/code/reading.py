"""Reads files so that what was read is one version of the file, and not the beginning of one and the end of another.

A file's time stamps move only once per tick of the file system's clock. One that was changed within the current tick
can therefore change again and look the same. Such a file is left alone until its tick is over, as git does it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dstack_core._models.code import CHUNK
from dstack_core.errors import ConfigurationError

TICK = 20_000_000
"""Nanoseconds of a tick, on file systems with fine time stamps; the slowest kernels count in steps of 10 ms."""
COARSE_TICK = 2_000_000_000
"""Where all time stamps are whole seconds."""
TRIES = 5
"""So often a file may change while it is read, before it is named."""

_SECOND = 1_000_000_000
# No links: what was a file when the folder was looked through must still be one.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Stamp(NamedTuple):
    """What the file system says of a version of a file."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """From what `stat` says."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def settles_in(self, now: int) -> int:
        """Nanoseconds until another change would show. Only `ctime` counts: nobody can set it."""
        tick = COARSE_TICK if self.ctime_ns % _SECOND == 0 else TICK
        return self.ctime_ns + tick - now


class Version(NamedTuple):
    """A version of a file: its stamp, the hashes of its chunks, and whether the stamp stands for no other version."""

    stamp: Stamp
    chunks: tuple[str, ...]
    settled: bool


class ChangedError(Exception):
    """A file is not what it was a moment ago.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def advice(self) -> ConfigurationError:
        """The error for when it never stops."""
        return ConfigurationError(
            f"{self.path!r} changes while it is read, again and again. Wait until it is complete, or leave it out: add "
            "it to .dstackignore."
        )


def read_version(place: str, path: str, progress: Callable[[int], None]) -> Version:
    """Reads a file, again if it changes meanwhile.

    Args:
        place: where the file is.
        path: how it is called in messages.
        progress: told of bytes that were read.

    Raises:
        ConfigurationError: it changes all the time.
        OSError: it cannot be read.
        ChangedError: it is no file any more.
    """
    for _ in range(TRIES):
        with _opened(place, path) as file:
            before = Stamp.of(os.fstat(file))
            settled = _settle(before)
            chunks = tuple(hashlib.sha256(chunk).hexdigest() for chunk in _chunks(file, before.size, progress))
            if Stamp.of(os.fstat(file)) == before:
                return Version(before, chunks, settled)
    raise ChangedError(path).advice()


def read_chunk(place: str, path: str, number: int, size: int, name: str) -> bytes:
    """Reads one chunk of a file.

    Args:
        place: where the file is.
        path: how it is called in messages.
        number: which chunk.
        size: its bytes.
        name: its SHA-256, in hexadecimal.

    Raises:
        ChangedError: it does not have this name any more, or cannot be read.
    """
    try:
        with _opened(place, path) as file:
            data = _read(file, number * CHUNK, size)
    except OSError:
        raise ChangedError(path) from None
    if hashlib.sha256(data).hexdigest() != name:
        raise ChangedError(path)
    return data


@contextmanager
def _opened(place: str, path: str) -> Iterator[int]:
    file = os.open(place, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ChangedError(path)
        yield file
    finally:
        os.close(file)


def _settle(stamp: Stamp) -> bool:
    """Waits until the stamp's tick is over. False if it lies in the future, where nobody can wait for it."""
    left = stamp.settles_in(time.time_ns())
    if left > COARSE_TICK:
        return False
    if left > 0:
        time.sleep(left / _SECOND)
    return True


def _chunks(file: int, size: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    for offset in range(0, size, CHUNK):
        chunk = _read(file, offset, min(CHUNK, size - offset))
        progress(len(chunk))
        yield chunk


def _read(file: int, offset: int, size: int) -> bytes:
    """So many bytes, in one piece; fewer only at the end of the file."""
    data = os.pread(file, size, offset)
    if len(data) in (0, size):
        return data
    pieces = [data]
    while data and (left := size - sum(map(len, pieces))):
        data = os.pread(file, left, offset + size - left)
        pieces.append(data)
    return b"".join(pieces)
