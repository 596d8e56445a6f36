"""The hashes of files that did not change since the last time, so that a folder need not be read again.

One file per folder, below `$DSTACK_HOME/client/code`. It only saves time: what is damaged, or cannot be written, is as
good as nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from typing import Any

from dstack_core._client.code.reading import Stamp, Version
from dstack_core._home import home

FORMAT = 1
FORGOTTEN = 90 * 24 * 3600.0
"""Seconds after which what is known of a folder that nobody sends any more is removed."""

# The four of the stamp, and the hashes: a list, as JSON gives it back.
_Entry = list[Any]


class FileMemory:
    """What is known of the files of one folder.

    Args:
        folder: the folder, absolute.
    """

    def __init__(self, folder: str) -> None:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        self._path = home() / "client" / "code" / f"{name}.json"
        self._folder = folder
        self._known = self._load()
        self._seen: dict[str, _Entry] = {}

    def chunks(self, path: str, stamp: Stamp) -> tuple[str, ...] | None:
        """The hashes of a file's chunks, if it still has this stamp."""
        entry = self._known.get(path)
        # Compared in place: this is done for every file of the folder, every time.
        if entry is None or entry[:4] != [*stamp]:
            return None
        self._seen[path] = entry
        return tuple(entry[4])

    def learn(self, path: str, version: Version) -> None:
        """Keeps a version of a file, unless its stamp may come to stand for another one, too."""
        if version.settled:
            self._seen[path] = [*version.stamp, list(version.chunks)]

    def save(self) -> None:
        """Writes what is known of the files that were seen."""
        if self._seen == self._known:
            return
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = self._path.with_suffix(f".{os.getpid()}")
            document = {"format": FORMAT, "folder": self._folder, "files": self._seen}
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, separators=(",", ":")))
            draft.replace(self._path)
            self._forget_others()
        self._known = self._seen

    def _load(self) -> dict[str, _Entry]:
        with suppress(OSError, ValueError, TypeError, KeyError):
            document = json.loads(self._path.read_bytes())
            if document["format"] == FORMAT and document["folder"] == self._folder:
                return dict(document["files"])
        return {}

    def _forget_others(self) -> None:
        before = time.time() - FORGOTTEN
        for entry in os.scandir(self._path.parent):
            with suppress(OSError):
                if entry.stat().st_mtime < before:
                    os.unlink(entry.path)
