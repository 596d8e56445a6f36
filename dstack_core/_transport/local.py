"""Agents on this computer."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path

from dstack_core._home import socket_address
from dstack_core._models.instances import Endpoint
from dstack_core._transport.agent_client import AgentClient
from dstack_core._transport.agent_protocol import AgentUnreachable, Said

LOOPBACK = "127.0.0.1"


class LocalTransport:
    """Reaches agents through their unix sockets.

    Args:
        patience: seconds after which an agent that does not answer counts as unreachable.
    """

    def __init__(self, patience: float = 30.0) -> None:
        self._patience = patience

    def connect(self, endpoint: Endpoint) -> AgentClient:
        """Cheap: nothing is sent before the first call.

        Raises:
            ValueError: this is no endpoint on this computer.
        """
        path = endpoint.unix_socket
        if path is None:
            raise ValueError(f"{endpoint} has no unix socket")
        return AgentClient(lambda: _open(path), str(path), self._patience)

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """A connection to a port of this computer, from where it is reached by programs on it.

        Raises:
            AgentUnreachable: this is no endpoint on this computer.
            ConnectionRefusedError: nobody listens there. The other errors of a connection are `OSError`, too.
        """
        if endpoint.unix_socket is None:
            raise AgentUnreachable(f"{endpoint} is not on this computer: port {port} there cannot be reached.")
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(connection, (LOOPBACK, port))
            _refuse_itself(connection, port)
        except BaseException:
            connection.close()
            raise
        return connection

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:  # noqa: ARG002  # the protocol's
        """Agents on this computer are started by their backends.

        Raises:
            AgentUnreachable: always.
        """
        raise AgentUnreachable(f"{endpoint} is on this computer, where its backend starts the agent.")


def _refuse_itself(connection: socket.socket, port: int) -> None:
    """With a port from the range of outgoing connections the kernel may connect a socket to itself."""
    if connection.getsockname() == connection.getpeername():
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on port {port}")


async def _open(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await _connect(connection, socket_address(path))
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect(connection: socket.socket, address: str) -> None:
    """Unix sockets connect at once or not at all; "not now" means that others are waiting to be accepted."""
    pause = 0.001
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)
