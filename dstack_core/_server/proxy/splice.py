"""WebSockets, and whatever else a client upgrades to: once the replica agrees, bytes go both ways as they are."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from dstack_core._server.protocol import ServerProtocol
from dstack_core._server.proxy.app import CLOSE, Asked, Proxy, as_refusal, inner, missing_slash
from dstack_core._server.proxy.asking import Exchange, Outgoing
from dstack_core._server.proxy.heads import Header, response_headers
from dstack_core._server.proxy.incoming import Incoming
from dstack_core._server.proxy.refusing import Refusal, head_and_body, shape_for
from dstack_core._server.proxy.targets import SERVICES
from dstack_core._server.proxy.upstream import Broken
from dstack_core._server.serving import Life

log = logging.getLogger(__name__)

EARLY = 64 << 10
"""Bytes that a client may send before it knows whether the replica agrees."""


class Side(asyncio.Protocol):
    """One end of a tunnel. What it receives goes to the other end, no faster than that takes it.

    Attributes:
        transport: of this end.
        gone: set when this end is gone.
        task: what is cancelled when this end goes before it has another one.
    """

    def __init__(self, transport: asyncio.Transport, task: asyncio.Task[None] | None = None) -> None:
        self.transport = transport
        self.gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.task = task
        self._other: Side | None = None
        self._early = b""
        transport.set_protocol(self)

    def link(self, other: Side) -> None:
        """From now on what comes from here goes there."""
        self._other = other

    def flow(self) -> None:
        """Lets the bytes go; those that came too early are the first. Both ends are linked."""
        early, self._early = self._early, b""
        if early:
            self.data_received(early)
        if not self.transport.is_closing():
            self.transport.resume_reading()

    async def drain(self) -> None:
        """Returns when this end takes more."""
        await self._writable.wait()

    def data_received(self, data: bytes) -> None:
        """Bytes from this end."""
        if self._other is not None:
            self._other.transport.write(data)
            return
        self._early += data
        if len(self._early) > EARLY:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        """This end does not take more for now."""
        self._writable.clear()
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """This end takes more."""
        self._writable.set()
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        """This end is gone: the other one gets what is on its way, and ends as well."""
        self.gone.set()
        if self._other is not None:
            self._other.transport.close()
        elif self.task is not None:
            self.task.cancel()


class Tunnel:
    """A client that asks for another protocol, from its request to its end.

    uvicorn counts it among its connections, and ends it with the server.

    Attributes:
        transport: to the client.
    """

    def __init__(self, proxy: Proxy, life: Life, connection: ServerProtocol) -> None:
        self.transport = connection.transport
        self._proxy = proxy
        self._life = life
        self._connection = connection
        self._client = Side(self.transport)

    def shutdown(self) -> None:
        """The server stops."""
        self.transport.close()

    def begin(self, rest: bytes) -> None:
        """Starts; `rest` is what came after the head of the request."""
        if rest:
            self._client.data_received(rest)
        state = self._connection.server_state
        state.connections.add(self)  # type: ignore[arg-type]  # what uvicorn does to a connection is `shutdown`
        task = asyncio.get_running_loop().create_task(self._run())
        self._client.task = task
        state.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        state = self._connection.server_state
        state.tasks.discard(task)
        state.connections.discard(self)
        self.transport.close()
        self._client.task = None

    async def _run(self) -> None:
        with self._life.request():
            try:
                asked = await self._ask()
            except Exception as exc:  # noqa: BLE001  # the last line of defence: becomes an answer, and a line in the log
                self._refuse(as_refusal(exc))
                return
            try:
                if asked.exchange.upstream.switched:
                    await self._splice(asked.exchange)
                else:
                    await self._pass_on(asked)
            finally:
                asked.exchange.close()

    async def _ask(self) -> Asked:
        connection = self._connection
        visitor = self._proxy.access.visitor(connection.app_state, connection.headers)
        url = httptools.parse_url(connection.url)
        target, view = await self._proxy.find(url.path, url.query or b"", visitor)
        if target.rest is None:
            raise missing_slash(target, url.query or b"")
        incoming = Incoming.of(cast("dict[str, object]", connection.scope), visitor)
        protocol = incoming.own.special[b"upgrade"]
        path, prefix = inner(target, view)
        head = incoming.head(path, prefix, b"connection: Upgrade\r\nupgrade: %b\r\n" % protocol)
        outgoing = Outgoing(incoming.method, head, b"", upgrades=True)
        exchange = await self._proxy.asking.ask(view, outgoing, tell=visitor.known)
        return Asked(exchange, incoming.rewriting(target, strips=view.strip_prefix))

    async def _splice(self, exchange: Exchange) -> None:
        """Both agree: bytes go both ways until one end is gone."""
        upstream = exchange.upstream
        replica = Side(upstream.transport)
        self._client.link(replica)
        replica.link(self._client)
        self.transport.write(_head(101, upstream.headers) + upstream.tail)
        if upstream.lost:
            self.transport.close()
            return
        self._client.flow()
        replica.flow()
        await replica.gone.wait()
        await self._client.gone.wait()

    async def _pass_on(self, asked: Asked) -> None:
        """The replica does not agree: its answer, and the end, since the client may not ask for anything else here."""
        upstream = asked.exchange.upstream
        headers = response_headers(upstream.headers, upstream.status, asked.rewriting)
        self.transport.write(_head(upstream.status, [*headers, CLOSE]))
        more = True
        while more:
            try:
                piece, more = await upstream.piece()
            except Broken as broken:
                log.info("An answer of a replica broke off: %s", broken)
                self.transport.abort()
                return
            self.transport.write(piece)
            await self._client.drain()

    def _refuse(self, refusal: Refusal) -> None:
        headers, body = head_and_body(refusal, shape_for(self._connection.headers))
        self.transport.write(_head(refusal.status, [*headers, CLOSE]) + body)


def _head(status: int, headers: list[Header]) -> bytes:
    lines = [STATUS_LINE[status]]
    lines += [b"%b: %b\r\n" % header for header in headers]
    return b"".join((*lines, b"\r\n"))


class ServiceUpgrades:
    """Takes over the connections whose clients ask a service for another protocol (see `protocol.Upgrades`)."""

    def __init__(self, proxy: Proxy, life: Life) -> None:
        self._proxy = proxy
        self._life = life

    def wants(self, url: bytes, protocol: bytes) -> bool:
        """All that go to a service. HTTP/2 is offered by clients that are as happy without."""
        return url.startswith(SERVICES) and not protocol.startswith(b"h2c")

    def take(self, connection: ServerProtocol, rest: bytes) -> None:
        """Takes the connection."""
        Tunnel(self._proxy, self._life, connection).begin(rest)
