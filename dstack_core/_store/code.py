"""The code of runs, in files: chunks and manifests, each named by its SHA-256, each there once.

    chunks/ab/abcd…      a piece of a file
    manifests/abcd…      the JSON of a `CodeManifest`, all of whose chunks are there
    tmp/                 what is being written

A file gets its final name when it is whole. After a power cut it may still be empty or hold other bytes, so whoever
reads a chunk compares its hash, and one that is damaged is taken away, together with the manifest that led to it.

The time stamp of a file says when it was last asked for; `collect` goes by that.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

from pydantic import ValidationError

from dstack_core._models.archives import ArchivePart, archive_parts
from dstack_core._models.code import (
    CHUNK,
    MANIFEST_LIMIT,
    MOST_ENTRIES,
    CodeFile,
    CodeManifest,
    is_hash,
    problems,
    shown_list,
    sizes_of,
)
from dstack_core._store import CodeIncomplete, CodeRefused, CodeStoreFull

__all__ = ["CodeIncomplete", "CodeRefused", "CodeStore", "CodeStoreFull"]

T = TypeVar("T")

UNUSED = timedelta(days=30)
"""Code that no unfinished run needs is kept for that long after it was last asked for."""
UPLOAD_GRACE = timedelta(hours=24)
"""A chunk of no manifest is kept for that long: its upload may go on."""
PIECE = 4 << 20
"""Bytes of an archive that are in memory at a time."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SHOWN = 10


