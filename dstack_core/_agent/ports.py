"""Where a service's process listens: on a port of the machine, which it may share with other jobs."""

from __future__ import annotations

import os
import time

from .lean import socket
from .spec import Failed
from .steps import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from .spec import Spec

VARIABLE = "PORT"
_PATIENCE = 3.0
"""Seconds for whoever had the service's own port before, and is just being killed, to let go of it."""
_REST = ("sleep", "0.1")
# Below what kernels take for outgoing connections, so that none of those gets in between.
_FIRST, _COUNT = 20000, 10000
_TRIES = 1000
_TAKEN = (
    "Port %d is taken on this machine. The service sets the variable PORT=%s itself, so it cannot be given another "
    "one. Remove PORT from `env` and have the program listen on the port that $PORT says, or end what uses the port."
)


def port_of(spec: Spec) -> Generator[Command, tuple[int, str], int]:
    """The port that the process of a service gets.

    Raises:
        Failed: the port that it has to have is taken.
    """
    port = int(spec.service_port or 0)
    if (spec.keep_port or VARIABLE in spec.env) and (yield from _gets_free(port)):
        return port
    if VARIABLE in spec.env:
        raise Failed("port_failed", _TAKEN % (port, spec.env[VARIABLE]))
    for _ in range(_TRIES):
        other = _FIRST + int.from_bytes(os.urandom(4), "big") % _COUNT
        if _is_free(other):
            return other
    raise Failed("port_failed", "No port of this machine is free, of %d looked at. End what uses them." % _TRIES)


def _gets_free(port: int) -> Generator[Command, tuple[int, str], bool]:
    deadline = time.monotonic() + _PATIENCE
    while not _is_free(port):
        if time.monotonic() > deadline:
            return False
        yield Command(_REST)
    return True


def _is_free(port: int) -> bool:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections that ended lately must not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen(1)
    except OSError:
        return False
    finally:
        listener.close()
    return True
