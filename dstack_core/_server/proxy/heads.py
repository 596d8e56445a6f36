"""Heads of requests and of answers: what goes on, what belongs to one connection alone, what we add. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dstack_core._server.proxy.targets import Rewriting

Header = tuple[bytes, bytes]

CHUNKED = b"transfer-encoding: chunked\r\n"

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_FORWARDED = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-prefix")
_OURS = _HOP_BY_HOP | {b"authorization", b"content-length", b"expect", b"host", *_FORWARDED}
"""Headers of a request that are not simply passed on."""


class Own(NamedTuple):
    """The headers of one request, sorted: those that just go on, and those that we have a say in.

    Attributes:
        plain: what just goes on.
        special: by name; several of one name are joined, as HTTP has it.
    """

    plain: list[Header]
    special: dict[bytes, bytes]


def sort_headers(headers: Iterable[Header]) -> Own:
    """Sorts the headers of a request. Their names are in lower case."""
    headers = list(headers)
    plain = [header for header in headers if header[0] not in _OURS]
    special: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _OURS:
            special[name] = b"%b, %b" % (special[name], value) if name in special else value
    if b"connection" in special:
        named = _named(special[b"connection"])
        plain = [header for header in plain if header[0] not in named]
    return Own(plain, special)


def _named(connection: bytes) -> set[bytes]:
    """The headers that `Connection` names: they, too, belong to one connection alone."""
    return {name.strip().lower() for name in connection.split(b",")}


class Origin(NamedTuple):
    """Who asks, as far as the replica is told.

    Attributes:
        client: the address of the client; `None` over a unix socket.
        scheme: by which it reached us.
        prefix: what was taken off the path.
    """

    client: bytes | None
    scheme: bytes
    prefix: bytes


def request_head(method: bytes, target: bytes, own: Own, origin: Origin, more: bytes) -> bytes:
    """The head of a request to a replica.

    Args:
        method: the method.
        target: path and query.
        own: the client's headers.
        origin: who asks.
        more: complete header lines that say how the body is framed, and the like.
    """
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, host_of(own))]
    lines += [b"%b: %b\r\n" % header for header in own.plain]
    lines += _forwarded(own.special, origin)
    lines += [more, b"\r\n"]
    return b"".join(lines)


def host_of(own: Own) -> bytes:
    """How the client called us."""
    return own.special.get(b"host") or b"localhost"


def _forwarded(special: dict[bytes, bytes], origin: Origin) -> list[bytes]:
    """Who the client is, and by which address it came: for replicas that write addresses of their own."""
    get = special.get
    lines = [
        b"x-forwarded-proto: %b\r\n" % (get(b"x-forwarded-proto") or origin.scheme),
        b"x-forwarded-host: %b\r\n" % (get(b"x-forwarded-host") or get(b"host") or b"localhost"),
    ]
    before, prefix = get(b"x-forwarded-for"), get(b"x-forwarded-prefix", b"") + origin.prefix
    if origin.client is not None:
        before = origin.client if before is None else b"%b, %b" % (before, origin.client)
    if before is not None:
        lines.append(b"x-forwarded-for: %b\r\n" % before)
    if prefix:
        lines.append(b"x-forwarded-prefix: %b\r\n" % prefix)
    return lines


def response_headers(headers: Sequence[Header], status: int, rewriting: Rewriting | None) -> list[Header]:
    """The headers of a replica's answer that go on to the client."""
    dropped = _dropped(headers, status)
    kept = [header for header in headers if header[0] not in dropped]
    return kept if rewriting is None else [_rewritten(header, rewriting) for header in kept]


def _dropped(headers: Sequence[Header], status: int) -> frozenset[bytes]:
    dropped = _HOP_BY_HOP
    for name, value in headers:
        if name == b"connection":
            dropped = dropped.union(_named(value))
        elif name == b"transfer-encoding":
            dropped = dropped.union((b"content-length",))
    if status in {204, 304}:
        # Such an answer has no body, whatever length it names.
        dropped = dropped.union((b"content-length",))
    return dropped


def _rewritten(header: Header, rewriting: Rewriting) -> Header:
    name, value = header
    if name == b"location":
        return name, rewriting.location(value)
    if name == b"set-cookie":
        return name, rewriting.cookie(value)
    return header
