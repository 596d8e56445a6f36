"""Which way leads to an agent: a socket of this computer, or SSH."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from dstack_core._models.instances import Endpoint
from dstack_core._transport.agent_protocol import AgentConnection, Said, Transport
from dstack_core._transport.local import LocalTransport

if TYPE_CHECKING:
    from dstack_core._transport.ssh import SshTransport


class Ways:
    """A `Transport` to agents of every kind of endpoint.

    Args:
        local: to those on this computer.
        ssh: makes the one to machines, when there is the first of them: its library takes its time to load.
    """

    def __init__(self, local: LocalTransport, ssh: Callable[[], SshTransport]) -> None:
        self._local = local
        self._make_ssh = ssh
        self._ssh: SshTransport | None = None

    def connect(self, endpoint: Endpoint) -> AgentConnection:
        """Cheap: nothing is sent before the first call."""
        return self._to(endpoint).connect(endpoint)

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """A connection to a port of the agent's machine. See `Transport`."""
        return await self._to(endpoint).open_port(endpoint, port)

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """Runs a command in a shell of a machine. See `Transport`."""
        return await self._to(endpoint).run(endpoint, command, data)

    async def aclose(self) -> None:
        """Closes all connections; the agents go on."""
        if self._ssh is not None:
            await self._ssh.aclose()

    def _to(self, endpoint: Endpoint) -> Transport:
        if endpoint.ssh_host is None:
            return self._local
        if self._ssh is None:
            self._ssh = self._make_ssh()
        return self._ssh
