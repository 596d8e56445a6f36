"""Sends a request to one replica after the other until one has answered.

A request goes to another replica only if nobody can tell the difference: nothing of it was sent, or its method may be
repeated and its body is still here. A small answer to such a request is read to its end before it counts, so that a
replica that dies in the middle of it costs the client nothing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from uuid import UUID

from starlette.types import Receive

from dstack_core._server.proxy.contract import Directory, ServiceView
from dstack_core._server.proxy.pools import Pool, Pools
from dstack_core._server.proxy.refusing import RETRY_AFTER, Refusal
from dstack_core._server.proxy.upstream import Broken, Upstream
from dstack_core._transport import AgentUnreachable

log = logging.getLogger(__name__)

READY_WAIT = 10.0
"""Seconds that a request waits for a replica."""
SMALL_ANSWER = 64 << 10
"""Bytes up to which an answer is read whole first, if the request may be repeated."""
MOST_SENDS = 3
"""So many replicas get one request. If it is the request that kills them, the others live."""
MOST_CONNECTS = 20
EXPECT_PATIENCE = 1.0
"""Seconds that a replica has to say whether it wants the body of a request with `Expect: 100-continue`."""
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})


@dataclass(slots=True)
class Outgoing:
    """A request as a replica gets it.

    Attributes:
        method: its method.
        head: its complete head.
        body: its body if that is here; `None` if it comes by `receive`.
        receive: where the body comes from.
        chunked: the body has no length.
        expects: the client waits to be asked for the body.
        upgrades: it asks for another protocol.
        body_asked: whether `receive` was called, which asks the client for the body.
    """

    method: str
    head: bytes
    body: bytes | None
    receive: Receive | None = None
    chunked: bool = False
    expects: bool = False
    upgrades: bool = False
    body_asked: bool = False

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again to a replica that did not answer."""
        return self.method in IDEMPOTENT and not self.body_asked

    async def pump(self, upstream: Upstream) -> None:
        """Passes the body on as it comes."""
        assert self.receive is not None  # noqa: S101  # a request without a body here has one there
        if self.expects and not await upstream.may_send_body(EXPECT_PATIENCE):
            return
        self.body_asked = True
        more = True
        while more and not upstream.lost:
            message = await self.receive()
            if message["type"] != "http.request":
                return
            more = message.get("more_body", False)
            if data := self._framed(message["body"], more):
                upstream.write(data)
            if more:
                await upstream.drain()
        upstream.sent = not more

    def _framed(self, data: bytes, more: bool) -> bytes:
        if not self.chunked:
            return data
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return chunk if more else chunk + b"0\r\n\r\n"


class Exchange:
    """A request that is being answered by one replica. Must be closed.

    Attributes:
        upstream: the connection.
    """

    __slots__ = ("_open", "_pump", "outgoing", "pool", "upstream")

    def __init__(self, pool: Pool, upstream: Upstream, outgoing: Outgoing) -> None:
        self.upstream = upstream
        self.outgoing = outgoing
        self.pool = pool
        self._open = True
        self._pump: asyncio.Task[None] | None = None

    async def send(self) -> None:
        """Sends the request; returns when the head of the answer is there, or all of it where that is wiser."""
        upstream, outgoing = self.upstream, self.outgoing
        upstream.begin(bodiless=outgoing.method == "HEAD", upgrades=outgoing.upgrades)
        if outgoing.body is None:
            upstream.write(outgoing.head)
            self._pump = asyncio.get_running_loop().create_task(outgoing.pump(upstream))
        else:
            upstream.write(outgoing.head)
            if outgoing.body:
                upstream.write(outgoing.body)
            upstream.sent = True
        await upstream.head()
        if outgoing.repeatable and upstream.length is not None and upstream.length <= SMALL_ANSWER:
            await upstream.whole()

    def close(self) -> None:
        """Ends it: the connection is kept if the exchange is complete, and ended at once if not."""
        if not self._open:
            return
        self._open = False
        if self._pump is not None:
            self._pump.cancel()
        self.pool.give_back(self.upstream)
        self.pool.done()

    def keep(self) -> None:
        """The connection is somebody else's from now on; `done` ends the exchange."""
        self._open = False

    def done(self) -> None:
        """After `keep`: the replica has one request less."""
        self.pool.done()


