"""Cuts machines off from the network, and mends it: packets are dropped, as when a cable is cut, and nobody is told.

Two things are cut: the loopback address, by rules of this computer's packet filter, and the machine's own cable, by
pulling its end on this computer. Both take the network of this computer, which a container of the machines' image has
that runs for a moment, so that nobody needs to be root who may use the engine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from dstack_core.testing.fleet._docker import Engine, EngineError

__all__ = ["Network", "link"]

_PROGRAM = "/usr/lib/fleet/link"


class Network:
    """What is cut now.

    Args:
        engine: where the machines are.
        labels: of the containers that are made.
        note: is told the addresses that are cut, whenever that changes, before the first packet is lost.
    """

    def __init__(self, engine: Engine, labels: dict[str, str], note: Callable[[list[str]], None]) -> None:
        self._engine = engine
        self._labels = labels
        self._note = note
        self._lock = threading.Lock()
        self._cut: set[str] = set()

    def cut(self, address: str, container: str) -> None:
        """No packet comes or goes any more."""
        with self._lock:
            self._cut.add(address)
            self._note(sorted(self._cut))
            link(self._engine, self._labels, container, "cut", address, self._cable(container))

    def mend(self, address: str, container: str) -> None:
        """As if nothing had been."""
        with self._lock:
            if address in self._cut:
                link(self._engine, self._labels, container, "mend", address, self._cable(container))
                self._cut.remove(address)
                self._note(sorted(self._cut))

    def follow(self, address: str, container: str) -> None:
        """The machine was switched on, with a new cable."""
        if address in self._cut:
            self.cut(address, container)

    def forget(self, address: str, container: str) -> None:
        """The machine is gone, and its address free for another one."""
        with contextlib.suppress(EngineError):
            self.mend(address, container)

    def _cable(self, container: str) -> str:
        """Number of this computer's end of the machine's cable; `-` while the machine is off."""
        try:
            result = self._engine.run(container, "cat", "/sys/class/net/eth0/iflink")
        except EngineError:
            return "-"
        return result.output.decode().strip() or "-"


def link(engine: Engine, labels: dict[str, str], container: str, *argv: str) -> None:
    """Runs the program of that name, of the image that the container has, in the network of this computer.

    Raises:
        EngineError: it failed.
    """
    host = {"NetworkMode": "host", "CapAdd": ["NET_ADMIN"]}
    spec = {"Image": engine.inspect(container)["Image"], "Cmd": [_PROGRAM, *argv], "Tty": True, "HostConfig": host}
    made = engine.create("", {**spec, "Labels": labels})
    try:
        engine.start(made)
        if code := engine.wait(made):
            said = engine.log(made).decode(errors="replace").strip()
            raise EngineError(0, f"'link {' '.join(argv)}' failed with {code}: {said}")
    finally:
        engine.remove(made)
