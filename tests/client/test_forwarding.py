"""Forwarding, between real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from dstack_core._client.forwarding import Forward, Forwarder
from dstack_core.testing import wait_until

Talk = Callable[[socket.socket], None]
TIMEOUT = 30


class Target:
    """A program that listens, and talks to each connection in a thread."""

    def __init__(self, talk: Talk) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._talk = talk
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._talk(connection)
            except OSError:
                return

    def close(self) -> None:
        """Stops listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


Start = Callable[[Talk], tuple[Forwarder, int]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a target and a forwarder to it; gives the forwarder and its local port."""
    opened: list[Forwarder | Target] = []

    def started(talk: Talk) -> tuple[Forwarder, int]:
        target = Target(talk)
        listener = socket.create_server(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        forwarder = Forwarder([Forward(listener, ("127.0.0.1", target.port))])
        opened.extend([forwarder, target])
        return forwarder, port

    yield started
    for one in opened:
        one.close()


def connect(port: int) -> socket.socket:
    """A connection to a local port."""
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)


def echo(connection: socket.socket) -> None:
    """Says back what it hears, as it hears it."""
    while piece := connection.recv(65536):
        connection.sendall(piece)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side ends."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_both_directions(start: Start) -> None:
    """What goes in comes out, on many connections at once."""
    _, port = start(echo)
    connections = [connect(port) for _ in range(20)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%d" % number)
    for number, connection in enumerate(connections):
        assert connection.recv(100) == b"%d" % number
        connection.close()


def test_the_end_of_one_direction_is_passed_on(start: Start) -> None:
    """A client that has said all, and says so, still hears the whole answer."""

    def count(connection: socket.socket) -> None:
        connection.sendall(b"%d bytes" % len(read_all(connection)))

    _, port = start(count)
    with connect(port) as connection:
        connection.sendall(b"x" * 1_000_000)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b"1000000 bytes"


def test_a_slow_reader_loses_nothing(start: Start) -> None:
    """32 MiB to a reader that starts late: all of it, in order."""
    payload = bytes(range(256)) * (1 << 17)

    def send(connection: socket.socket) -> None:
        connection.sendall(payload)

    _, port = start(send)
    with connect(port) as connection:
        assert connection.recv(1) == payload[:1]
        assert read_all(connection) == payload[1:]


def test_a_target_that_does_not_listen_ends_the_connection(start: Start) -> None:
    """As without forwarding: the connection ends, and the next one may work."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = gone.getsockname()[1]
    listener = socket.create_server(("127.0.0.1", 0))
    forwarder = Forwarder([Forward(listener, ("127.0.0.1", nobody))])
    try:
        with connect(listener.getsockname()[1]) as connection:
            assert connection.recv(1) == b""
    finally:
        forwarder.close()


def test_a_target_that_resets_ends_the_connection(start: Start) -> None:
    """A broken connection is not kept half open."""

    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    _, port = start(reset)
    with connect(port) as connection:
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            return


def test_closing_ends_everything(start: Start) -> None:
    """Open connections end, the port is free, the thread is gone; closing again does nothing."""
    forwarder, port = start(echo)
    connection = connect(port)
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    forwarder.close()
    assert connection.recv(1) == b""
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)
    wait_until(lambda: "dstack-attach" not in [t.name for t in threading.enumerate()], what="the end of the thread")
    forwarder.close()


def test_many_connections_leave_nothing_open(start: Start) -> None:
    """After 300 connections, one after the other, the forwarder holds none of them."""
    forwarder, port = start(echo)
    for _ in range(300):
        with connect(port) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
    wait_until(lambda: not forwarder._open, what="the end of all connections")
