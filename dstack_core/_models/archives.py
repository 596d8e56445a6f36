"""Code as a tar archive: where each byte of it comes from. The same manifest gives the same bytes, everywhere."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from dstack_core._models.code import CodeFile, CodeManifest, sizes_of

# 1980, which every archive format can express; a fixed time, so that the same manifest gives the same bytes.
_MTIME = 315_619_200
_BLOCK = 512
_END = bytes(2 * _BLOCK)


class ArchivePart(NamedTuple):
    """A part of an archive: its bytes, or which chunk they are.

    Attributes:
        size: how many bytes.
        data: the bytes; `None` if they are a chunk.
        file: whose chunk.
        number: which of its chunks.
    """

    size: int
    data: bytes | None = None
    file: CodeFile | None = None
    number: int = 0


def archive_parts(manifest: CodeManifest) -> Iterator[ArchivePart]:
    """The parts of the archive of a manifest, in order: its empty folders (0755), files (0644 or 0755), and links."""
    for folder in manifest.folders:
        yield _header(folder, tarfile.DIRTYPE, 0o755)
    for file in manifest.files:
        yield _header(file.path, tarfile.REGTYPE, 0o755 if file.executable else 0o644, size=file.size)
        for number, size in enumerate(sizes_of(file)):
            yield ArchivePart(size, None, file, number)
        yield _constant(bytes(-file.size % _BLOCK))
    for link in manifest.links:
        yield _header(link.path, tarfile.SYMTYPE, 0o777, target=link.target)
    yield _constant(_END)


def _header(path: str, kind: bytes, mode: int, *, size: int = 0, target: str = "") -> ArchivePart:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.size, entry.linkname, entry.mtime = kind, mode, size, target, _MTIME
    return _constant(entry.tobuf(tarfile.PAX_FORMAT))


def _constant(data: bytes) -> ArchivePart:
    return ArchivePart(len(data), data)
