"""The composer: puts the parts of the server together, runs them, takes them apart. Nothing else knows them all."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import importlib.metadata
import logging
import os
import platform
import resource
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._backends import BackendHub
from dstack_core._engine.engine import Engine
from dstack_core._engine.intents import ORPHAN_GRACE
from dstack_core._engine.repos import RepoService
from dstack_core._engine.seams import real_seams
from dstack_core._engine.service import PLAN_TIMEOUT
from dstack_core._models.server_config import DEFAULT_PROJECT
from dstack_core._models.wire import API_VERSION, ServerInfo
from dstack_core._server.auth import Token, stored_token
from dstack_core._server.code_routes import CodeApi
from dstack_core._server.doctor_routes import DoctorApi
from dstack_core._server.logfile import leave_terminal, warn_on_terminal
from dstack_core._server.proxy.access import Access
from dstack_core._server.proxy.app import PATHS, Proxy
from dstack_core._server.proxy.contract import Directory
from dstack_core._server.proxy.front import BrowserFront, Listen
from dstack_core._server.proxy.splice import ServiceUpgrades
from dstack_core._server.refusals import log_failure
from dstack_core._server.routes import Api, Backends, Routes, Service
from dstack_core._server.serving import Gate, Life, Server, stop_when_idle
from dstack_core._server.sockets import Lock, UnixListener, is_loopback, listen_tcp
from dstack_core._store import StoreError
from dstack_core._store.code import CodeStore
from dstack_core._store.logs import LogStore
from dstack_core._store.starts import Starts
from dstack_core._store.store import Store
from dstack_core._store.vault import Vault
from dstack_core._transport import LocalTransport, Ways, build_agent
from dstack_core._transport.keys import server_key
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._transport.ssh import SshTransport

log = logging.getLogger(__name__)

IDLE_SECONDS = 300.0
OPEN_FILES = 8192
COLLECT_SECONDS = 24 * 3600.0
IDLE_VARIABLE = "DSTACK_SERVER_IDLE_SECONDS"
DATABASE_VARIABLE = "DSTACK_DATABASE_URL"
GRACE_VARIABLE = "DSTACK_ORPHAN_GRACE_SECONDS"
SERVER_ORPHAN_GRACE, SHORTEST_GRACE = 3600.0, 300.0
"""Seconds. A machine is spoken to every minute, so less would end it for a hiccup."""
PLAN_VARIABLE = "DSTACK_PLAN_TIMEOUT_SECONDS"
LONGEST_PLAN = 50.0
"""Seconds. A client that has heard nothing for a minute gives up."""
KEY_VARIABLE = "DSTACK_SSH_KEY_FILE"
"""The server's own SSH key, if it is not `server/ssh/id_ed25519`: all servers of one database use the same."""
SWEEPER_VARIABLE = "DSTACK_SWEEPER"
"""`report`: instances that nobody claims are reported, and not ended. `on`, or not set: they are ended."""


@dataclass(frozen=True)
class Parts:
    """What the API needs of the parts that were put together."""

    service: Service
    backends: Backends
    is_idle: Callable[[], Awaitable[bool]]
    directory: Directory
    routes: tuple[Routes, ...] = ()


Compose = Callable[[Path], AbstractAsyncContextManager[Parts]]


@dataclass(frozen=True)
class Front:
    """How clients reach the server: always over the unix socket, and over TCP if there is a token."""

    unix: UnixListener
    tcp: socket.socket | None = None
    token: Token | None = None
    new_token: str | None = None

    def sockets(self) -> list[socket.socket]:
        """All that is listened on."""
        return [self.unix.socket] if self.tcp is None else [self.unix.socket, self.tcp]


def run(options: argparse.Namespace, home: Path, lock: Lock, unix: UnixListener, compose: Compose) -> None:
    """Serves until told to stop."""
    idle = _idle_seconds(options)
    front = Front(unix) if options.local else _tcp_front(options, home, unix)
    _allow_many_files()
    if options.local:
        _detach()
    else:
        warn_on_terminal()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(options.local, home, lock, front, idle, compose))


