"""Agents on other machines, over SSH: one connection to each, on the event loop, without threads or processes.

A connection carries all that is said to its machine: each exchange with the agent, and each one with a port, is a
channel of it. It is made when it is first needed, made again when it broke, and closed when nobody has used it for a
while. A machine is who shows the key that is known; whoever shows another one is told nothing.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from dstack_core._models.instances import Endpoint, Way
from dstack_core._transport.agent_client import AgentClient
from dstack_core._transport.agent_protocol import AgentUnreachable, HostKeyRefused, Said
from dstack_core._transport.keys import server_key

AGENT_SOCKET = "/var/lib/dstack/agent.sock"
"""Where the agent of a machine listens."""

_LOOPBACK = "127.0.0.1"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two attempts to connect."""
_OpenFar = Callable[[asyncssh.SSHClientConnection, Callable[[], asyncssh.SSHForwarder]], Awaitable[object]]
# Its own words about each connection are for its authors.
logging.getLogger("asyncssh").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited for what, in seconds.

    Attributes:
        agent: for an agent's answer, beyond what it was asked to wait.
        connect: for a machine to accept a connection and to let the server in.
        keep_alive: between two looks whether a silent machine is still there; after three in vain it is not.
        linger: for which a connection that nobody uses is kept.
    """

    agent: float = 30.0
    connect: float = 15.0
    keep_alive: float = 10.0
    linger: float = 150.0


class SshTransport:
    """Reaches the agents of machines.

    Args:
        key_file: the server's own key; made when it is first needed.
        patience: how long is waited for what.
    """

    def __init__(self, key_file: Path, patience: Patience | None = None) -> None:
        self._key_file = key_file
        self._patience = patience or Patience()
        self._key: asyncssh.SSHKey | None = None
        self._machines: dict[Way, _Machine] = {}

    def connect(self, endpoint: Endpoint) -> SshAgent:
        """Cheap: nothing is sent before the first call."""
        return SshAgent(self._machine(endpoint), self._patience.agent)

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """A connection to a port of the machine, from where programs on it reach it.

        Raises:
            AgentUnreachable: there is no way to the machine.
            ConnectionRefusedError: nobody listens there.
        """
        machine = self._machine(endpoint)
        machine.hold()
        try:
            return await machine.open_port(port)
        finally:
            machine.let_go()

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """Runs a command in a shell of the machine, with `data` as its input.

        Raises:
            HostKeyRefused: another machine answers there than the one whose key is known.
            AgentUnreachable: there is no way to the machine, or it broke: the command may have run or not.
        """
        machine = self._machine(endpoint)
        machine.hold()
        try:
            return await machine.run(command, data)
        finally:
            machine.let_go()

    async def aclose(self) -> None:
        """Closes all connections. The agents go on."""
        machines = list(self._machines.values())
        self._machines.clear()
        for machine in machines:
            await machine.aclose()

    def _machine(self, endpoint: Endpoint) -> _Machine:
        way = endpoint if isinstance(endpoint, Way) else Way.to(endpoint)
        if way not in self._machines:
            self._machines[way] = _Machine(way, self._patience, self._connect, self._forget)
        return self._machines[way]

    def _forget(self, machine: _Machine) -> None:
        if self._machines.get(machine.way) is machine:
            del self._machines[machine.way]

    async def _connect(self, way: Way) -> asyncssh.SSHClientConnection:
        if self._key is None:
            self._key = asyncssh.import_private_key(server_key(self._key_file).private)
        return await asyncssh.connect(way.ssh_host or "", way.ssh_port, options=self._options(way))

    def _options(self, way: Way) -> asyncssh.SSHClientConnectionOptions:
        trusted = [asyncssh.import_public_key(key) for key in way.host_keys]
        return asyncssh.SSHClientConnectionOptions(
            username=way.ssh_user,
            client_keys=[self._key],
            known_hosts=(trusted, [], []),
            server_host_key_algs=["ssh-ed25519"],
            # Nothing that lies about on the server's computer has a say.
            config=None,
            agent_path=None,
            preferred_auth="publickey",
            gss_host=None,
            # AES with the processor's help: on this side, too, it is the fastest.
            encryption_algs=["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr"],
            compression_algs=["none"],
            connect_timeout=self._patience.connect,
            login_timeout=self._patience.connect,
            keepalive_interval=self._patience.keep_alive,
            keepalive_count_max=3,
        )


class SshAgent(AgentClient):
    """The agent of a machine. Goes on when the connection to the machine was lost and there is another."""

    def __init__(self, machine: _Machine, patience: float) -> None:
        super().__init__(machine.open_agent, f"{machine.name}:{AGENT_SOCKET}", patience)
        self._machine: _Machine | None = machine
        machine.hold()

    async def aclose(self) -> None:
        """Closes its channels; the agent goes on."""
        await super().aclose()
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.let_go()


class _Machine:
    """The one connection to a machine, if there is one now."""

    def __init__(
        self,
        way: Way,
        patience: Patience,
        connect: Callable[[Way], Awaitable[asyncssh.SSHClientConnection]],
        forget: Callable[[_Machine], None],
    ) -> None:
        self.way = way
        self.name = f"{way.ssh_user}@{way.ssh_host}:{way.ssh_port}"
        self._patience, self._connect, self._forget = patience, connect, forget
        self._connection: asyncssh.SSHClientConnection | None = None
        self._attempt: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._failures, self._not_before = 0, 0.0
        self._why: AgentUnreachable | None = None
        self._users = 0
        self._end: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------------- who uses it --

    def hold(self) -> None:
        """Somebody may use it."""
        self._users += 1
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def let_go(self) -> None:
        """Somebody will not use it any more."""
        self._users -= 1
        if not self._users:
            self._end = asyncio.get_running_loop().call_later(self._patience.linger, self._unused)

    def _unused(self) -> None:
        self._forget(self)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._end is not None:
            self._end.cancel()
        if self._attempt is not None:
            self._attempt.cancel()
        if self._connection is not None:
            self._connection.close()

    async def aclose(self) -> None:
        """Ends the connection, and waits for that."""
        self._hang_up()
        if self._attempt is not None:
            await asyncio.gather(self._attempt, return_exceptions=True)
        if self._connection is not None:
            await self._connection.wait_closed()

    # --------------------------------------------------------------------------------------------------- what for --

    async def open_agent(self) -> socket.socket:
        """A new channel to the agent's socket, as a socket of this computer."""
        return await self._channel(
            lambda connection, far: connection.create_unix_connection(far, AGENT_SOCKET),  # type: ignore[arg-type]  # as it does
            "no agent listens",
        )

    async def open_port(self, port: int) -> socket.socket:
        """A new channel to a port of the machine, as a socket of this computer."""
        return await self._channel(
            lambda connection, far: connection.create_connection(far, _LOOPBACK, port),  # type: ignore[arg-type]  # as it does
            f"nobody listens on port {port} of {self.name}",
        )

    async def run(self, command: str, data: bytes) -> Said:
        """Runs a command."""
        connection = await self._connected()
        try:
            done = await connection.run(command, input=data, encoding=None, check=False)
        except (asyncssh.Error, OSError) as error:
            raise AgentUnreachable(f"The connection to {self.name} broke ({_words(error)}).") from error
        if done.returncode is None:
            raise AgentUnreachable(f"The connection to {self.name} broke before a command had ended.")
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return Said(code, _bytes(done.stdout), _bytes(done.stderr))

    async def _channel(self, open_far: _OpenFar, refused: str) -> socket.socket:
        connection = await self._connected()
        ours, near = await _pair()
        try:
            await open_far(connection, lambda: asyncssh.SSHForwarder(near))
        except BaseException as error:
            ours.close()
            near.close()
            if isinstance(error, asyncssh.ChannelOpenError) and not connection.is_closed():
                raise ConnectionRefusedError(errno.ECONNREFUSED, refused) from error
            if isinstance(error, (asyncssh.Error, OSError)):
                raise AgentUnreachable(f"The connection to {self.name} broke ({_words(error)}).") from error
            raise
        return ours

    # ------------------------------------------------------------------------------------------------- connecting --

    async def _connected(self) -> asyncssh.SSHClientConnection:
        """The connection; whoever asks while it is being made waits for the same one.

        Raises:
            AgentUnreachable: it cannot be made, or could not a moment ago.
        """
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._attempt is None:
            if self._why is not None and asyncio.get_running_loop().time() < self._not_before:
                raise self._why.with_traceback(None)
            self._attempt = asyncio.create_task(self._make())
            # Should nobody wait for it any more.
            self._attempt.add_done_callback(lambda attempt: attempt.cancelled() or attempt.exception())
        return await asyncio.shield(self._attempt)

    async def _make(self) -> asyncssh.SSHClientConnection:
        try:
            self._connection = await self._connect(self.way)
        except (asyncssh.Error, OSError, TimeoutError) as error:
            self._why = self._reason(error)
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._failures, 10))
            self._failures += 1
            self._not_before = asyncio.get_running_loop().time() + pause
            raise self._why from error
        else:
            self._failures, self._why = 0, None
            return self._connection
        finally:
            self._attempt = None

    def _reason(self, error: Exception) -> AgentUnreachable:
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return HostKeyRefused(
                f"At {self.name} a machine answers whose host key is not the one that was pinned. Nothing was sent to "
                "it: its address may have gone to another machine, or somebody is in between."
            )
        if isinstance(error, asyncssh.PermissionDenied):
            return AgentUnreachable(f"{self.name} does not let the server's key in (yet).")
        return AgentUnreachable(f"{self.name} cannot be reached over SSH ({_words(error)}).")


async def _pair() -> tuple[socket.socket, asyncssh.SSHForwarder]:
    """Two ends that are connected: a socket, and what passes its bytes on to a channel."""
    ours, theirs = socket.socketpair()
    near = asyncssh.SSHForwarder()
    try:
        ours.setblocking(False)
        theirs.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: near, sock=theirs)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    return ours, near


def _bytes(output: bytes | str | None) -> bytes:
    return output if isinstance(output, bytes) else (output or "").encode()


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
