"""Local ports: which ones a run wants, keeping them free for it, and who has them when they are not."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core.errors import AttachError, ConfigurationError, PortUsedError

if TYPE_CHECKING:
    from dstack_core._models.configurations import AnyConfiguration, AppSpec

HOST = "127.0.0.1"
FIRST_FREE_FOR_ALL = 1024
HIGHEST = 65535
WEB = 80
_LISTEN = "0A"

Wanted = tuple[int, int | None]
"""A port of the job, and the local port for it; `None` for any free one."""


def wanted_by(configuration: AnyConfiguration) -> list[Wanted]:
    """The ports that a configuration asks for."""
    ports = getattr(configuration, "ports", None) or [getattr(configuration, "port", None)]
    return [(port.container_port, port.local_port) for port in ports if port is not None]


def to_hold(configuration: AnyConfiguration) -> list[Wanted]:
    """Of the ports that a configuration asks for, those that are to be held from the submit on.

    The usual port of the web is merely wished for by a service, which is reached by its URL: see `with_free_ports`.
    """
    wanted = wanted_by(configuration)
    return [pair for pair in wanted if pair[1] != WEB] if configuration.type == "service" else wanted


def with_free_ports(wanted: Sequence[Wanted]) -> list[Wanted]:
    """The ports of a service, with any free local port in place of the usual one of the web if that cannot be had."""
    return [(port, None if local == WEB and not _can_have(WEB) else local) for port, local in wanted]


def _can_have(port: int) -> bool:
    try:
        listen(port).close()
    except (PortUsedError, ConfigurationError, AttachError):
        return False
    return True


def wanted_of(specs: Sequence[AppSpec]) -> list[Wanted]:
    """The ports that a job says should be forwarded."""
    return [(spec.port, spec.map_to_port) for spec in specs]


class PortReservation:
    """Local ports, held so that nobody else takes them until they are forwarded.

    Args:
        wanted: the ports.
        job_listens_here: the job may be a process of this computer, which then takes its ports itself: where the local
            port is the job's own, it is only looked whether it is free.

    Raises:
        PortUsedError: a wanted one is taken.
    """

    def __init__(self, wanted: Sequence[Wanted], *, job_listens_here: bool = False) -> None:
        self.ports: dict[int, int] = {}
        self._held: dict[int, socket.socket] = {}
        weakref.finalize(self, _close_all, self._held)
        try:
            # Those that are fixed come first, so that no free choice takes one of them.
            for port, local in sorted(wanted, key=lambda pair: pair[1] is None):
                self._reserve(port, local, job_listens_here)
        except BaseException:
            self.release()
            raise

    def _reserve(self, port: int, local: int | None, job_listens_here: bool) -> None:
        listener = listen(local, port) if local is not None else listen_from(port)
        number = listener.getsockname()[1]
        self.ports[port] = number
        if job_listens_here and number == port:
            listener.close()
        else:
            self._held[port] = listener

    def take(self, port: int) -> socket.socket | None:
        """The socket that holds the local port of this port of the job, if one does. The caller has to close it."""
        return self._held.pop(port, None)

    def release(self) -> None:
        """Lets go of all ports that were not taken."""
        _close_all(self._held)


def _close_all(held: dict[int, socket.socket]) -> None:
    while held:
        held.popitem()[1].close()


def listen(port: int, job_port: int | None = None) -> socket.socket:
    """A socket that listens on that local port; `job_port` is the one of the job, for what an error proposes.

    Raises:
        PortUsedError: it is taken.
        ConfigurationError: the system does not let this user have it.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Connections that ended lately must not count; sockets that listen do all the same.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise _refused(port, port if job_port is None else job_port, error) from error
    return listener


def _refused(port: int, job_port: int, error: OSError) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return PortUsedError(port, holder_of(port), job_port)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigurationError(
            f"Local port {port} may be used by root only. Map another one: ports=['{port + 8000}:{job_port}'], "
            f"or let one be picked: ports=['*:{job_port}']"
        )
    return AttachError(f"Local port {port} cannot be used: {error.strerror}")


def listen_from(port: int) -> socket.socket:
    """A socket that listens on that local port, or on the next one that is free."""
    while port <= HIGHEST:
        try:
            return listen(port)
        except PortUsedError:
            port += 1
        except ConfigurationError:
            port = max(port + 1, FIRST_FREE_FOR_ALL)
    return listen(0)


# --------------------------------------------------------------------------------------------------- who has a port


def holder_of(port: int) -> str | None:
    """Who listens on a local port, as `nginx (pid 812)`; `None` if the system does not tell."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, ValueError):
        sockets = {f"socket:[{inode}]" for inode in _listening(port)}
        return next((_described(process) for process in _processes() if _holds(process, sockets)), None)
    return None


def _listening(port: int) -> list[str]:
    inodes = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTEN:
                    inodes.append(fields[9])
    return inodes


def _processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit()]


def _holds(process: Path, sockets: set[str]) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()) in sockets:
                    return True
    return False


def _described(process: Path) -> str:
    return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
