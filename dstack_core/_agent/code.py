"""The code of the job: archives on their way in, and the job's folder as its commands will find it.

Cloning and unpacking are programs of their own (git; this one again, as `agent unpack`), so the loop never waits.
"""

from __future__ import annotations

import errno
import os
import sys

from .lean import quiet
from .server import Refusal
from .spec import Failed
from .steps import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .spec import Spec
    from .steps import Steps

_HASH = 64
_UNPACK_LIMIT = 6 * 3600.0
_REFUSED = 3
"""Exit code of `agent unpack` whose words are for people."""
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from %s.__main__ import main; main()"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHOWN = 8


class Archives:
    """What has been sent so far: a file for each archive, in the instance's directory."""

    def __init__(self, directory: str) -> None:
        self._folder = _archives(directory)

    def size(self, name: str) -> int:
        """How much of it is here."""
        try:
            return os.stat(self._path(name)).st_size
        except FileNotFoundError:
            return 0

    def append(self, name: str, offset: int, data: bytes) -> int:
        """Adds a piece at the end, which is at `offset`: all of it or nothing. Says how much is here then.

        Raises:
            Refusal: there is no room for it (507).
        """
        path = self._path(name)
        os.makedirs(self._folder, 0o700, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _append(file, offset, data)
        finally:
            os.close(file)
        return offset + len(data)

    def _path(self, name: str) -> str:
        if len(name) != _HASH or name.strip("0123456789abcdef"):
            raise Refusal(400, "an archive is named by a SHA-256 in hexadecimal")
        return os.path.join(self._folder, name)


def _append(file: int, offset: int, data: bytes) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError as error:
        os.ftruncate(file, offset)
        if error.errno not in _NO_ROOM:
            raise
        message = "the machine's disk has no room for the code: after %d bytes, %s" % (offset, error.strerror)
        raise Refusal(507, message) from None


def _archives(directory: str) -> str:
    return os.path.join(directory, "code")


def job_folder(directory: str) -> str:
    """Where the job's commands find its files."""
    return os.path.join(directory, "job")


def lay_out(spec: Spec, directory: str) -> Steps:
    """Fills the job's folder: the repository first, then what is deleted, then the files of the archive.

    Raises:
        Failed: with reason `code_failed`, and the cure.
    """
    folder = job_folder(directory)
    os.makedirs(folder, 0o700, exist_ok=True)
    try:
        if spec.repo is not None:
            from .clone import clone

            yield from clone(spec.repo, folder, directory)
        if spec.code is not None:
            yield from _unpack(spec.code, folder, directory)
    finally:
        _remove_archives(directory)


def _unpack(code: dict, folder: str, directory: str) -> Steps:  # type: ignore[type-arg]  # JSON
    archive, deleted = "-", "-"
    if code["size"]:
        archive = os.path.join(_archives(directory), code["hash"])
    if code.get("deleted"):
        deleted = os.path.join(_archives(directory), "deleted")
        os.makedirs(os.path.dirname(deleted), 0o700, exist_ok=True)
        with open(deleted, "wb") as paths:
            paths.write("\0".join(code["deleted"]).encode("utf-8", "surrogateescape"))
    status, output = yield Command([*_ourselves(), "unpack", folder, archive, deleted], limit=_UNPACK_LIMIT)
    if status == _REFUSED:
        raise Failed("code_failed", output)
    if status:
        raise Failed("code_failed", "The code could not be unpacked (exit code %d): %s" % (status, output[-1000:]))


def _ourselves() -> list[str]:
    """Argv that starts this program again."""
    package = str(__package__)
    root = os.path.abspath(__file__)
    for _ in range(package.count(".") + 2):
        root = os.path.dirname(root)
    return [sys.executable, "-I", "-S", "-c", _START % package, root]


def _remove_archives(directory: str) -> None:
    """They are needed no more, and may be large."""
    folder = _archives(directory)
    with quiet:
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def working_dir(spec: Spec, directory: str) -> str:
    """Where the commands start, on this machine: `working_dir` as it is, or below the job's folder.

    Raises:
        Failed: it leads out of the folder, or the code has no such folder.
    """
    base = job_folder(directory)
    os.makedirs(base, 0o700, exist_ok=True)
    wanted = spec.working_dir or ""
    if os.path.isabs(wanted):
        return os.path.normpath(wanted)
    root = os.path.realpath(base)
    place = os.path.realpath(os.path.join(root, wanted))
    if place != root and not place.startswith(root + os.sep):
        raise Failed("start_failed", "working_dir %r leads out of the job's folder. Give one within it." % wanted)
    if not spec.has_code:
        os.makedirs(place, exist_ok=True)
    elif not os.path.isdir(place):
        raise Failed(
            "start_failed",
            "There is no folder %r in the job's code, which has %s. Correct working_dir." % (wanted, _contents(root)),
        )
    return place


def _contents(folder: str) -> str:
    names = sorted(os.listdir(folder))
    listed = ", ".join(map(repr, names[:_SHOWN])) or "nothing"
    return listed + (" and %d more" % (len(names) - _SHOWN) if len(names) > _SHOWN else "")
