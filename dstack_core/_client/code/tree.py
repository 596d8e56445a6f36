"""What a run brings along, once it was looked through: a manifest, and where its bytes are."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, Protocol

from dstack_core._client.code.reading import read_chunk
from dstack_core._models.archives import archive_parts
from dstack_core._models.code import CHUNK, CodeFile, CodeManifest

if TYPE_CHECKING:
    from collections.abc import Mapping


class Tree(Protocol):
    """Files, links and folders of one moment."""

    @property
    def manifest(self) -> CodeManifest:
        """What there is."""

    def chunk(self, file: CodeFile, number: int) -> bytes:
        """The bytes of one chunk of a file.

        Raises:
            ChangedError: it is not what the manifest says any more.
        """


class FolderTree:
    """What is in a folder.

    Args:
        root: the folder.
        manifest: what was found in it.
    """

    def __init__(self, root: str, manifest: CodeManifest) -> None:
        self._root = root
        self.manifest = manifest

    def chunk(self, file: CodeFile, number: int) -> bytes:
        """The bytes of one chunk of a file."""
        size = min(CHUNK, file.size - number * CHUNK)
        return read_chunk(os.path.join(self._root, file.path), file.path, number, size, file.chunks[number])


class MemoryTree:
    """Files that were put together in the program.

    Args:
        files: their bytes, by path.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    @cached_property
    def manifest(self) -> CodeManifest:
        """What there is."""
        return CodeManifest(files=tuple(_file(path, content) for path, content in sorted(self._files.items())))

    def chunk(self, file: CodeFile, number: int) -> bytes:
        """The bytes of one chunk of a file."""
        return self._files[file.path][number * CHUNK : (number + 1) * CHUNK]


def _file(path: str, content: bytes) -> CodeFile:
    starts = range(0, len(content), CHUNK)
    chunks = tuple(hashlib.sha256(content[start : start + CHUNK]).hexdigest() for start in starts)
    return CodeFile(path=path, size=len(content), chunks=chunks)


def write_tar(tree: Tree, fp: BinaryIO) -> str:
    """Writes a tar archive of a tree, the same bytes for the same tree, and returns its SHA-256 in hexadecimal.

    Raises:
        ChangedError: a file is not what it was when the tree was made.
    """
    digest = hashlib.sha256()
    for part in archive_parts(tree.manifest):
        piece = tree.chunk(part.file, part.number) if part.file else part.data or b""
        digest.update(piece)
        fp.write(piece)
    return digest.hexdigest()
