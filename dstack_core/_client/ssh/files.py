"""Files that several programs write: whole or not at all, and one after the other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, over all processes. The kernel lets go of it if its holder dies."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Gives a file other content, at once. A file that is there keeps its mode and its owner.

    Args:
        path: the file; no symbolic link.
        content: all of it.
        mode: for a file that is not there yet.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            _look_like(file.fileno(), path, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _look_like(handle: int, path: Path, mode: int) -> None:
    try:
        before = path.stat()
    except FileNotFoundError:
        os.fchmod(handle, mode)
        return
    os.fchmod(handle, before.st_mode & 0o7777)
    # Only root may give files away, and only root needs to.
    with suppress(PermissionError):
        os.fchown(handle, before.st_uid, before.st_gid)