class CodeStore:
    """All code of this server, below one directory. File work is done in threads.

    Args:
        directory: made when it is missing, for this user alone.
    """

    def __init__(self, directory: Path) -> None:
        self._chunks = directory / "chunks"
        self._manifests = directory / "manifests"
        self._drafts = directory / "tmp"
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (directory, self._chunks, self._manifests, self._drafts):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._threads = ThreadPoolExecutor(4, "dstack-code")
        # Taken to mark a file as asked for, and to remove one that is not: the two exclude each other.
        self._using = threading.Lock()
        # A manifest may be large: one at a time.
        self._reading = threading.Lock()

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        """Which of these chunks are not here. Those that are stay for a day at least."""
        return await self._run(lambda: [name for name in dict.fromkeys(hashes) if not self._has_chunk(name)])

    async def put_chunk(self, sha256_hex: str, data: bytes) -> None:
        """Stores a chunk. One that is there already is fine.

        Raises:
            CodeRefused: it is empty, too large, or has another hash.
            CodeStoreFull: there is no room.
        """
        await self.put_chunks([(sha256_hex, data)])

    async def put_chunks(self, chunks: Sequence[tuple[str, bytes]]) -> None:
        """Stores several, as `put_chunk` does."""

        def put() -> None:
            for name, data in chunks:
                self._put_chunk(name, data)

        await self._run(put)

    async def put_manifest(self, manifest_hash: str, body: bytes) -> None:
        """Stores a manifest, if it can be unpacked anywhere without harm.

        Args:
            manifest_hash: SHA-256 of the body, in hexadecimal.
            body: the JSON of a `CodeManifest`.

        Raises:
            CodeRefused: it has another hash, cannot be read, is too large, or has an entry that is not allowed.
            CodeIncomplete: chunks are missing.
            CodeStoreFull: there is no room.
        """
        await self._run(lambda: self._put_manifest(manifest_hash, body))

    async def has_manifest(self, manifest_hash: str) -> bool:
        """Whether this manifest is here, with all of its chunks. It then stays for `UNUSED` at least."""
        return await self._run(lambda: self._touch(self._manifest_path(manifest_hash)))

    async def manifest(self, manifest_hash: str) -> CodeManifest:
        """A manifest.

        Raises:
            CodeIncomplete: it is not here.
        """
        return await self._run(lambda: self._load(manifest_hash))

    async def archive_size(self, manifest_hash: str) -> int:
        """Bytes of the archive of a manifest.

        Raises:
            CodeIncomplete: it is not here.
        """
        return await self._run(lambda: sum(part.size for part in archive_parts(self._load(manifest_hash))))

    async def archive(self, manifest_hash: str, offset: int) -> AsyncGenerator[bytes, None]:
        """A tar archive of the manifest's entries, from that byte on, in pieces of at most `PIECE` bytes.

        The same bytes every time. It has regular files (0644, or 0755), the empty folders (0755), and links.

        Raises:
            CodeIncomplete: the manifest, or a chunk that it names, is not here or damaged.
        """
        pieces = self._pieces(manifest_hash, offset)
        while piece := await self._run(partial(next, pieces, b"")):
            yield piece

    async def collect(self, now: datetime, keep: set[str]) -> int:
        """Removes what nobody needs, and returns how many chunks that was.

        Args:
            now: the time.
            keep: manifests of unfinished runs.
        """
        return await self._run(lambda: self._collect(now, keep))

    async def aclose(self) -> None:
        """Ends the threads, after what they are doing."""
        await asyncio.to_thread(self._threads.shutdown)

    def _run(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    # -- files: all below runs in threads ----------------------------------------------------------------------------

    def _chunk_path(self, name: str) -> Path:
        return self._chunks / _checked(name)[:2] / name

    def _manifest_path(self, name: str) -> Path:
        return self._manifests / _checked(name)

    def _touch(self, path: Path) -> bool:
        """Marks a file as asked for now. False if there is none."""
        with self._using:
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
            return True

    def _has_chunk(self, name: str) -> bool:
        path = self._chunk_path(name)
        # One without bytes is what a power cut may leave.
        return self._touch(path) and _size(path) > 0

    def _put_chunk(self, name: str, data: bytes) -> None:
        path = self._chunk_path(name)
        if not 0 < len(data) <= CHUNK:
            raise CodeRefused(f"Chunk {name} has {len(data)} bytes; it may have 1 to {CHUNK}.")
        if hashlib.sha256(data).hexdigest() != name:
            raise CodeRefused(f"Chunk {name} has other contents than its name says.")
        if not (self._touch(path) and _size(path) == len(data)):
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        """Writes a file that has its name only when it is whole."""
        draft = self._drafts / token_hex(12)
        try:
            with draft.open("xb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            _move(draft, path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno in _NO_ROOM:
                raise CodeStoreFull(
                    f"No room for code in {self._directory} ({error.strerror}). Free some space there."
                ) from error
            raise

    def _put_manifest(self, name: str, body: bytes) -> None:
        path = self._manifest_path(name)
        if hashlib.sha256(body).hexdigest() != name:
            raise CodeRefused(f"Manifest {name} has other contents than its name says.")
        with self._reading:
            self._check(_read_manifest(body))
        self._write(path, body)

    def _check(self, manifest: CodeManifest) -> None:
        if found := list(islice(problems(manifest), _SHOWN)):
            raise CodeRefused(f"This code cannot be accepted:\n{shown_list(found)}")
        known: dict[str, int] = {}
        for file in manifest.files:
            self._check_chunks(file, known)

    def _check_chunks(self, file: CodeFile, known: dict[str, int]) -> None:
        for name, size in zip(file.chunks, sizes_of(file), strict=True):
            if name not in known:
                path = self._chunk_path(name)
                known[name] = _size(path) if self._touch(path) else 0
            if not known[name]:
                raise CodeIncomplete(f"{file.path!r}: chunk {name} is not here. Send it first.")
            if known[name] != size:
                raise CodeRefused(f"{file.path!r}: chunk {name} has {known[name]} bytes, not {size}.")

    def _load(self, name: str) -> CodeManifest:
        try:
            return CodeManifest.model_validate_json(self._manifest_path(name).read_bytes())
        except (FileNotFoundError, ValidationError):
            raise CodeIncomplete(f"The code {name} is not on the server (any more). Submit the run again.") from None

    # -- archives ----------------------------------------------------------------------------------------------------

    def _pieces(self, name: str, offset: int) -> Iterator[bytes]:
        """The bytes from an offset on. What lies before it is not read."""
        gathered, position = bytearray(), 0
        for part in archive_parts(self._load(name)):
            if position + part.size > offset:
                data = memoryview(self._bytes(name, part))[max(0, offset - position) :]
                if gathered and len(gathered) + len(data) > PIECE:
                    yield bytes(gathered)
                    gathered.clear()
                gathered += data
            position += part.size
        if gathered:
            yield bytes(gathered)

    def _bytes(self, name: str, part: ArchivePart) -> bytes:
        if part.file is None:
            return part.data or b""
        return self._chunk(name, part.file.path, part.file.chunks[part.number])

    def _chunk(self, manifest: str, path: str, name: str) -> bytes:
        with suppress(FileNotFoundError):
            data = self._chunk_path(name).read_bytes()
            if hashlib.sha256(data).hexdigest() == name:
                return data
        # The next upload is to send it again.
        self._manifest_path(manifest).unlink(missing_ok=True)
        self._chunk_path(name).unlink(missing_ok=True)
        raise CodeIncomplete(f"{path!r} is damaged on the server. Submit the run again, which sends it again.")

    # -- collecting --------------------------------------------------------------------------------------------------

    def _collect(self, now: datetime, keep: set[str]) -> int:
        old, abandoned = (now - UNUSED).timestamp(), (now - UPLOAD_GRACE).timestamp()
        for path in _files(self._drafts):
            self._remove_unused(path, abandoned)
        needed: set[str] = set()
        for path in _files(self._manifests):
            if path.name in keep or not self._remove_unused(path, old):
                needed.update(self._chunks_of(path.name))
        chunks = (path for folder in sorted(self._chunks.iterdir()) for path in _files(folder))
        return sum(self._remove_unused(path, abandoned) for path in chunks if path.name not in needed)

    def _remove_unused(self, path: Path, before: float) -> bool:
        """Removes a file that nobody asked for since then."""
        with self._using, suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()
                return True
        return False

    def _chunks_of(self, name: str) -> set[str]:
        with suppress(CodeIncomplete):
            return {chunk for file in self._load(name).files for chunk in file.chunks}
        return set()


def _checked(name: str) -> str:
    if not is_hash(name):
        raise CodeRefused(f"{name[:80]!r} is not a SHA-256 in hexadecimal, in lower case.")
    return name


def _size(path: Path) -> int:
    """Bytes of a file; none if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _move(draft: Path, path: Path) -> None:
    try:
        draft.replace(path)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft.replace(path)


def _files(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in os.scandir(folder)]


def _read_manifest(body: bytes) -> CodeManifest:
    """The manifest of a client that may be anybody: what is too much is refused before it takes up memory."""
    if len(body) > MANIFEST_LIMIT:
        raise CodeRefused(f"The manifest has {len(body):,} bytes; it may have {MANIFEST_LIMIT:,}.")
    if body.count(b'"path"') > 2 * MOST_ENTRIES or body.count(b",") > 8 * MOST_ENTRIES:
        raise CodeRefused(f"{_entry(body, MOST_ENTRIES)} is one entry too many: there may be {MOST_ENTRIES:,}.")
    try:
        return CodeManifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CodeRefused(f"This is no manifest: {where or 'body'}: {first['msg']}") from None


def _entry(body: bytes, number: int) -> str:
    """The name of an entry of a manifest that is too large to be read."""
    strings = body.split(b'"path"', number + 1)[-1].split(b'"', 2)
    return repr(strings[1][:200].decode(errors="replace")) if len(strings) > 1 else "The last one"
