"""One machine: a container that boots, and what becomes of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Literal

from dstack_core.testing.fleet._docker import Engine, EngineError, MachineResult
from dstack_core.testing.fleet._network import Network

__all__ = ["Machine", "MachineState", "OnShutdown"]

MachineState = Literal["pending", "running", "stopped", "terminated"]
OnShutdown = Literal["stop", "terminate"]

# How systemd is told to power off, and how the kernel ends the first process when that asks for a reboot.
_POWER_OFF = "SIGRTMIN+4"
_REBOOTED = 129


class Machine:
    """A real machine: systemd, cloud-init and sshd in a container. Made by `Fleet.boot`.

    Safe to use from several threads.

    Attributes:
        name: its instance id and its first host name.
        address: its address, `127.0.1.N`; port 22 answers when sshd is up. Another machine may have it later.
    """

    def __init__(
        self,
        engine: Engine,
        container: str,
        name: str,
        address: str,
        *,
        on_shutdown: OnShutdown,
        network: Network,
        ended: Callable[[Machine], None],
    ) -> None:
        self.name = name
        self.address = address
        self._engine = engine
        self._container = container
        self._on_shutdown = on_shutdown
        self._network = network
        self._ended = ended
        self._changed = threading.Condition()
        self._state: MachineState = "pending"
        self._wanted: MachineState = "running"
        self._last_words = b""
        self._starts = 0
        self._life = threading.Thread(target=self._live, name=f"machine {name}", daemon=True)

    def __repr__(self) -> str:
        return f"<Machine {self.name} at {self.address}, {self.state}>"

    def begin(self) -> None:
        """Begins its life; for the fleet."""
        self._life.start()

    @property
    def state(self) -> MachineState:
        """What a cloud would say of it.

        `"running"` says that it is switched on, not that it has booted. Powering off from inside makes it `"stopped"`
        or `"terminated"`, as `on_shutdown` says; a reboot makes no difference.
        """
        return self._state

    @property
    def starts(self) -> int:
        """How often it was switched on or rebooted."""
        return self._starts

    def console(self) -> bytes:
        """All that appeared on its console so far, with the line ends of a terminal. It outlives the machine."""
        with self._changed:
            if self._state == "terminated":
                return self._last_words
        with contextlib.suppress(EngineError):
            return self._engine.log(self._container)
        return self._last_words

    # -- what a cloud does ------------------------------------------------------------------------------------------

    def stop(self, *, grace: float = 20) -> None:
        """Switches it off; disk, host keys and address stay. Returns when it is off.

        Args:
            grace: seconds that its system has to shut down.
        """
        self._end("stopped", grace)

    def start(self) -> None:
        """Switches it on again. Returns when it is on, and boots by itself.

        Raises:
            ValueError: it is not stopped.
        """
        with self._changed:
            if self._state != "stopped":
                raise ValueError(f"Only a machine that is stopped can be started; {self.name} is {self._state}")
            self._wanted = "running"
            self._changed.notify_all()
        self._until(lambda: self._state != "stopped", "to start")

    def reboot(self) -> None:
        """Asks its system to reboot, and returns when it does: disk, host keys and address stay.

        Raises:
            ValueError: it is not running.
        """
        self._must_run()
        before = self._starts
        # Systemd's signal for a reboot, which is what a cloud's button sends, too.
        self._engine.kill(self._container, "SIGRTMIN+5")
        self._until(lambda: self._starts > before or self._state != "running", "to reboot")

    def terminate(self, *, grace: float = 0) -> None:
        """Ends it for good, with its disk. Returns when it is gone. May be repeated.

        Args:
            grace: seconds that its system has to shut down.
        """
        self._end("terminated", grace)

    def kill(self) -> None:
        """The cloud takes it away, as it does with spot instances: no goodbye, whatever `on_shutdown` says."""
        self._end("terminated", 0)

    def cut(self) -> None:
        """Cuts it off from the network: packets are lost in both directions, so that what is connected hangs.

        Returns when it is in effect, which also outlasts a reboot.

        Raises:
            ValueError: it is not running.
        """
        self._must_run()
        self._network.cut(self.address, self._container)

    def mend(self) -> None:
        """Undoes `cut`. What is connected goes on as soon as either side repeats what was lost."""
        self._network.mend(self.address, self._container)

    # -- what tests need --------------------------------------------------------------------------------------------

    def run(self, *argv: str) -> MachineResult:
        """Runs a command as root on the machine, past its network and its sshd: for a look from inside.

        Raises:
            ValueError: it is not running.
        """
        self._must_run()
        return self._engine.run(self._container, *argv)

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Writes a file on its disk, as root. `/run` and other places that are not on the disk cannot be written to."""
        self._engine.put(self._container, {path: (content, mode)})

    # -- its life ---------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """From the first start to the end. The only thread that changes the state."""
        try:
            while self._once() and self._wait_for_start():
                pass
        except EngineError as error:
            self._last_words += f"\r\nThe container engine says: {error}\r\n".encode()
        self._network.forget(self.address, self._container)
        with contextlib.suppress(EngineError):
            self._last_words = self._engine.log(self._container) + self._last_words
        with contextlib.suppress(EngineError):
            self._engine.remove(self._container)
        self._become("terminated")
        self._ended(self)

    def _once(self) -> bool:
        """From on to off; whether it is stopped then."""
        while self._switch_on() and self._engine.wait(self._container) == _REBOOTED:
            pass
        wanted = self._wanted
        if wanted == "running":
            wanted = "stopped" if self._on_shutdown == "stop" else "terminated"
        return wanted == "stopped"

    def _switch_on(self) -> bool:
        """Starts it, unless somebody wants something else by now, who must not come in between."""
        with self._changed:
            if self._wanted != "running":
                return False
            self._engine.start(self._container)
            self._network.follow(self.address, self._container)
            self._starts += 1
            self._state = "running"
            self._changed.notify_all()
            return True

    def _wait_for_start(self) -> bool:
        """Stays off until somebody wants something; whether it shall run again."""
        with self._changed:
            if self._wanted == "running":
                self._wanted = "stopped"
            self._state = "stopped"
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted != "stopped")
            return self._is_wanted("running")

    def _is_wanted(self, state: MachineState) -> bool:
        return self._wanted == state

    def _become(self, state: MachineState) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _end(self, wanted: MachineState, grace: float) -> None:
        self._until(lambda: self._state != "pending", "to be switched on")
        with self._changed:
            if self._state in ("terminated", wanted):
                return
            self._wanted = wanted
            self._changed.notify_all()
        if grace > 0:
            self._power_off(grace)
        self._engine.kill(self._container)
        self._until(lambda: self._state in ("terminated", wanted), "to end")

    def _power_off(self, grace: float) -> None:
        """Presses the button, and waits for so long at most."""
        self._engine.kill(self._container, _POWER_OFF)
        with self._changed:
            self._changed.wait_for(lambda: self._state != "running", timeout=grace)

    def _must_run(self) -> None:
        if self._state != "running":
            raise ValueError(f"{self.name} is {self._state}, so there is nothing to do this to")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout=120):
                raise TimeoutError(f"{self} had 120 s {what}")
