"""Servers that really run: each is a folder of this computer, in which its command is a process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATIENCE = 10.0


class Hosts:
    """The processes of the servers.

    Args:
        folder: where each server gets a folder, which stays after its end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, server: str, order: Mapping[str, Any]) -> None:
        """Starts the order's command in a fresh folder.

        Raises:
            OSError: it cannot be started. `ValueError` and `IndexError`: it is none.
        """
        folder = self._folder / server
        folder.mkdir(mode=0o700, parents=True)
        with (folder / "console.log").open("wb") as log:
            # In our session: an agent begins one of its own, for which the leader of one has to give up its process.
            self._processes[server] = subprocess.Popen(
                order.get("command") or [], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def socket(self, server: str) -> str:
        """Where an agent that was started in the folder listens."""
        return str(self._folder / server / "agent.sock")

    def address(self, server: str) -> str | None:  # noqa: ARG002  # of machines
        """They have none of their own."""
        return None

    def console(self, server: str) -> str:
        """What its command printed."""
        path = self._folder / server / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def lives(self, server: str) -> bool:
        """Whether the process of a server still runs."""
        process = self._processes.get(server)
        return process is not None and process.poll() is None

    def end(self, server: str) -> None:
        """Asks the process to end."""
        process = self._processes.get(server)
        if process is not None and process.poll() is None:
            process.terminate()

    def close(self) -> None:
        """Ends all of them, and waits for it; what does not want to is killed."""
        for server in self._processes:
            self.end(server)
        for process in self._processes.values():
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
