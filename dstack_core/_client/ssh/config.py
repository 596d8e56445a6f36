"""What makes `ssh RUN` work while a run is attached: entries in a file of ours, included from `~/.ssh/config`.

    $DSTACK_HOME/ssh/
    ├── attached/RUN.PID.N/   one for each attach; locked by its process as long as that lives
    ├── config, known_hosts   written anew from those whenever one comes or goes
    └── included              what was changed in ~/.ssh, to be undone after the last of them

`~/.ssh/config` gets one line at its top, and is as it was, byte for byte, after the last attach has gone. A line that
its owner put there stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path

from dstack_core._client.ssh.files import locked, replace
from dstack_core._client.ssh.login import Login, quoted
from dstack_core._home import home

_LOGIN = "login"
_numbers = count()


def user_folder() -> Path:
    """Where the user's own settings for OpenSSH are."""
    return Path("~/.ssh").expanduser()


def leads_to(name: str) -> bool:
    """Whether `ssh NAME` leads to a run that is attached."""
    with suppress(OSError):
        return f"\nHost {name}\n" in (home() / "ssh" / "config").read_text()
    return False


class Entry:
    """One attach, from its making to `withdraw`.

    Args:
        folder: for our own files.
        users: the user's own folder for OpenSSH.
        login: the machine.

    Attributes:
        folder: for what belongs to this attach alone; it is gone with it, or with its process.
    """

    def __init__(self, folder: Path, users: Path, login: Login) -> None:
        self._files = _Files(folder, users)
        self._login = login
        self._handle: int | None = None
        self.folder = folder / "attached" / f"{login.name}.{os.getpid()}.{next(_numbers)}"
        with self._files.locked():
            # Of a process that had the same number.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)
            self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def publish(self) -> None:
        """From now on `ssh RUN` leads to this machine.

        Raises:
            OSError: something cannot be written; what was there is as it was.
            ConfigurationError: one of the paths cannot be named in such a file.
        """
        self._files.check(self._login)
        (self.folder / _LOGIN).write_text(self._login.text())
        with self._files.locked():
            self._files.renew()

    def withdraw(self) -> None:
        """Its traces are gone, and those of all that died. May be called twice.

        Raises:
            OSError: something cannot be written.
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        os.close(handle)
        with self._files.locked():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._files.renew()


class _Files:
    """All that is written. Held by one process at a time, see `locked`."""

    def __init__(self, folder: Path, users: Path) -> None:
        self._folder = folder
        self._config, self._known = folder / "config", folder / "known_hosts"
        self._include = _Include(users, self._config, folder / "included")

    def locked(self) -> AbstractContextManager[None]:
        """One process at a time."""
        return locked(self._folder)

    def check(self, login: Login) -> None:
        """Whether all of it can be written at all: what cannot would be in the way of others."""
        quoted(self._config)
        login.entries(self._config, self._known)

    def renew(self) -> None:
        """Writes what fits those that live."""
        logins = {login.name: login for login in self._alive()}
        if not logins:
            self._include.undo()
            self._config.unlink(missing_ok=True)
            self._known.unlink(missing_ok=True)
            return
        entries = "".join(login.entries(self._config, self._known) for login in logins.values())
        replace(self._known, "".join(login.known() for login in logins.values()).encode())
        replace(self._config, f"# Written by dstack: the runs that are attached.\n{entries}".encode())
        self._include.do()

    def _alive(self) -> Iterator[Login]:
        """The latest comes last."""
        found = []
        for folder in (self._folder / "attached").iterdir():
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            # It may not be so far, or of another version.
            with suppress(OSError, ValueError, TypeError):
                file = folder / _LOGIN
                found.append((file.stat().st_mtime_ns, file.read_text()))
        for _, text in sorted(found):
            with suppress(ValueError, TypeError):
                yield Login.parse(text)


def _abandoned(folder: Path) -> bool:
    """Whether the process whose it is has ended."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


class _Include:
    """The line in the user's own configuration."""

    def __init__(self, folder: Path, target: Path, note: Path) -> None:
        self._folder, self._target, self._note = folder, target, note

    def do(self) -> None:
        """Puts it there, unless it is there already."""
        made = [] if self._folder.exists() else ["folder"]
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._folder):
            path = self._path()
            before = path.read_bytes() if path.exists() else None
            if before is not None and self._is_in(before):
                return
            made += ["file"] if before is None else []
            replace(self._note, json.dumps(made).encode())
            replace(path, self._line() + (before or b""))

    def undo(self) -> None:
        """Takes it away if it is ours, and what was made for it."""
        if not self._note.exists():
            return
        made = json.loads(self._note.read_bytes() or b"[]")
        if self._folder.exists():
            with locked(self._folder):
                self._take_away(self._path(), "file" in made)
            if "folder" in made:
                # Others may have put something there.
                with suppress(OSError):
                    self._folder.rmdir()
        self._note.unlink()

    def _take_away(self, path: Path, ours: bool) -> None:
        before = path.read_bytes() if path.exists() else b""
        at = (b"\n" + before).find(b"\n" + self._line())
        if at < 0:
            return
        left = before[:at] + before[at + len(self._line()) :]
        if left or not ours:
            replace(path, left)
        else:
            path.unlink()

    def _path(self) -> Path:
        """Where a symbolic link leads: that one is replaced, and not the link."""
        return Path(os.path.realpath(self._folder / "config"))

    def _line(self) -> bytes:
        return f"Include {quoted(self._target)}\n".encode()

    def _is_in(self, content: bytes) -> bool:
        """Before the first section: in one, it would hold for that alone."""
        for line in content.decode(errors="replace").splitlines():
            words = line.replace("=", " ", 1).split(None, 1)
            if words and words[0].lower() in {"host", "match"}:
                return False
            if len(words) == 2 and words[0].lower() == "include":
                named = words[1].strip().strip('"')
                if named == str(self._target) or os.path.expanduser(named) == str(self._target):  # noqa: PTH111  # as text
                    return True
        return False
