"""What `run.attach()` sets up: for each port of the run a local one, and what forwards between them."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dstack_core._client.ports import PortReservation, Wanted, listen, listen_from
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    from dstack_core._client.forwarding import Forwarder
    from dstack_core._client.ssh.config import Entry
    from dstack_core._client.ssh.login import Login
    from dstack_core._client.ssh.tunnel import Tunnel
    from dstack_core._models.runs import JobProvisioningData


class Attachment:
    """The forwarded ports of a run, from its making to `close`, or to the end of the connection.

    A job that is a process of this computer listens on its ports itself. Where such a port is the local one that was
    asked for, there is nothing to forward.

    Args:
        wanted: the ports.
        job: where the job is.
        reserved: local ports that were held for it.
        login: how its machine is logged in to; `None` if that is this computer.

    Attributes:
        ports: the local port for each port of the run.
        broken: why the connection is no more; `None` while all is well, and after `close`.

    Raises:
        PortUsedError: a wanted local port is taken.
        AttachError: its machine cannot be reached.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        job: JobProvisioningData,
        reserved: PortReservation | None,
        login: Login | None = None,
    ) -> None:
        self.ports: dict[int, int] = {}
        self.broken: str | None = None
        self._pid = os.getpid()
        self._closing = threading.Lock()
        self._forwarder: Forwarder | None = None
        self._entry: Entry | None = None
        self._tunnel: Tunnel | None = None
        self._listeners: dict[int, socket.socket] = {}
        self._reserved = reserved
        try:
            for port, local in wanted:
                self._open(port, local, job.ports.get(port, port) if login is None else None)
            if login is not None:
                # A program may end without a word.
                atexit.register(self.close)
                self._connect(login, job)
            self._forward(job)
            self._check()
        except BaseException:
            self.close()
            raise

    def _open(self, port: int, local: int | None, target: int | None) -> None:
        wished = local
        if self._reserved is not None and port in self._reserved.ports:
            local, held = self._reserved.ports[port], self._reserved.take(port)
        else:
            local, held = (local if local is not None or target != port else target), None
        if local is not None and local == target:
            # Forwarded, it would lead to itself.
            if held is not None:
                held.close()
            self.ports[port] = target
            return
        # Where any will do, one that was free at the submit, and not held for this run, may be another's by now.
        listener = held or (
            listen(wished, port) if wished is not None else listen_from(port if local is None else local)
        )
        self._listeners[port] = listener
        self.ports[port] = listener.getsockname()[1]

    def _connect(self, login: Login, job: JobProvisioningData) -> None:
        from dstack_core._client.ssh.config import Entry, user_folder
        from dstack_core._client.ssh.keys import ssh_folder
        from dstack_core._client.ssh.tunnel import Tunnel

        self._entry = Entry(ssh_folder(), user_folder(), login)
        targets = {port: job.ports.get(port, port) for port in self.ports}
        self._tunnel = Tunnel(login, targets, self._entry.folder, self._break)
        try:
            self._entry.publish()
        except OSError as error:
            warnings.warn(
                f"`ssh {login.name}` will not work: {error}. The ports of the run are forwarded all the same.",
                stacklevel=5,
            )

    def _forward(self, job: JobProvisioningData) -> None:
        if not self._listeners:
            return
        from dstack_core._client.forwarding import Forward, Forwarder

        host = job.hostname or "127.0.0.1"

        def place(port: int) -> tuple[str, int] | str:
            return self._tunnel.place(port) if self._tunnel else (host, job.ports.get(port, port))

        self._forwarder = Forwarder(Forward(listener, place(port)) for port, listener in self._listeners.items())

    def _check(self) -> None:
        """The connection may be gone already."""
        if self.broken is not None:
            raise AttachError(self.broken)

    def _break(self, reason: str) -> None:
        self.broken = reason
        self.close()

    def close(self) -> None:
        """Gives the local ports back, and ends the connections that are open. May be called twice."""
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            # A forked child ends: all of this is its parent's.
            return
        with self._closing:
            if self._forwarder is not None:
                self._forwarder.close()
            while self._listeners:
                self._listeners.popitem()[1].close()
            if self._tunnel is not None:
                self._tunnel.close()
            if self._entry is not None:
                self._withdraw(self._entry)

    def _withdraw(self, entry: Entry) -> None:
        try:
            entry.withdraw()
        except OSError as error:
            warnings.warn(f"What `ssh` was told about the run could not be taken back: {error}", stacklevel=4)
