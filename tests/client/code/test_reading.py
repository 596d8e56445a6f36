"""One version of a file, or none."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_core._client.code.reading import COARSE_TICK, TICK, ChangedError, Stamp, read_chunk, read_version
from dstack_core._models.code import CHUNK


def test_chunks_are_named_by_their_hash(tmp_path: Path) -> None:
    """A file of more than one chunk is read as such, and each can be read again by itself."""
    path, content = tmp_path / "file", os.urandom(CHUNK + 10)
    path.write_bytes(content)
    sizes: list[int] = []
    version = read_version(str(path), "file", sizes.append)
    assert version.chunks == tuple(hashlib.sha256(c).hexdigest() for c in (content[:CHUNK], content[CHUNK:]))
    assert sizes == [CHUNK, 10]
    assert read_chunk(str(path), "file", 1, 10, version.chunks[1]) == content[CHUNK:]


def test_a_file_is_left_alone_until_its_tick_is_over(tmp_path: Path) -> None:
    """Before that, another change might not show in its stamp."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    version = read_version(str(path), "file", lambda _: None)
    assert version.settled
    assert time.time_ns() >= version.stamp.ctime_ns + TICK


def test_the_tick_of_a_coarse_file_system_is_longer() -> None:
    """Where stamps are whole seconds, or of the future, it takes longer to be sure."""
    second = 1_000_000_000
    assert Stamp(1, 5, 7 * second, 1).settles_in(7 * second) == COARSE_TICK
    assert Stamp(1, 5, 7 * second + 1, 1).settles_in(7 * second + 1) == TICK
    assert Stamp(1, 99 * second, 7 * second, 1).settles_in(50 * second) < 0


def test_a_chunk_that_is_another_one_by_now(tmp_path: Path) -> None:
    """Changed, shorter, gone, a link, a folder: none of them passes for what was read before."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    (name,) = read_version(str(path), "file", lambda _: None).chunks
    (tmp_path / "other").write_bytes(b"before")
    changes: list[Callable[[], object]] = [
        lambda: path.write_bytes(b"beforE"),
        lambda: path.write_bytes(b"be"),
        path.unlink,
        lambda: path.symlink_to(tmp_path / "other"),
        path.unlink,
        path.mkdir,
        path.rmdir,
        lambda: os.mkfifo(path),
    ]
    for change in changes:
        change()
        with pytest.raises(ChangedError):
            read_chunk(str(path), "file", 0, 6, name)
