"""The home folder, and socket addresses that are short enough for the kernel.

Layout:

    $DSTACK_HOME (default ~/.dstack)         mode 0700
    ├── config.yml                           the client's projects and repos
    ├── server.sock                          the local server
    ├── server/                              config.yml, server.db, starts.json, server.log, secret.key, logs/, code/,
    │                                        agent/, ssh/, locks
    ├── client/                              what the client knows of the folders that it sent
    ├── local/<instance>/                    one directory per instance of the local backend
    └── ssh/                                 the user's key, and what `attach` writes for OpenSSH
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from threading import get_ident

from dstack_core.errors import ConfigurationError

LONGEST_ADDRESS = 100
"""Bytes. A socket address holds 108 on Linux and 104 on macOS, with the closing zero."""

_SETTLED = 3600.0
_SHORT_ROOT = Path("/tmp")  # noqa: S108 - fixed, so that every process gets the same answer whatever its TMPDIR


def home() -> Path:
    """The home folder: `$DSTACK_HOME`, else `~/.dstack`. Absolute; not created."""
    return Path(os.environ.get("DSTACK_HOME") or "~/.dstack").expanduser().absolute()


def ensure_home() -> Path:
    """The home folder, created with mode 0700 if it was not there.

    Raises:
        ConfigurationError: it cannot be created or written.
    """
    path = home()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The home folder {path} cannot be created ({error.strerror}). {_CURE}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigurationError(f"The home folder {path} is not writable. {_CURE}")
    return path


_CURE = "Make it writable, or set the environment variable DSTACK_HOME to a folder that is."


def socket_address(path: Path) -> str:
    """What to give to `bind()` or `connect()` for a socket at `path`.

    That is the path itself unless it is longer than `LONGEST_ADDRESS`; then it leads through a short symbolic link to
    the directory of the socket, the same for every caller of this user.

    Raises:
        ConfigurationError: no short address can be made.
    """
    address = str(path.absolute())
    if len(os.fsencode(address)) <= LONGEST_ADDRESS:
        return address
    directory, name = os.path.split(address)
    short = str(_short_link(os.path.realpath(directory)) / name)
    if len(os.fsencode(short)) > LONGEST_ADDRESS:
        raise ConfigurationError(f"The name of the socket {path} is too long. Use a shorter one.")
    return short


def _short_link(directory: str) -> Path:
    root = _short_root(_SHORT_ROOT / f"dstack-{os.getuid()}")
    link = root / hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    if not link.is_symlink():
        _clear(root)
        fresh = root / f"{link.name}.{os.getpid()}.{get_ident()}"
        fresh.symlink_to(directory)
        fresh.replace(link)
    return link


def _clear(root: Path) -> None:
    """Removes links to directories that are gone; new ones may still be waiting for theirs."""
    for link in root.iterdir():
        with suppress(OSError):
            if not link.exists() and link.lstat().st_mtime < time.time() - _SETTLED:
                link.unlink()


def _short_root(root: Path) -> Path:
    """Made with mode 0700. Anyone may write to the folder above, so ownership is checked."""
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"{root} must be a folder of yours with mode 0700, and is not. Remove it, or set the environment variable "
            f"DSTACK_HOME to a path of less than {LONGEST_ADDRESS - 50} bytes, which needs no such folder."
        )
    return root