@dataclass(slots=True)
class _Tries:
    """What was tried for one request."""

    deadline: float
    failed: set[UUID] = field(default_factory=set)
    fresh: bool = False
    sends: int = 0
    connects: int = 0


class Asking:
    """Finds replicas and asks them. One per server process."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._pools = Pools()

    async def ask(self, view: ServiceView, outgoing: Outgoing, *, tell: bool) -> Exchange:
        """The answer of a replica: at least its head is there.

        Args:
            view: the service.
            outgoing: the request.
            tell: whether a refusal may say what is known of the service: its log is not for everybody.

        Raises:
            Refusal: no replica has answered.
        """
        tries = _Tries(asyncio.get_running_loop().time() + READY_WAIT)
        while True:
            view, pool = await self._choose(view, tries, tell)
            exchange = await self._connected(view, pool, outgoing, tries)
            if exchange is not None and await self._answered(view, exchange, tries):
                return exchange

    async def _choose(self, view: ServiceView, tries: _Tries, tell: bool) -> tuple[ServiceView, Pool]:
        pool = self._pools.choose(view.ready, tries.failed)
        if pool is None:
            left = tries.deadline - asyncio.get_running_loop().time()
            if left > 0 and tries.connects < MOST_CONNECTS:
                view = await self._directory.wait_for_ready(view.run_id, left)
                # What is ready now was probed after it had failed.
                tries.failed.clear()
                pool = self._pools.choose(view.ready, ())
            if pool is None:
                raise _not_ready(view, tell)
        return view, pool

    async def _connected(self, view: ServiceView, pool: Pool, outgoing: Outgoing, tries: _Tries) -> Exchange | None:
        """A connection to that replica; `None` if there is none to be had."""
        tries.connects += 1
        try:
            upstream = await pool.take(repeatable=outgoing.repeatable, fresh=tries.fresh)
        except (OSError, AgentUnreachable) as error:
            pool.done()
            self._suspect(view, pool, tries, str(error))
            return None
        except BaseException:
            pool.done()
            raise
        return Exchange(pool, upstream, outgoing)

    async def _answered(self, view: ServiceView, exchange: Exchange, tries: _Tries) -> bool:
        """Whether it has answered. False: another replica may. Raises `Refusal` if none may."""
        tries.sends += 1
        try:
            await exchange.send()
            return True
        except Broken as broken:
            exchange.close()
            if broken.nonsense:
                raise _bad_answer(view, broken) from broken
            if exchange.upstream.reused:
                # It may have been closed for its age. Whether the replica is gone, a new connection will show.
                tries.fresh = True
            else:
                self._suspect(view, exchange.pool, tries, str(broken))
            if tries.sends >= MOST_SENDS or not exchange.outgoing.repeatable:
                raise _bad_answer(view, broken) from broken
            return False
        except BaseException:
            exchange.close()
            raise

    def _suspect(self, view: ServiceView, pool: Pool, tries: _Tries, reason: str) -> None:
        key = pool.replica.key
        log.info("Service %s/%s: replica %s is left out: %s", view.project, view.name, key, reason)
        tries.failed.add(key)
        self._directory.suspect(view.run_id, key)


def _not_ready(view: ServiceView, tell: bool) -> Refusal:
    lines = [f"No replica of the service '{view.name}' is ready. Try again in a moment."]
    if tell and view.problem:
        lines += ["", view.problem]
    elif not tell:
        lines.append("What keeps it from being ready is told to those who bring the server's token.")
    headers = [(b"retry-after", b"%d" % RETRY_AFTER)]
    return Refusal(503, "not_ready", "\n".join(lines), headers)


def _bad_answer(view: ServiceView, broken: Broken) -> Refusal:
    cure = (
        "Check that what listens on the service's `port` is a web server."
        if broken.nonsense
        else "The request may have been carried out, so it was not sent again. The log of the run may say more."
    )
    return Refusal(502, "bad_gateway", f"A replica of the service '{view.name}' failed: {broken}. {cure}")
