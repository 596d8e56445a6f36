"""The user's key for the machines of runs: an ed25519 pair in the home folder, made when it is first needed."""

from __future__ import annotations

import stat
import subprocess
import tempfile
from os import PathLike
from pathlib import Path

from dstack_core._client.ssh.files import locked, replace
from dstack_core._home import ensure_home, home
from dstack_core.errors import ConfigurationError

_TIMEOUT = 30.0


def ssh_folder() -> Path:
    """Where all about SSH is in the home folder; made if it was not there."""
    path = ensure_home() / "ssh"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def identity_file(given: str | PathLike[str] | None) -> Path:
    """The user's private key: that of the file, or else the one in the home folder, which is made if there is none.

    Raises:
        ConfigurationError: it cannot be used; says what to do.
    """
    try:
        path = Path(given).expanduser().absolute() if given is not None else _own_key()
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigurationError(f"Others can read the SSH key {path}. Make it private: chmod 600 {path}")
    except OSError as error:
        named = given if given is not None else home() / "ssh"
        raise ConfigurationError(f"The SSH key {named} cannot be used ({error.strerror or error}).") from error
    return path


def public_key(given: str | PathLike[str] | None = None) -> str | None:
    """The user's public key, which the machines of a run let in: one line, as `ssh-ed25519 AAAA...`.

    Returns:
        `None` if there is no key, and none can be made. Runs on this computer need none, so that is no error yet.

    Raises:
        ConfigurationError: the file that was given cannot be used.
    """
    try:
        path = identity_file(given)
        beside = path.with_name(f"{path.name}.pub")
        return beside.read_text().strip() if beside.exists() else _public_of(path)
    except (ConfigurationError, OSError) as error:
        if given is None:
            return None
        raise ConfigurationError(str(error)) from error


def _own_key() -> Path:
    folder = ssh_folder()
    path = folder / "id_ed25519"
    if not path.exists():
        with locked(folder):
            if not path.exists():
                _make(path)
    return path


def _make(path: Path) -> None:
    """The public half is there before the private one, by which others know that there is a pair."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        fresh = Path(folder) / path.name
        _keygen("-t", "ed25519", "-N", "", "-C", "dstack", "-f", str(fresh))
        replace(path.with_name(f"{path.name}.pub"), fresh.with_name(f"{path.name}.pub").read_bytes())
        fresh.replace(path)


def _public_of(path: Path) -> str:
    """Without a passphrase: it would be asked for at a terminal that may not be there."""
    return _keygen("-y", "-P", "", "-f", str(path)).strip()


def _keygen(*options: str) -> str:
    try:
        done = subprocess.run(
            ["ssh-keygen", "-q", *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise ConfigurationError("The command ssh-keygen is not here. Install the OpenSSH client.") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError("ssh-keygen did not end.") from error
    if done.returncode != 0:
        raise ConfigurationError(f"The SSH key cannot be used: {' '.join(done.stderr.split())}")
    return done.stdout
