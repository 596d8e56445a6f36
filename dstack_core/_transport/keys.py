"""Keys for SSH: that of the server, which its machines let in, and those with which machines prove who they are.

All are ed25519, without a passphrase. OpenSSH's own form is written here by hand, because a library would put chance
into it: what is made from the same seed is the same text.
"""

from __future__ import annotations

import base64
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core.errors import ConfigurationError

_TYPE = b"ssh-ed25519"
_BLOCK = 8
_LINE = 70


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One pair.

    Attributes:
        private: as in a file of OpenSSH. Secret.
        public: `ssh-ed25519 AAAA...`, without a comment.
    """

    private: str = field(repr=False)
    public: str


def key_pair(seed: bytes) -> KeyPair:
    """The pair that belongs to 32 bytes; whoever knows them knows the private key.

    Raises:
        ValueError: there are not 32 of them.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    known = _text(_TYPE) + _text(public)
    # Two equal numbers show whoever decrypts a key that the passphrase was right. Here there is none.
    secret = bytes(8) + known + _text(seed + public) + _text(b"")
    secret += bytes(range(1, 1 + -len(secret) % _BLOCK))
    blob = b"openssh-key-v1\0" + _text(b"none") * 2 + _text(b"") + _number(1) + _text(known) + _text(secret)
    return KeyPair(_armoured(blob), f"{_TYPE.decode()} {base64.b64encode(known).decode()}")


def server_key(path: Path) -> KeyPair:
    """The server's pair: what the file holds, which is made when it is first needed, for this user alone.

    Raises:
        ConfigurationError: the file cannot be used; says what to do.
    """
    try:
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as error:
        raise ConfigurationError(f"The server's SSH key {path} cannot be used ({error.strerror or error}).") from error


def _make(path: Path) -> None:
    """Whole or not at all, and never in place of one that another process made meanwhile."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    pair = key_pair(os.urandom(32))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(pair.private)
            file.flush()
            os.fsync(file.fileno())
        Path(path).hardlink_to(name)
    except FileExistsError:
        return
    finally:
        Path(name).unlink()


def _read(path: Path) -> KeyPair:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigurationError(
            f"Others can read the server's SSH key {path}, which opens all of its machines. Make it private: "
            f"chmod 600 {path}"
        )
    text = path.read_text()
    return KeyPair(text, _public_of(text, path))


def _public_of(private: str, path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    cure = "Put an ed25519 key without a passphrase there (ssh-keygen -t ed25519 -N ''), or remove it for a new one."
    try:
        key = load_ssh_private_key(private.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"The server's SSH key {path} cannot be read ({error}). {cure}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"The server's SSH key {path} is of another kind. {cure}")
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _armoured(blob: bytes) -> str:
    text = base64.b64encode(blob).decode()
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    return "\n".join(["-----BEGIN OPENSSH PRIVATE KEY-----", *lines, "-----END OPENSSH PRIVATE KEY-----", ""])


def _text(value: bytes) -> bytes:
    return _number(len(value)) + value


def _number(value: int) -> bytes:
    return value.to_bytes(4, "big")
