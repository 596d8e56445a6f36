"""Who may use services: the same user over the unix socket, whoever has the token over TCP, this computer's browsers.

The token comes as `Authorization: Bearer TOKEN` from programs, and as the password of HTTP Basic from browsers. A
browser sends what it knows with every request, also with one that a foreign page makes it send; such are refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dstack_core._server.auth import FRONT, LOCAL, Token
from dstack_core._server.proxy.refusing import Refusal

THIS_COMPUTER = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})
"""How a browser of this computer calls it. Any other name was made to point here by somebody else (DNS rebinding)."""
CHALLENGE = [(b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="dstack", charset="UTF-8"')]


class Visitor(NamedTuple):
    """Who asks.

    Attributes:
        known: may use services that are not for everybody.
        brought_token: its `Authorization` has our token, which no replica may see.
    """

    known: bool
    brought_token: bool

    def admit(self) -> None:
        """Raises `Refusal` for a stranger."""
        if not self.known:
            raise Refusal(
                401,
                "unauthorized",
                "This needs the server's token. Send it as `Authorization: Bearer TOKEN`; in a browser, log in with "
                "any name and the token as the password. A service that everybody may use has `auth=False`.",
                CHALLENGE,
            )


class Access:
    """Looks at requests. `token` is what those over TCP must bring."""

    def __init__(self, token: Token | None) -> None:
        self._token = token

    def visitor(self, state: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> Visitor:
        """Who asks. Raises `Refusal` for a request that a foreign page has made a browser send."""
        seen = _seen(headers)
        scheme, token = _credentials(seen.get(b"authorization"))
        brought = self._token is not None and token is not None and self._token.matches(token)
        if FRONT in state:
            _check_front(seen)
        elif brought and scheme == b"basic":
            _check_origin(seen, {seen.get(b"host"), seen.get(b"x-forwarded-host")})
        return Visitor(brought or LOCAL in state or FRONT in state, brought)


def _seen(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The headers that matter here. None of them may come twice: who would know which one the replica reads?"""
    seen: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _MATTER:
            if name in seen:
                raise Refusal(400, "bad_request", f"The header {name.decode()} came twice. Send it once.")
            seen[name] = value
    return seen


_MATTER = frozenset({b"authorization", b"host", b"origin", b"x-forwarded-host"})


def _credentials(authorization: bytes | None) -> tuple[bytes, bytes | None]:
    """The scheme, in lower case, and the token or password."""
    if authorization is None:
        return b"", None
    scheme, _, given = authorization.partition(b" ")
    scheme, given = scheme.lower(), given.strip()
    if scheme == b"bearer":
        return scheme, given
    if scheme != b"basic":
        return scheme, None
    try:
        return scheme, base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return scheme, None


def _check_front(seen: Mapping[bytes, bytes]) -> None:
    """Whoever gets through to the front's port gets in, so that the browser's address bar must name this computer."""
    host = seen.get(b"host", b"")
    if _name(host) not in THIS_COMPUTER:
        raise Refusal(
            403,
            "forbidden",
            f"The services of this computer are reached as localhost or 127.0.0.1, not as {host.decode('latin-1')!r}.",
        )
    origin = seen.get(b"origin")
    if origin is not None and _name(_authority(origin)) not in THIS_COMPUTER:
        raise _foreign(origin)


def _check_origin(seen: Mapping[bytes, bytes], own: set[bytes | None]) -> None:
    origin = seen.get(b"origin")
    if origin is not None and _authority(origin) not in own:
        raise _foreign(origin)


def _foreign(origin: bytes) -> Refusal:
    return Refusal(
        403,
        "forbidden",
        f"A page of {origin.decode('latin-1')} may not use this service by way of your browser. Open the service's own "
        "address, or give the page a token to send as `Authorization: Bearer TOKEN`.",
    )


def _authority(origin: bytes) -> bytes:
    """Host and port of an origin; nothing for one that is hidden (`null`)."""
    return origin.partition(b"://")[2]


def _name(authority: bytes) -> bytes:
    """The host of `host:port`, in lower case."""
    host = authority.lower()
    return host[: host.index(b"]") + 1] if host.startswith(b"[") and b"]" in host else host.partition(b":")[0]
