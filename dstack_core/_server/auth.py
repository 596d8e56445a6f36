"""Who may speak to the server: over the unix socket the same user of this computer, over TCP whoever has the token.

The token itself is kept nowhere: `server/token` holds its SHA-256. The token is 256 random bits, so a plain hash is as
good as a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import sys
from pathlib import Path
from typing import cast

from dstack_core.errors import ConfigurationError

LOCAL = "local"
"""Key in a request's `state` that is there if and only if it came over the unix socket, from the same user."""
FRONT = "front"
"""Key in a request's `state` that is there if and only if it came to the port for browsers of a local server."""
TOKEN_LENGTH = 16
"""The shortest token that may be set by hand."""


class NotAllowedError(Exception):
    """The request has no token, or a wrong one."""


class Token:
    """Compares tokens in constant time. Knows the hash only."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    @classmethod
    def of(cls, token: str) -> Token:
        """A token that a person chose."""
        if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigurationError(
                f"The token of the server must be at least {TOKEN_LENGTH} printable ASCII characters without spaces. "
                "Unset DSTACK_SERVER_TOKEN to have a good one generated."
            )
        return cls(_digest(token.encode()))

    def check(self, authorization: bytes | None) -> None:
        """Raises `NotAllowedError` unless the value of the header `Authorization` is `Bearer` and the token."""
        if authorization is None:
            raise NotAllowedError(
                "This server wants a token and got none. Put it in ~/.dstack/config.yml, as `token:` of the project, "
                "or pass it: Client.from_config(user_token=...)."
            )
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not self.matches(given.strip()):
            raise NotAllowedError(
                "The server does not know this token. Take the one that `dstack server` printed when it first started; "
                "if it is lost, delete server/token in the server's home folder and start the server again."
            )

    def matches(self, given: bytes) -> bool:
        """Whether that is the token."""
        return hmac.compare_digest(_digest(given), self._digest)


def stored_token(path: Path) -> tuple[Token, str | None]:
    """The token whose hash is in that file. Makes one if there is none, and then returns its text, too."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return _new_token(path)
    try:
        return Token(bytes.fromhex(text.removeprefix("sha256:"))), None
    except ValueError:
        raise ConfigurationError(f"{path} is damaged. Delete it: the next start makes a new token.") from None


def _new_token(path: Path) -> tuple[Token, str]:
    text = secrets.token_urlsafe(32)
    digest = _digest(text.encode())
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"sha256:{digest.hex()}\n")
    draft.replace(path)
    return Token(digest), text


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def peer_uid(connection: socket.socket) -> int:
    """The user who made the connection, as the kernel says."""
    if sys.platform == "darwin":
        # struct xucred: version, uid, number of groups, 16 groups. SOL_LOCAL is 0, LOCAL_PEERCRED is 1.
        credentials = connection.getsockopt(0, 1, 76)
        return cast("int", struct.unpack_from("=II", credentials)[1])
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return cast("int", struct.unpack("3i", credentials)[1])
