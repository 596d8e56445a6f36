"""What `run.attach()` sets up: for each port of the run a local one, and what forwards between them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dstack_core._client.ports import PortReservation, Wanted, listen, listen_from

if TYPE_CHECKING:
    from dstack_core._client.forwarding import Forwarder
    from dstack_core._models.runs import JobProvisioningData


class Attachment:
    """The forwarded ports of a run whose job runs on this computer.

    A job that is a process here listens on its ports itself. Where such a port is the local one that was asked for,
    there is nothing to forward.

    Args:
        wanted: the ports.
        job: where the job is.
        reserved: local ports that were held for it.

    Raises:
        PortUsedError: a wanted local port is taken.
    """

    def __init__(self, wanted: Sequence[Wanted], job: JobProvisioningData, reserved: PortReservation | None) -> None:
        self.ports: dict[int, int] = {}
        self._forwarder: Forwarder | None = None
        self._listeners: dict[int, socket.socket] = {}
        self._reserved = reserved
        try:
            for port, local in wanted:
                self._open(port, local, job.ports.get(port, port))
            self._forward(job)
        except BaseException:
            self.close()
            raise

    def _open(self, port: int, local: int | None, target: int) -> None:
        if self._reserved is not None and port in self._reserved.ports:
            local, held = self._reserved.ports[port], self._reserved.take(port)
        else:
            local, held = (local if local is not None or target != port else target), None
        if local == target:
            # Forwarded, it would lead to itself.
            if held is not None:
                held.close()
            self.ports[port] = target
            return
        listener = held or (listen(local, port) if local is not None else listen_from(port))
        self._listeners[port] = listener
        self.ports[port] = listener.getsockname()[1]

    def _forward(self, job: JobProvisioningData) -> None:
        if not self._listeners:
            return
        from dstack_core._client.forwarding import Forward, Forwarder

        host = job.hostname or "127.0.0.1"
        self._forwarder = Forwarder(
            Forward(listener, host, job.ports.get(port, port)) for port, listener in self._listeners.items()
        )

    def close(self) -> None:
        """Gives the local ports back, and ends the connections that are open. May be called twice."""
        if self._forwarder is not None:
            self._forwarder.close()
        while self._listeners:
            self._listeners.popitem()[1].close()
