"""What the server holds of the system: the lock of its home folder and the sockets it listens on."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import time
from pathlib import Path

from dstack_core._home import socket_address
from dstack_core.errors import ConfigurationError, DstackError

BACKLOG = 1024
HANDOVER = 10.0
"""Seconds to wait for a server that is on its way out."""


class AlreadyRunningError(DstackError):
    """Another server holds this home folder."""


class Lock:
    """The lock of a home folder, held until the process ends. It says which server is the one.

    Args:
        path: `server/server.lock`.
        address: the socket of the server, to tell one that runs from one that is on its way out.
    """

    def __init__(self, path: Path, address: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(address, time.monotonic() + HANDOVER)
        except BaseException:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _take(self, address: Path, deadline: float) -> None:
        while not self._try():
            if answers(address) or time.monotonic() > deadline:
                holder = os.pread(self._descriptor, 32, 0).decode().strip() or "unknown"
                raise AlreadyRunningError(
                    f"A server (pid {holder}) is already running for {self._path.parent.parent}. "
                    f"Use that one, stop it (kill {holder}; runs go on), or set DSTACK_HOME to another folder."
                )
            time.sleep(0.02)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_ours(self) -> bool:
        """False once the file at the path is no longer the one that is locked."""
        return _same_file(os.fstat(self._descriptor), self._path)

    def release(self) -> None:
        """Lets the next server in."""
        os.close(self._descriptor)


class UnixListener:
    """A listening unix socket that only its owner can reach. Needs the lock: what is at the path is then left over."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_socket():
            raise ConfigurationError(f"{path} is in the way of the server's socket. Move it elsewhere.")
        self._path = path
        # Listens before it has its name, so that a client never finds a socket that refuses.
        draft = path.with_name(f"{path.name}.new")
        draft.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(socket_address(draft))
        draft.chmod(0o600)
        self.socket.listen(BACKLOG)
        self._made = draft.stat()
        draft.replace(path)

    def remove(self) -> None:
        """Closes it, and removes it from the folder unless another server's is there by now."""
        self.socket.close()
        if _same_file(self._made, self._path):
            self._path.unlink(missing_ok=True)


def answers(path: Path) -> bool:
    """Whether a process accepts connections at that unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(socket_address(path))
        return True
    return False


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot listen on {host}, port {port}: {exc.strerror or exc}. Choose another one with --host and --port."
        ) from exc


def keep_alive(connection: socket.socket) -> None:
    """Has the kernel notice a peer that has vanished without a word, on a connection where nothing is said for long."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    options = [(idle, 30), (getattr(socket, "TCP_KEEPINTVL", None), 10), (getattr(socket, "TCP_KEEPCNT", None), 3)]
    for option, value in options:
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this computer can reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _same_file(known: os.stat_result, path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino)
