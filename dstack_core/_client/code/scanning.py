"""Looks through a folder: which files, links and empty folders a run brings along, and what stands in the way."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dstack_core._client.code.ignoring import IGNORE_FILES, IgnoreRules, lines_of
from dstack_core._client.code.memory import FileMemory
from dstack_core._client.code.reading import ChangedError, Stamp, read_version
from dstack_core._client.code.tree import FolderTree
from dstack_core._models.code import (
    LONGEST_PATH,
    MOST_BYTES,
    MOST_ENTRIES,
    CodeManifest,
    link_problem,
    links_leading_out,
    path_problem,
    shown_list,
)
from dstack_core.errors import ConfigurationError

_GIT = ".git"
_LEAVE_OUT = "leave it out: add it to .dstackignore"


class _File(NamedTuple):
    stamp: Stamp
    executable: bool


@dataclass
class Found:
    """What was found in a folder, by path; what cannot be sent, and why.

    Args:
        root: the folder.
        most_entries: entries that there may be.
    """

    root: str
    most_entries: int = MOST_ENTRIES
    files: dict[str, _File] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, found: os.stat_result) -> None:
        """Adds an entry that is no folder."""
        if not self._has_room_for(path):
            return
        if stat.S_ISREG(found.st_mode):
            self.files[path] = _File(Stamp.of(found), bool(found.st_mode & stat.S_IXUSR))
        elif stat.S_ISLNK(found.st_mode):
            self._add_link(path)
        else:
            self.problems.append(f"{path!r} is neither a file, a folder nor a link; {_LEAVE_OUT}")

    def add_folder(self, path: str) -> None:
        """Adds an empty folder."""
        if self._has_room_for(path):
            self.folders.append(path)

    def _add_link(self, path: str) -> None:
        target = os.readlink(os.path.join(self.root, path))
        self.links[path] = target
        if problem := link_problem(path, target):
            self.problems.append(f"{path!r} is a link that {problem} ({target!r}); {_LEAVE_OUT}")

    def unreadable(self, path: str, error: OSError) -> None:
        """Notes what cannot be read."""
        cure = f"chmod u+r{'x' if isinstance(error, _FolderError) else ''}"
        self.problems.append(f"{path!r} cannot be read ({error.strerror}); make it readable ({cure}), or {_LEAVE_OUT}")

    def _has_room_for(self, path: str) -> bool:
        """Whether there may be an entry of that name. What is wrong with the name is noted."""
        if len(self.files) + len(self.links) + len(self.folders) >= self.most_entries:
            raise ConfigurationError(
                f"{self.root} has too much in it: {path!r} is one entry too many, there may be {self.most_entries:,}. "
                "Leave out what jobs do not need, as data and environments: add it to .dstackignore."
            )
        if not path.isascii() and not _is_text(path):
            self.problems.append(f"{path!r} has a name that is not UTF-8; rename it, or {_LEAVE_OUT}")
        elif len(path) * 4 > LONGEST_PATH and (problem := path_problem(path)):
            # Its length is all that can be wrong with a path that the system gave.
            self.problems.append(f"{path!r} {problem}; rename it, or {_LEAVE_OUT}")
        else:
            return True
        return False

    def refuse(self) -> None:
        """Raises `ConfigurationError` if something cannot be sent."""
        problems = self.problems or [f"{line}; {_LEAVE_OUT}" for line in links_leading_out(self.links)]
        if problems:
            raise ConfigurationError(f"{self.root} cannot be sent as it is:\n{shown_list(problems, most=50)}")


class _FolderError(OSError):
    """A folder cannot be looked through."""


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


class RulesByFolder:
    """The rules of every folder below one, read when they are needed.

    Args:
        root: the uppermost folder.
        names: of the ignore files.
    """

    def __init__(self, root: str, names: tuple[str, ...] = IGNORE_FILES) -> None:
        self._root = root
        self._names = names
        self._rules: dict[str, IgnoreRules] = {}
        self._ignored: dict[str, bool] = {"": False}

    def ignores(self, path: str, is_folder: bool) -> bool:
        """Whether an entry, or a folder that it lies in, is ignored."""
        folder = path.rpartition("/")[0]
        return self._folder_is_ignored(folder) or self.inside(folder).ignores(path, is_folder)

    def _folder_is_ignored(self, folder: str) -> bool:
        if folder not in self._ignored:
            self._ignored[folder] = self.ignores(folder, is_folder=True)
        return self._ignored[folder]

    def inside(self, folder: str) -> IgnoreRules:
        """The rules for what is in a folder."""
        if folder not in self._rules:
            above = self.inside(folder.rpartition("/")[0]) if folder else IgnoreRules()
            lines = [line for name in self._names for line in _lines(os.path.join(self._root, folder, name))]
            self._rules[folder] = above.below(folder, lines)
        return self._rules[folder]


def look_through(root: str, found: Found, start: str = "") -> None:
    """Adds what is in a folder, without what its ignore files name, and without `.git`.

    Args:
        root: the folder.
        found: where it is added.
        start: look only into this folder below it.
    """
    waiting = [(start, RulesByFolder(root).inside(start.rpartition("/")[0]) if start else IgnoreRules())]
    while waiting:
        folder, rules = waiting.pop()
        try:
            entries = _entries(os.path.join(root, folder))
        except OSError as error:
            found.unreadable(folder or ".", _FolderError(error.errno, error.strerror))
            continue
        rules = _rules_of(root, folder, entries, rules)
        waiting.extend((path, rules) for path in _add_all(folder, entries, rules, found))


def _entries(place: str) -> dict[str, os.DirEntry[str]]:
    with os.scandir(place) as entries:
        return {entry.name: entry for entry in entries if entry.name != _GIT}


def _add_all(folder: str, entries: dict[str, os.DirEntry[str]], rules: IgnoreRules, found: Found) -> Iterator[str]:
    """Adds the entries of a folder; yields the folders among them."""
    empty = True
    prefix = f"{folder}/" if folder else ""
    for name, entry in entries.items():
        path = prefix + name
        is_folder = entry.is_dir(follow_symlinks=False)
        if rules.levels and rules.ignores(path, is_folder):
            continue
        empty = False
        if is_folder:
            yield path
        else:
            _add(path, entry, found)
    if empty and folder:
        found.add_folder(folder)


def _add(path: str, entry: os.DirEntry[str], found: Found) -> None:
    try:
        found.add(path, entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        # It went away between two looks.
        return
    except OSError as error:
        found.unreadable(path, error)


def _rules_of(root: str, folder: str, entries: dict[str, os.DirEntry[str]], rules: IgnoreRules) -> IgnoreRules:
    present = [name for name in IGNORE_FILES if name in entries]
    lines = [line for name in present for line in _lines(os.path.join(root, folder, name))]
    return rules.below(folder, lines) if lines else rules


def _lines(place: str) -> list[str]:
    """The lines of an ignore file. A link is none, as for git."""
    try:
        with open(os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            return lines_of(file.read())
    except OSError:
        # One that cannot be read is a file of the folder like others, and is named with those.
        return []


def tree_of(found: Found, memory: FileMemory, progress: Callable[[int], None] = lambda _: None) -> FolderTree:
    """Reads what is not known yet, and makes a tree of it all.

    Args:
        found: the entries.
        memory: what is known from before.
        progress: told of bytes that were read.

    Raises:
        ConfigurationError: something cannot be sent; each is named, with what to do.
    """
    files = [_read(found, path, file, memory, progress) for path, file in sorted(found.files.items())]
    memory.save()
    found.refuse()
    # As one document: to make each of ten thousand models by itself takes three times as long.
    manifest = CodeManifest.model_validate(
        {
            "files": [file for file in files if file is not None],
            "links": [{"path": path, "target": target} for path, target in sorted(found.links.items())],
            "folders": sorted(found.folders),
            "deleted": sorted(found.deleted),
        }
    )
    _check_size(found.root, manifest)
    return FolderTree(found.root, manifest)


def _read(
    found: Found, path: str, file: _File, memory: FileMemory, progress: Callable[[int], None]
) -> dict[str, Any] | None:
    """A `CodeFile`, as a document."""
    chunks = memory.chunks(path, file.stamp)
    size = file.stamp.size
    if chunks is None:
        try:
            version = read_version(os.path.join(found.root, path), path, progress)
        except FileNotFoundError:
            # It went away between two looks.
            return None
        except ChangedError as error:
            raise error.advice() from None
        except OSError as error:
            found.unreadable(path, error)
            return None
        memory.learn(path, version)
        chunks, size = version.chunks, version.stamp.size
    return {"path": path, "size": size, "executable": file.executable, "chunks": chunks}


def _check_size(root: str, manifest: CodeManifest) -> None:
    if manifest.size > MOST_BYTES:
        largest = max(manifest.files, key=lambda file: file.size)
        raise ConfigurationError(
            f"{root} is too large to be sent: {manifest.size >> 30} GB, and {MOST_BYTES >> 30} GB are allowed. The "
            f"largest file is {largest.path!r}. Add to .dstackignore what jobs do not need."
        )
