"""Removes the machines of a fleet whose process is gone, however it went.

Each fleet holds a lock on a file of its own. A reaper, which is a process, waits for that lock; and whoever opens a
fleet looks for machines of others that nobody holds any more.

    python -m dstack_core.testing.fleet._reaper LOCK FLEET SOCKET
"""

from __future__ import annotations

import contextlib
import fcntl
import platform
import sys
import time
from pathlib import Path

from dstack_core.testing.fleet._docker import Engine, EngineError
from dstack_core.testing.fleet._network import link

LABEL = "dev.dstack.fleet"
LOCK = "dev.dstack.fleet.lock"
HOST = "dev.dstack.fleet.host"
ADDRESS = "dev.dstack.fleet.address"

_FOREIGN_FOR = 12 * 3600
"""Seconds after which containers that another host's processes made, by its name, are taken for left over."""


def labels(fleet: str, lock: Path) -> dict[str, str]:
    """What the containers of a fleet carry."""
    return {LABEL: fleet, LOCK: str(lock), HOST: platform.node()}


def reap(engine: Engine, fleet: str, lock: Path) -> None:
    """Ends all that a fleet has left: containers, and what is cut."""
    found = engine.containers(f"{LABEL}={fleet}")
    for address in _cut(lock):
        for container in found[:1]:
            with contextlib.suppress(EngineError):
                link(engine, labels(fleet, lock), container["Id"], "mend", address, "-")
    for container in found:
        with contextlib.suppress(EngineError):
            engine.remove(container["Id"])
    lock.unlink(missing_ok=True)


def reap_others(engine: Engine) -> None:
    """Ends what fleets have left whose process is gone, and whose reaper is, too."""
    for container in engine.containers(LABEL):
        fleet, lock = container["Labels"][LABEL], Path(container["Labels"].get(LOCK, "/-"))
        if container["Labels"].get(HOST) != platform.node():
            if time.time() - container["Created"] > _FOREIGN_FOR:
                reap(engine, fleet, lock)
        else:
            _reap_if_dead(engine, fleet, lock)


def _reap_if_dead(engine: Engine, fleet: str, lock: Path) -> None:
    """A lock that another user holds cannot be looked at; what matters is that it is there."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            reap(engine, fleet, lock)
    except FileNotFoundError:
        reap(engine, fleet, lock)
    except OSError:
        return


def _cut(lock: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return lock.read_text().split()
    return []


def main() -> None:
    """Waits for the lock."""
    lock, fleet, path = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    with contextlib.suppress(FileNotFoundError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reap(Engine(path), fleet, lock)


if __name__ == "__main__":
    main()
