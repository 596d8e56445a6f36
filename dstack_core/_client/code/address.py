"""Addresses of git repositories, taken apart, and put together for another protocol."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dstack_core.errors import ConfigurationError

_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?|ssh|git)://(?:(?P<userinfo>[^/@\s]+)@)?(?P<host>[^/:@\s]+)(?::(?P<port>[0-9]{1,5}))?/"
    r"|(?P<login>[^/@:\s]+)@(?P<scp>[^/:@\s]+):)"
    r"(?P<path>(?P<owner>[^\s?#]+)/(?P<name>[^/\s?#]+?)(?:\.git)?)/?"
)


@dataclass(frozen=True)
class Address:
    """Where a git repository is.

    Attributes:
        scheme: `https`, `http`, `ssh`, `git`, or empty for the short form `user@host:path`.
        user: who logs in, with SSH.
        secret: password or token that was written into the address; `None` if there is none.
        host: the git server.
        port: `None` for the usual one.
        path: on the server.
        owner: the path without its last part.
        name: its last part, without `.git`.
    """

    scheme: str
    user: str | None
    secret: str | None = field(repr=False)
    host: str
    port: int | None
    path: str
    owner: str
    name: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Reads an address.

        Raises:
            ConfigurationError: it cannot be read. It is not repeated, as it may hold a token.
        """
        match = _ADDRESS.fullmatch(url.strip())
        if match is None:
            raise ConfigurationError(
                "RemoteRepo: the address cannot be read. Write 'https://host/user/name' or 'git@host:user/name.git'."
            )
        scheme = match["scheme"] or ""
        user, secret = _userinfo(match["userinfo"], scheme) if match["userinfo"] else (match["login"], None)
        return cls(
            scheme=scheme,
            user=user,
            secret=secret,
            host=match["host"] or match["scp"],
            port=int(match["port"]) if match["port"] else None,
            path=match["path"],
            owner=match["owner"],
            name=match["name"],
        )

    @property
    def is_web(self) -> bool:
        """Whether it is one of HTTP or HTTPS."""
        return self.scheme in ("http", "https")

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.host}/{self.owner.lstrip('/')}/{self.name}"

    def plain(self) -> str:
        """The address as it was given, without a secret."""
        if not self.scheme:
            return f"{self.user}@{self.host}:{self.path}"
        user = f"{self.user}@" if self.user and not self.is_web else ""
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{user}{self.host}{port}/{self.path}"

    def web(self) -> str:
        """The address over HTTPS, or HTTP if it was one of HTTP."""
        return self.plain() if self.is_web else f"https://{self.host}/{self.path.lstrip('/')}"

    def ssh(self) -> str:
        """The address over SSH."""
        return f"git@{self.host}:{self.path}" if self.scheme in ("http", "https", "git") else self.plain()


def _userinfo(text: str, scheme: str) -> tuple[str | None, str | None]:
    """User and secret. In an address of the web, what stands alone is a token."""
    from urllib.parse import unquote

    user, _, second = text.partition(":")
    if scheme not in ("http", "https"):
        return unquote(user), None
    return None, unquote(user if second in ("", "x-oauth-basic") else second)
