"""The server's configuration file: which backends each project uses.

    projects:
      - name: main
        backends:
          - type: aws
            regions: [us-east-1]

What stands under a backend is read by that backend's own model; here only the frame is. Every error names the file,
the line, the key and the cure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._models.documents import Document, KeyPath, dotted, load_document, place

__all__ = ["DEFAULT_PROJECT", "BackendEntry", "ServerConfig", "load_server_config"]

DEFAULT_PROJECT = "main"


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One entry under `backends:`, not yet validated by its backend.

    Attributes:
        type: the backend's name.
        values: the entry as written, `type` included. May hold secrets.
        file: where it was written; `None` for one that was made by a program.
        path: keys that lead to it in the file.
        lines: line of each key path in the file.
    """

    type: str
    values: Mapping[str, object]
    file: Path | None = None
    path: KeyPath = ()
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False, compare=False)

    def where(self, key: KeyPath = ()) -> str:
        """The place of a key of this entry, for the beginning of a message."""
        if self.file is None:
            return f"backend '{self.type}'" + (f", {dotted(key)}" if key else "")
        return place(self.file, self.lines, self.path + key)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The file as a whole. Without a file there is one project, `main`, with no entries."""

    file: Path
    projects: Mapping[str, tuple[BackendEntry, ...]]


def load_server_config(file: Path) -> ServerConfig:
    """Reads the file; a missing or empty one is the default.

    Raises:
        ConfigurationError: it cannot be read, or is not what it should be. Says where and what to do.
    """
    document = load_document(file)
    projects = dict(_projects(document)) if document is not None and document.value is not None else {}
    return ServerConfig(file, projects or {DEFAULT_PROJECT: ()})


def _projects(document: Document) -> Iterator[tuple[str, tuple[BackendEntry, ...]]]:
    top = document.mapping(document.value, (), ("projects",))
    found: set[str] = set()
    for index, value in enumerate(document.list(top.get("projects"), ("projects",))):
        path: KeyPath = ("projects", index)
        project = document.mapping(value, path, ("name", "backends"))
        name = project.get("name")
        if not isinstance(name, str) or not name:
            raise document.error((*path, "name"), "a project needs a name, for example 'name: main'")
        if name in found:
            raise document.error((*path, "name"), f"there are two projects '{name}'; merge them, or rename one")
        found.add(name)
        yield name, _backends(document, project.get("backends"), (*path, "backends"))


def _backends(document: Document, value: object, path: KeyPath) -> tuple[BackendEntry, ...]:
    entries: dict[str, BackendEntry] = {}
    for index, item in enumerate(document.list(value, path)):
        entry = _entry(document, item, (*path, index))
        if entry.type in entries:
            raise document.error(entry.path, f"backend '{entry.type}' is given twice in one project; keep one entry")
        entries[entry.type] = entry
    return tuple(entries.values())


def _entry(document: Document, value: object, path: KeyPath) -> BackendEntry:
    values = document.mapping(value, path)
    kind = values.get("type")
    if not isinstance(kind, str) or not kind:
        raise document.error((*path, "type"), "a backend needs a type, for example 'type: aws'")
    return BackendEntry(kind, values, document.file, path, document.lines)
