"""The whole of Nimbus as one object: the server, what goes wrong in it, and the truth about it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dstack_core.plugin import Offer
from dstack_core.testing._clouds import Event, Failure, Fault, Truth
from dstack_core.testing.nimbus._catalogue import TYPES
from dstack_core.testing.nimbus._cloud import Cloud
from dstack_core.testing.nimbus._faults import Faults
from dstack_core.testing.nimbus._hosts import Hosts
from dstack_core.testing.nimbus._http import Listener

if TYPE_CHECKING:
    from dstack_core.testing.fleet import Fleet
    from dstack_core.testing.nimbus._machines import Machines

_LISTENING = 0.01


class NimbusServer:
    """A Nimbus cloud on a port of this computer, in threads of this process. A context manager.

    As a cloud under test it has every ability that `BackendSuite` knows.

    Args:
        boot: seconds until a server runs.
        shutdown: seconds that a server's end takes.
        token: what clients have to send; a random one if not set.
        port: where to listen; a free port if not set.
        agents: a folder in which servers really run, each as a process that is its `command`, so that a backend can
            hand a real task to it. If neither this nor `machines` is set, servers only seem to run.
        machines: a fleet whose machines the servers are: they boot with their `user_data`, have a console, and end when
            they power themselves off. Ended with this cloud; the fleet stays.
        container_engine: the machines have one.

    Attributes:
        url: where it is, without a path.
        token: what clients have to send.
    """

    def __init__(
        self,
        *,
        boot: float = 0.05,
        shutdown: float = 0.05,
        token: str | None = None,
        port: int = 0,
        agents: Path | None = None,
        machines: Fleet | None = None,
        container_engine: bool = False,
    ) -> None:
        self.token = token or f"nimbus-{secrets.token_hex(16)}"
        self._hosts = _hosts(agents, machines, container_engine)
        self._cloud = Cloud(boot, shutdown, self._hosts)
        self._faults = Faults()
        self._listener = Listener(self._cloud, self._faults, self.token, port)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(_LISTENING,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._faults.heal()
        self._listener.close()
        self._thread.join()
        if self._hosts is not None:
            self._hosts.close()

    def config(self) -> dict[str, Any]:
        """The backend's configuration for this cloud: `url` and `token`."""
        return {"url": self.url, "token": self.token}

    def truth(self) -> Truth:
        """See `Truthful`."""
        return self._cloud.truth()

    def catalogue(self) -> Sequence[Offer]:
        """See `Catalogued`."""
        return [offer for machine in TYPES.values() for offer in machine.offers()]

    def fail(self, kind: Fault, times: int = 1, *, after: bool = False, skip: int = 0) -> Failure:
        """See `Faulty`. Throttling and shortages come with `Retry-After`, in seconds."""
        return self._faults.order(Fault(kind), times, after=after, skip=skip)

    def heal(self) -> None:
        """See `Faulty`."""
        self._faults.heal()

    def lag(self, seconds: float) -> None:
        """See `Lagging`."""
        self._cloud.lag = seconds

    def stock(self, count: int) -> None:
        """See `Stocked`."""
        self._cloud.stock(count)

    def boot(self, seconds: float) -> None:
        """See `Booting`."""
        self._cloud.boot = seconds

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful`."""
        self._cloud.befall(server, event)

    def unmark(self, server: str) -> None:
        """See `Unmarking`."""
        self._cloud.unmark(server)

    def calls(self) -> int:
        """See `Counting`."""
        return self._listener.calls


def _hosts(agents: Path | None, fleet: Fleet | None, container_engine: bool) -> Hosts | Machines | None:
    if fleet is not None:
        from dstack_core.testing.nimbus._machines import Machines

        return Machines(fleet, container_engine=container_engine)
    return Hosts(agents) if agents is not None else None


NimbusServer.__module__ = "dstack_core.testing"
