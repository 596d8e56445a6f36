"""Machines that boot, for measuring: when their SSH server answered, and when a task's first byte arrived."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from benchmarks.ours import Home, new_home
from dstack_core.testing import Fleet, NimbusServer, wait_until

NIMBUS = Path(__file__).parent.parent / "tests" / "support" / "nimbus"
_LOOK = 0.005


class Doors:
    """Watches for the moment at which each machine's SSH server answers for the first time."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._stop = fleet, threading.Event()
        self.open_since: dict[str, float] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()
        for thread in self._threads.values():
            thread.join()

    def _look(self) -> None:
        while not self._stop.wait(_LOOK):
            for machine in self._fleet.machines:
                if machine.name not in self._threads:
                    thread = threading.Thread(target=self._knock, args=(machine.name, machine.address), daemon=True)
                    self._threads[machine.name] = thread
                    thread.start()

    def _knock(self, name: str, address: str) -> None:
        while not self._stop.wait(_LOOK):
            with suppress(OSError), socket.create_connection((address, 22), timeout=1) as connection:
                connection.settimeout(1)
                if connection.recv(4) == b"SSH-":
                    self.open_since[name] = time.time()
                    return


@contextmanager
def cloud_of_machines() -> Iterator[tuple[Home, Fleet]]:
    """A home whose server has a cloud of real machines.

    Raises:
        FleetUnavailable: there can be none on this computer; says why.
    """
    with Fleet.open() as fleet, NimbusServer(machines=fleet) as cloud, new_home(plugins=NIMBUS) as home:
        entry = {"type": "nimbus", **cloud.config()}
        config = {"projects": [{"name": "main", "backends": [entry]}]}
        (home.path / "dstack" / "server" / "config.yml").write_text(json.dumps(config))
        yield home, fleet
        # The server ends them, and is ended after that.
        wait_until(lambda: not any(server.billed for server in cloud.truth().servers), timeout=240, what="their end")


def seconds_added(home: Home, fleet: Fleet, at_once: int) -> list[float]:
    """Seconds from "SSH answers" to the first byte of the task, for each of some tasks that are submitted at once."""
    with Doors(fleet) as doors:
        first = home.run("machine.py", str(at_once))["first"]
        return [arrived - doors.open_since[name] for name, arrived in first.items()]
