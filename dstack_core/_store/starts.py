"""How many starts of which database were seen from here: a file beside the database, so that no copy of it has it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from uuid import UUID


class Starts:
    """The counts of starts that were seen from this computer, in one file.

    Args:
        file: where they are kept; made at the first start.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self, owner: UUID) -> int:
        """How many starts of the database of this owner were seen; 0 if none was, or the file cannot be read."""
        return self._counts().get(str(owner), 0)

    def write(self, owner: UUID, starts: int) -> None:
        """Remembers it, durably."""
        counts = {**self._counts(), str(owner): starts}
        fresh = self._file.with_name(f".{self._file.name}.new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(counts, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._file)

    def _counts(self) -> dict[str, int]:
        with suppress(OSError, ValueError):
            found = json.loads(self._file.read_text())
            if isinstance(found, dict):
                return {str(key): value for key, value in found.items() if isinstance(value, int)}
        return {}
