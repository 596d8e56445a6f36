"""The code of a run on its way to the machine: a manifest of files, whose contents travel as chunks named by hash.

The client makes the manifest and sends the chunks that the server does not have; the server makes one archive of both
and hands it to the agent. Each of them checks the paths, by the same rules: `path_problem`, `link_problem`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from pydantic import BaseModel, ConfigDict

CHUNK = 4 << 20
"""Bytes of a chunk; the last one of a file may be shorter. An empty file has none."""
MOST_ENTRIES = 200_000
"""Entries that a manifest may have."""
MOST_BYTES = 64 << 30
"""Bytes that the files of a manifest may have together."""
MANIFEST_LIMIT = 64 << 20
"""Bytes that a manifest itself may have, as JSON."""
LONGEST_PATH = 4096
MOST_HOPS = 40
"""Links that lead to links, one after the other, before nobody follows any more; as in the kernel."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class CodeFile(_Part):
    """A file. `chunks` are the SHA-256 of its pieces of `CHUNK` bytes, in order, in hexadecimal."""

    path: str
    size: int
    executable: bool = False
    chunks: tuple[str, ...] = ()


class CodeLink(_Part):
    """A symbolic link. `target` is relative, and stays within the folder."""

    path: str
    target: str


class CodeManifest(_Part):
    """What a job's folder holds before its commands run.

    Attributes:
        files: the files, sorted by path. Paths are relative, with `/` between folders.
        links: the symbolic links, sorted by path.
        folders: folders that would not exist otherwise, as they are empty.
        deleted: with a git repository, what its commit has and the working copy has not. Taken away first; the rest
            is then laid over the commit.
    """

    files: tuple[CodeFile, ...] = ()
    links: tuple[CodeLink, ...] = ()
    folders: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def path_problem(path: str) -> str | None:
    """What is wrong with the path of an entry; `None` if it stays within its folder."""
    if not path or path.startswith("/") or "\0" in path:
        return "is not a relative path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "leads out of its folder, or is written in more than one way"
    return f"is longer than {LONGEST_PATH} bytes" if len(path.encode(errors="surrogateescape")) > LONGEST_PATH else None


def link_problem(path: str, target: str) -> str | None:
    """What is wrong with where a link leads; `None` if that is within the folder."""
    if not target or target.startswith("/") or "\0" in target:
        return "leads to an absolute path"
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            return "leads out of the folder"
    return None


def sizes_of(file: CodeFile) -> Iterator[int]:
    """Bytes of each chunk of a file, in order."""
    for start in range(0, file.size, CHUNK):
        yield min(CHUNK, file.size - start)


def problems(manifest: CodeManifest, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES) -> Iterator[str]:
    """What is wrong with a manifest, each with the entry's name first. Nothing, if it can be unpacked anywhere.

    Args:
        manifest: what is checked; where its contents come from is not looked at.
        most_entries: entries that it may have.
        most_bytes: bytes that its files may have together.
    """
    yield from _too_many(manifest, most_entries)
    yield from _unpackable(manifest)
    yield from _misplaced(manifest)
    yield from _malformed(manifest, most_bytes)
    yield from links_leading_out({link.path: link.target for link in manifest.links})


def _paths(manifest: CodeManifest) -> Iterator[str]:
    yield from (file.path for file in manifest.files)
    yield from (link.path for link in manifest.links)
    yield from manifest.folders


def _too_many(manifest: CodeManifest, most: int) -> Iterator[str]:
    for number, path in enumerate((*_paths(manifest), *manifest.deleted)):
        if number == most:
            yield f"{path!r} is one entry too many: there may be {most:,}"
            return


def _unpackable(manifest: CodeManifest) -> Iterator[str]:
    for path in (*_paths(manifest), *manifest.deleted):
        if problem := path_problem(path):
            yield f"{path!r} {problem}"
    for link in manifest.links:
        if problem := link_problem(link.path, link.target):
            yield f"{link.path!r} {problem}: {link.target!r}"


def _misplaced(manifest: CodeManifest) -> Iterator[str]:
    """Two entries of one name, and entries below something that is no folder."""
    seen: dict[str, None] = {}
    for path in _paths(manifest):
        if path in seen:
            yield f"{path!r} is there twice"
        seen[path] = None
    files = {file.path for file in manifest.files}
    leaves = files.union(link.path for link in manifest.links)
    folders: set[str] = set()
    for path in seen:
        for folder in _above(path, folders):
            if folder in leaves:
                yield f"{path!r} lies below {folder!r}, which is a {'file' if folder in files else 'link'}"


def _above(path: str, known: set[str]) -> Iterator[str]:
    """The folders that a path lies in, from the inside out, but none of those that are known."""
    folder = path.rpartition("/")[0]
    while folder and folder not in known:
        known.add(folder)
        yield folder
        folder = folder.rpartition("/")[0]


_HASH = re.compile("[0-9a-f]{64}")


def is_hash(text: str) -> bool:
    """Whether this can be a SHA-256 in hexadecimal, as chunks and manifests are named."""
    return _HASH.fullmatch(text) is not None


def _malformed(manifest: CodeManifest, most_bytes: int) -> Iterator[str]:
    total = 0
    for file in manifest.files:
        if file.size < 0 or len(file.chunks) != -(-file.size // CHUNK):
            yield f"{file.path!r} of {file.size} bytes has {len(file.chunks)} chunks"
        elif not all(is_hash(chunk) for chunk in file.chunks):
            yield f"{file.path!r} has a chunk that is not named by a SHA-256"
        total += file.size
        if total > most_bytes:
            yield f"{file.path!r} is too much: the files may have {most_bytes >> 30} GB together"
            return


def links_leading_out(links: Mapping[str, str]) -> Iterator[str]:
    """The links that lead out of the folder by way of other links, each with its name and where it leads."""
    for path, target in links.items():
        if link_problem(path, target) is None and _leads_out(path, links):
            yield f"{path!r} leads out of the folder, by way of other links: {target!r}"


def _leads_out(path: str, links: Mapping[str, str]) -> bool:
    """Follows a link as the kernel does, name by name."""
    here: list[str] = []
    ahead = path.split("/")[::-1]
    hops = 0
    while ahead:
        part = ahead.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not here:
                return True
            here.pop()
            continue
        here.append(part)
        target = links.get("/".join(here))
        if target is not None:
            hops += 1
            if hops > MOST_HOPS:
                # Nobody gets anywhere by this one.
                return False
            here.pop()
            ahead.extend(target.split("/")[::-1])
    return False


def shown_list(lines: Iterable[str], most: int = 10) -> str:
    """Lines for a message: the first ones, and how many more there are."""
    lines = list(lines)
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])