def _allow_many_files() -> None:
    """Each running job and each client takes a few descriptors; the usual limit (1,024; macOS: 256) is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _detach() -> None:
    """Depends no longer on the terminal and the folder in which this process was started."""
    # A handler, not SIG_IGN: the latter would be passed on to every job.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    os.chdir("/")


async def _serve(local: bool, home: Path, lock: Lock, front: Front, idle: float | None, compose: Compose) -> None:
    life = Life()
    info = _info(local, home)
    log.info("Starting: version %s, pid %d, Python %s in %s", info.version, info.pid, info.python, info.prefix)
    started = leave_terminal if local else lambda: _greet(home, front)
    async with compose(home) as parts:
        browsers = _Browsers(BrowserFront(home / "server" / "services.port") if local else None)
        server = _server(parts, life, info, front.token, browsers, started)
        watch = asyncio.create_task(stop_when_idle(life, idle, parts.is_idle, lock.is_ours))
        await browsers.look(parts.service)
        # What start-up made stays: the collector need not look at it ever again.
        gc.freeze()
        gc.enable()
        try:
            await server.serve(front.sockets())
        finally:
            watch.cancel()
            front.unix.remove()


def _server(
    parts: Parts, life: Life, info: ServerInfo, token: Token | None, browsers: _Browsers, started: Callable[[], None]
) -> Server:
    """Everything that answers, from the outside in: protocol, gate, and then the proxy or the API."""

    async def on_start() -> None:
        started()
        await browsers.start(server.listen)

    api = Api(parts.service, parts.backends, life, lambda: browsers.shown(info), browsers.open, parts.routes)
    proxy = Proxy(parts.directory, Access(token))
    gate = Gate(api.app(), proxy, PATHS, life, token)
    server = Server(gate, ServiceUpgrades(proxy, life), life, on_start)
    return server


class _Browsers:
    """When the port for browsers is opened: at start if there is a service, else when the first one is submitted."""

    def __init__(self, front: BrowserFront | None) -> None:
        self._front = front
        self._listen: Listen | None = None

    async def look(self, service: Service) -> None:
        """Reserves the port if there is a service already. A home that never had one is not looked at."""
        if self._front is not None and self._front.was_open and await _has_services(service):
            self._front.reserve()

    async def start(self, listen: Listen) -> None:
        """The server accepts connections: so does the port, if it was reserved."""
        self._listen = listen
        if self._front is not None and self._front.url is not None:
            await self._front.open(listen)

    async def open(self) -> None:
        """There is a service now."""
        if self._front is not None and self._listen is not None:
            await self._front.open(self._listen)

    def shown(self, info: ServerInfo) -> ServerInfo:
        """What the server says of itself, with the address of the port."""
        return info if self._front is None else info.model_copy(update={"services_url": self._front.url})


async def _has_services(service: Service) -> bool:
    runs = await service.list(DEFAULT_PROJECT, all=False, limit=1000)
    return any(run.run_spec.configuration.type == "service" and not run.status.is_finished for run in runs)


@contextlib.asynccontextmanager
async def composed(home: Path, *, local: bool = True) -> AsyncIterator[Parts]:
    """The real parts, started; stopped in the reverse order. Running jobs go on."""
    server_dir = home / "server"
    url = os.environ.get(DATABASE_VARIABLE)
    hub = BackendHub.open(server_dir / "config.yml")
    ways = Ways(LocalTransport(), lambda: _ssh(server_dir))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(ways.aclose)
        store = Store.open(url, server_dir / "server.db")
        stack.push_async_callback(store.close)
        logs = LogStore(server_dir / "logs")
        stack.push_async_callback(logs.aclose)
        code = CodeStore(server_dir / "code")
        stack.push_async_callback(code.aclose)
        engine = Engine(
            seams=real_seams(),
            store=store,
            logs=logs,
            code=code,
            vault=Vault(server_dir / "secret.key"),
            backends=hub,
            transport=ways,
            agent_pyz=build_agent(server_dir / "agent"),
            lease_owner=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
            # The database in the home folder is ours for as long as we hold its lock.
            alone=not url,
            kept=Starts(server_dir / "starts.json"),
            report_only=_report_only(),
            server_key=lambda: server_key(_key_file(server_dir)),
            orphan_grace=_orphan_grace(local),
            plan_timeout=_plan_timeout(),
        )
        stack.push_async_callback(engine.stop)
        await engine.start()
        tidy = asyncio.create_task(_collect_code(code, engine.repos))
        stack.push_async_callback(_ended, tidy)
        routes = (CodeApi(code, engine.repos), DoctorApi(engine.doctor))
        yield Parts(engine.service, engine.doctor, engine.is_idle, engine.directory, routes)


def _ssh(server_dir: Path) -> SshTransport:
    """The way to machines, imported when there is the first of them."""
    from dstack_core._transport.ssh import SshTransport

    return SshTransport(_key_file(server_dir))


def _key_file(server_dir: Path) -> Path:
    """Where the key is with which the machines let this server in."""
    given = os.environ.get(KEY_VARIABLE)
    return Path(given).expanduser() if given else server_dir / "ssh" / "id_ed25519"


async def _collect_code(code: CodeStore, repos: RepoService) -> None:
    """Removes code that nobody needs: now, and every day."""
    while True:
        try:
            # First the look at the runs: a run that comes later has asked for its code meanwhile.
            in_use = await repos.code_in_use()
            removed = await code.collect(datetime.now(UTC), in_use)
        except (OSError, StoreError) as exc:
            log_failure("Code that nobody needs could not be removed", exc)
        else:
            log.info("Removed %d pieces of code that nobody needs", removed)
        await asyncio.sleep(COLLECT_SECONDS)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _orphan_grace(local: bool) -> float:
    """How long a machine without a running job waits for a server to come back before it ends itself."""
    text = os.environ.get(GRACE_VARIABLE) or str(ORPHAN_GRACE if local else SERVER_ORPHAN_GRACE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_GRACE <= seconds < float("inf"):
        raise ConfigurationError(
            f"{GRACE_VARIABLE}={text} is not a number of seconds, {SHORTEST_GRACE:g} or more. "
            f"Example: {GRACE_VARIABLE}=3600"
        )
    return seconds


def _plan_timeout() -> float:
    """How long a plan waits for slow backends."""
    text = os.environ.get(PLAN_VARIABLE) or str(PLAN_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_PLAN:
        raise ConfigurationError(
            f"{PLAN_VARIABLE}={text} is not a number of seconds, more than 0 and at most {LONGEST_PLAN:g}. "
            f"Example: {PLAN_VARIABLE}={PLAN_TIMEOUT:g}"
        )
    return seconds


def _report_only() -> bool:
    """Whether the sweeper only says what it would end."""
    text = os.environ.get(SWEEPER_VARIABLE) or "on"
    if text not in ("on", "report"):
        raise ConfigurationError(f"{SWEEPER_VARIABLE}={text} is neither 'on' nor 'report'. Leave it out for 'on'.")
    return text == "report"


def _idle_seconds(options: argparse.Namespace) -> float | None:
    """How long a server with nothing to do stays. `None`: for ever."""
    if options.idle_exit is not None or not options.local:
        return options.idle_exit if options.idle_exit is None else float(options.idle_exit)
    text = os.environ.get(IDLE_VARIABLE) or str(IDLE_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigurationError(f"{IDLE_VARIABLE}={text} is not a number of seconds. Example: {IDLE_VARIABLE}=300")
    return seconds


def _tcp_front(options: argparse.Namespace, home: Path, unix: UnixListener) -> Front:
    new_token = None
    if options.token is not None:
        token = Token.of(options.token)
    else:
        token, new_token = stored_token(home / "server" / "token")
    return Front(unix, listen_tcp(options.host, options.port), token, new_token)


def _greet(home: Path, front: Front) -> None:
    """Tells the person in front of the terminal how to reach this server."""
    if front.tcp is None:
        return
    host, port = front.tcp.getsockname()[:2]
    everywhere = host in {"0.0.0.0", "::"}  # noqa: S104  # looks for it, does not bind it
    url = f"http://{_in_url(socket.gethostname() if everywhere else host)}:{port}"
    token = front.new_token or "<the token you set, or that was printed at the first start>"
    lines = [
        f"dstack server: listening on {url}, home {home}",
        "For clients, in ~/.dstack/config.yml:",
        "  projects:",
        "  - name: main",
        f"    url: {url}",
        f"    token: {token}",
        "    default: true",
    ]
    if front.new_token:
        lines.append("The token is shown only this once.")
    if not is_loopback(front.tcp):
        lines.append("Traffic is not encrypted: on a network that others use, put a proxy with TLS in front.")
    print("\n".join(lines), flush=True)  # noqa: T201  # what a person in front of a terminal is to read


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _info(local: bool, home: Path) -> ServerInfo:
    return ServerInfo(
        version=_version(),
        api=API_VERSION,
        pid=os.getpid(),
        local=local,
        home=str(home),
        prefix=sys.prefix,
        python=platform.python_version(),
        started_at=datetime.now(UTC),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("dstack-core")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        return importlib.import_module("uvloop").new_event_loop  # type: ignore[no-any-return]  # uvloop may be missing
    except ImportError:
        return asyncio.new_event_loop
