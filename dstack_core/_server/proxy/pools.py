"""The connections to each replica, kept for the next request, and which replica is next."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from uuid import UUID

from dstack_core._server.proxy.contract import Replica
from dstack_core._server.proxy.upstream import Upstream
from dstack_core._server.sockets import keep_alive

IDLE = 4.0
"""Seconds that a connection is kept without a request: web servers close theirs after 5, as a rule."""
YOUNG = 1.0
"""Seconds after which a connection is too old for a request that must not be sent twice."""
CONNECT_TIMEOUT = 10.0
"""Seconds that a connection to a replica may take."""


class Pool:
    """The connections to one replica.

    Attributes:
        replica: the replica.
        in_flight: how many requests, streams and WebSockets it has now.
        turn: when it last got one, counted in requests.
    """

    def __init__(self, replica: Replica, pools: Pools) -> None:
        self.replica = replica
        self.in_flight = 0
        self.turn = 0
        self._idle: list[Upstream] = []
        self._pools = pools
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, *, repeatable: bool, fresh: bool) -> Upstream:
        """A connection for one request; it must be given back.

        Args:
            repeatable: the request may be sent again if the connection turns out to be closed.
            fresh: none that was used before.

        Raises:
            OSError, AgentUnreachable: the replica cannot be reached.
        """
        while self._idle and not fresh:
            upstream = self._idle.pop()
            upstream.on_lost = None
            if not upstream.lost and (repeatable or self._loop.time() - upstream.idle_since < YOUNG):
                return upstream
            upstream.abort()
        return await self._connect()

    async def _connect(self) -> Upstream:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            connection = await self.replica.connect()
        try:
            keep_alive(connection)
            return await attach(connection)
        except BaseException:
            connection.close()
            raise

    def give_back(self, upstream: Upstream) -> None:
        """Keeps a connection for the next request if it can have one, else ends it."""
        if not upstream.reusable:
            upstream.abort()
            return
        upstream.on_lost = self._lost
        upstream.idle_since = self._loop.time()
        self._idle.append(upstream)
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE, self._expire)

    def done(self) -> None:
        """A request of this replica has ended."""
        self.in_flight -= 1
        self._pools.forget(self)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known here that anybody could miss."""
        return not self.in_flight and not self._idle

    def _lost(self, upstream: Upstream) -> None:
        with suppress(ValueError):
            self._idle.remove(upstream)
        self._pools.forget(self)

    def _expire(self) -> None:
        limit = self._loop.time() - IDLE
        # The one that was used last is at the end.
        while self._idle and self._idle[0].idle_since <= limit:
            upstream = self._idle.pop(0)
            upstream.on_lost = None
            upstream.abort()
        self._timer = None
        if self._idle:
            self._timer = self._loop.call_at(self._idle[0].idle_since + IDLE + 0.001, self._expire)
        self._pools.forget(self)


class Pools:
    """The pools of all replicas that have something to do."""

    def __init__(self) -> None:
        self._pools: dict[UUID, Pool] = {}
        self._turn = 0

    def choose(self, ready: Iterable[Replica], but: Collection[UUID]) -> Pool | None:
        """The replica with the fewest requests in flight, of equals the one that waits longest; counts one more."""
        candidates = [replica for replica in ready if replica.key not in but]
        if not candidates:
            return None
        replica = candidates[0] if len(candidates) == 1 else min(candidates, key=self._load)
        pool = self._pools.get(replica.key)
        if pool is None:
            pool = self._pools[replica.key] = Pool(replica, self)
        self._turn += 1
        pool.replica, pool.turn = replica, self._turn
        pool.in_flight += 1
        return pool

    def _load(self, replica: Replica) -> tuple[int, int]:
        pool = self._pools.get(replica.key)
        return (0, 0) if pool is None else (pool.in_flight, pool.turn)

    def forget(self, pool: Pool) -> None:
        """Drops a pool with nothing in it."""
        if pool.is_empty and self._pools.get(pool.replica.key) is pool:
            del self._pools[pool.replica.key]


async def attach(connection: socket.socket) -> Upstream:
    """Puts a connection under the care of the loop."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(loop)
    if connection.family == socket.AF_UNIX:
        await loop.create_unix_connection(lambda: upstream, sock=connection)
    else:
        await loop.create_connection(lambda: upstream, sock=connection)
    return upstream
