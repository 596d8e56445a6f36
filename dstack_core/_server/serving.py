"""Requests in and answers out: how the server listens, counts, and ends. Nothing here knows what a run is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dstack_core._server.auth import FRONT, LOCAL, NotAllowedError, Token
from dstack_core._server.protocol import Upgrades, server_protocol
from dstack_core._server.refusals import log_failure, no_such_route, refusal

log = logging.getLogger(__name__)

T = TypeVar("T")

OPEN_PATH = "/api/server/info"
"""The one path that needs no token."""
PATIENCE = 0.4
"""Seconds that open connections have to take their last bytes when the server stops."""
KEEP_ALIVE = 75
"""Seconds for which an idle connection stays open: longer than clients keep one, so that they close it first."""
SECOND_LOOK = 0.2
"""Seconds between the wish to exit for idleness and the exit: what waited in a suspended process comes first."""
LOOK_AGAIN = 30.0
"""Seconds between two looks whether a busy engine has become idle."""


class Life:
    """What the server is doing now, and whether it is asked to stop."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.in_flight = 0
        self.requests = 0
        self.last_request = asyncio.get_running_loop().time()

    def stop(self, why: str) -> None:
        """Asks the server to stop: open streams and long-polls are ended, runs are untouched."""
        if not self.stopping.is_set():
            log.info("Stopping: %s", why)
        self.stopping.set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts one request while it is being answered."""
        self.in_flight += 1
        self.requests += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.last_request = asyncio.get_running_loop().time()

    def idle_for(self) -> float:
        """Seconds since there was anything to answer."""
        return 0.0 if self.in_flight else asyncio.get_running_loop().time() - self.last_request


class Gate:
    """The outermost application: counts requests, and lets in only whom it should.

    Args:
        app: what answers.
        proxy: what answers under `proxied`, and decides by itself whom it lets in.
        proxied: how the paths of services begin.
        life: where requests are counted.
        token: what requests over TCP must bring. `None`: only requests over the unix socket get in.
    """

    def __init__(
        self, app: ASGIApp, proxy: ASGIApp, proxied: tuple[bytes, ...], life: Life, token: Token | None
    ) -> None:
        self._app = app
        self._proxy = proxy
        self._proxied = proxied
        self._life = life
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._life.request():
            if scope["raw_path"].startswith(self._proxied):
                await self._proxy(scope, receive, send)
                return
            if FRONT in scope["state"]:
                await no_such_route(404, scope["method"], scope["path"])(scope, receive, send)
                return
            try:
                self._admit(scope)
            except NotAllowedError as refused:
                await refusal(refused)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        if LOCAL in scope["state"] or scope["path"] == OPEN_PATH:
            return
        if self._token is None:
            raise NotAllowedError("This server answers on its unix socket only.")
        self._token.check(next((value for name, value in scope["headers"] if name == b"authorization"), None))


async def unless_ended(work: Awaitable[T], *ends: Awaitable[object]) -> T | None:
    """Waits for `work`, but not past the end of any of `ends`: then it cancels `work`, and the result is `None`."""
    task = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(end) for end in ends]
    try:
        await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for waiting in (task, *others):
            waiting.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has hung up. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """A body of unknown length, passed on as it comes and no faster than the client takes it.

    Ends early, and properly, when the server stops; closes its source when the client has gone.
    """

    def __init__(self, chunks: AsyncIterator[bytes], life: Life, headers: dict[str, str]) -> None:
        self._chunks = chunks
        self._life = life
        self.status_code = 200
        self.media_type = "application/octet-stream"
        self.background = None
        self.init_headers(headers)

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Sends it all."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await unless_ended(self._pump(send), disconnected(receive), self._life.stopping.wait())
        except Exception as exc:  # noqa: BLE001  # the status is sent already; the next request meets the error again
            log_failure("A stream broke off", exc)
        finally:
            await _close(self._chunks)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _close(chunks: AsyncIterator[bytes]) -> None:
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()


class Server(uvicorn.Server):
    """uvicorn without its ten wake-ups a second, and with an end that takes less than a second.

    Args:
        app: what answers.
        upgrades: what takes connections whose clients ask for another protocol.
        life: says when to stop.
        on_start: called when connections are accepted.
    """

    def __init__(
        self, app: ASGIApp, upgrades: Upgrades | None, life: Life, on_start: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(_settings(app, upgrades))
        self._life = life
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept."""
        await super().startup(sockets)
        await self._on_start()

    async def listen(self, listener: socket.socket) -> None:
        """Accepts connections of browsers of this computer, too."""
        protocol = self.config.http_protocol_class

        def connected() -> asyncio.Protocol:
            return protocol(config=self.config, server_state=self.server_state, app_state={FRONT: True})  # type: ignore[call-arg]  # as uvicorn makes its own

        self.servers.append(await asyncio.get_running_loop().create_server(connected, sock=listener))

    async def main_loop(self) -> None:
        """Sleeps until somebody asks to stop."""
        await self._life.stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets open requests end, for a moment; a client that does not take its bytes is cut off."""
        cut = asyncio.get_running_loop().call_later(PATIENCE, self._cut_off)
        await super().shutdown(sockets)
        cut.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT stops politely, the second one at once. A closed terminal means nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._life.stopping.is_set():
            os._exit(128 + number)
        self._life.stop(number.name)


def _settings(app: ASGIApp, upgrades: Upgrades | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=server_protocol(upgrades),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=2,
    )


async def stop_when_idle(
    life: Life, seconds: float | None, is_idle: Callable[[], Awaitable[bool]], is_ours: Callable[[], bool]
) -> None:
    """Stops the server when nothing was asked of it for that long (`None`: never) and the engine has nothing to do.

    Stops it as well when `is_ours` says that the home folder was taken away: nobody will ever find this server again.
    """
    limit = math.inf if seconds is None else seconds
    again = max(1.0, min(limit, LOOK_AGAIN))
    while is_ours():
        left = limit - life.idle_for()
        if left <= 0:
            if await _nothing_to_do(life, is_idle):
                life.stop(f"nothing to do for {limit:g} s")
                return
            left = again
        await asyncio.sleep(min(left, LOOK_AGAIN))
    life.stop("the home folder is gone, or belongs to another server")


async def _nothing_to_do(life: Life, is_idle: Callable[[], Awaitable[bool]]) -> bool:
    seen = life.requests
    await asyncio.sleep(SECOND_LOOK)
    try:
        idle = await is_idle()
    except Exception as exc:  # noqa: BLE001  # a database that is away for a moment is no reason to exit, nor to stop looking
        log_failure("Cannot see whether there is anything to do", exc)
        return False
    return idle and life.requests == seen
