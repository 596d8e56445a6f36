"""Servers that really boot: each is a machine of a fleet, which gets the user-data that was ordered."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from dstack_core.testing.fleet import Fleet, Machine


class Machines:
    """The machines of the servers.

    Args:
        fleet: where they come from.
        container_engine: they have one.
    """

    def __init__(self, fleet: Fleet, *, container_engine: bool = False) -> None:
        self._fleet = fleet
        self._container_engine = container_engine
        self._booted: dict[str, Machine] = {}

    def start(self, server: str, order: Mapping[str, Any]) -> None:
        """Boots one with the order's user-data.

        Raises:
            FleetUnavailable: there is no room for another.
        """
        text = str(order.get("user_data") or "")
        self._booted[server] = self._fleet.boot(text, name=server, container_engine=self._container_engine)

    def address(self, server: str) -> str | None:
        """Where its SSH server is, or will be."""
        return self._booted[server].address if server in self._booted else None

    def socket(self, server: str) -> str | None:
        """Nobody reaches an agent there but over SSH."""

    def console(self, server: str) -> str:
        """What appeared on its console, also when it is gone."""
        return self._booted[server].console().decode(errors="replace") if server in self._booted else ""

    def lives(self, server: str) -> bool:
        """Whether it is on, or about to be."""
        return server in self._booted and self._booted[server].state != "terminated"

    def end(self, server: str) -> None:
        """Has it ended, without waiting for that."""
        if server in self._booted:
            threading.Thread(target=self._booted[server].terminate, daemon=True).start()

    def close(self) -> None:
        """Ends all of them, and waits for it."""
        for machine in self._booted.values():
            machine.terminate()
