"""A client's request, on its way to becoming one to a replica."""

from __future__ import annotations

from typing import NamedTuple

from starlette.types import Receive, Scope

from dstack_core._server.proxy.access import Visitor
from dstack_core._server.proxy.asking import Outgoing
from dstack_core._server.proxy.heads import CHUNKED, Origin, Own, host_of, request_head, sort_headers
from dstack_core._server.proxy.refusing import Refusal
from dstack_core._server.proxy.targets import Rewriting, Target

SMALL_BODY = 64 << 10
"""Bytes up to which a body is read whole before a replica is asked, so that it can be sent again."""
LONGEST_HEAD = 64 << 10
"""Bytes that the head of a request may have."""
EXPECT = b"expect: 100-continue\r\n"


class ClientGoneError(Exception):
    """The client hung up while its request was read."""


class Incoming(NamedTuple):
    """A request without its body.

    Attributes:
        method: its method.
        own: its headers.
        client: the address of the client, `None` over a unix socket.
        scheme: `http` or `https`.
        visitor: who asks.
    """

    method: str
    own: Own
    client: bytes | None
    scheme: bytes
    visitor: Visitor

    @classmethod
    def of(cls, scope: Scope, visitor: Visitor) -> Incoming:
        """From what ASGI says of it."""
        address = scope["client"]
        client = None if address is None else address[0].encode()
        return cls(scope["method"], sort_headers(scope["headers"]), client, scope["scheme"].encode(), visitor)

    def head(self, path: bytes, prefix: bytes, more: bytes) -> bytes:
        """The head of the request to a replica.

        Args:
            path: the replica's own path, with the query.
            prefix: what was taken off the path.
            more: header lines for the framing of the body.
        """
        authorization = self.own.special.get(b"authorization")
        if authorization is not None and not self.visitor.brought_token:
            more = b"%bauthorization: %b\r\n" % (more, authorization)
        origin = Origin(self.client, self.scheme, prefix)
        head = request_head(self.method.encode(), path, self.own, origin, more)
        if len(head) > LONGEST_HEAD:
            raise Refusal(431, "head_too_large", f"The head of the request is longer than {LONGEST_HEAD >> 10} KiB.")
        return head

    async def outgoing(self, path: bytes, prefix: bytes, receive: Receive) -> Outgoing:
        """The request to a replica; with its body if that is small, else with the promise of it."""
        if self.method == "CONNECT":
            raise Refusal(501, "not_implemented", "A service cannot be asked for a tunnel.")
        special = self.own.special
        coding, length = special.get(b"transfer-encoding"), special.get(b"content-length")
        if coding is not None and (coding.lower() != b"chunked" or length is not None):
            raise Refusal(
                501, "not_implemented", "Of transfer-encodings only `chunked`, without a length, is understood."
            )
        if length is None and coding is None:
            return Outgoing(self.method, self.head(path, prefix, b""), b"")
        expects = special.get(b"expect", b"").lower() == b"100-continue"
        more = CHUNKED if length is None else b"content-length: %b\r\n" % length
        head = self.head(path, prefix, more + EXPECT if expects else more)
        if length is not None and int(length) <= SMALL_BODY and not expects:
            return Outgoing(self.method, head, await read_whole(receive, SMALL_BODY) if int(length) else b"")
        return Outgoing(self.method, head, None, receive, chunked=length is None, expects=expects)

    def rewriting(self, target: Target, *, strips: bool) -> Rewriting | None:
        """How paths in the answer are to be changed; `None` if the replica knows its prefix."""
        return Rewriting(target.prefix, host_of(self.own)) if strips else None


async def read_whole(receive: Receive, limit: int) -> bytes:
    """The body of a request. Raises `Refusal` if it is longer than that."""
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        pieces.append(message["body"])
        size += len(message["body"])
        more = message.get("more_body", False)
        if size > limit:
            close = [(b"connection", b"close")]
            raise Refusal(413, "too_large", f"The body of the request is larger than {limit >> 20} MiB.", close)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
