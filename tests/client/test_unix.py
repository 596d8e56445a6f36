"""HTTP over a unix socket: how answers are framed, when a connection is used again, and what a broken one is called."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from dstack_core._client.unix import UnixTransport

EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Peer:
    """A server that says the next of its answers, byte for byte, to each request; `None` hangs up.

    Attributes:
        asked: the heads of the requests.
        bodies: what came with them.
        connections: how many there were.
    """

    def __init__(self, address: Path) -> None:
        self.asked: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.answers: list[bytes | None] = []
        self.http = httpx.Client(transport=UnixTransport(str(address), httpx.Limits()), base_url="http://server")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self.http.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection, connection.makefile("rb") as read, contextlib.suppress(ConnectionError):
                    while self._answer(connection, read.readline):
                        pass

    def _answer(self, connection: socket.socket, line: Callable[[], bytes]) -> bool:
        """Reads one request, whose body is lines, and answers it; false to hang up."""
        head = b"".join(_lines(line, b"\r\n"))
        if not head:
            return False
        self.asked.append(head)
        self.bodies.append(b"".join(_lines(line, b"end\n")) if b"POST" in head else b"")
        answer = self.answers.pop(0)
        if answer is None:
            return False
        connection.sendall(answer)
        return b"close" not in answer and b"HTTP/1.0" not in answer


def _lines(line: Callable[[], bytes], end: bytes) -> Iterator[bytes]:
    while (one := line()) not in {b"", end}:
        yield one


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A scripted server, and a client of it."""
    with tempfile.TemporaryDirectory(prefix="dstack-unix-") as folder:
        server = Peer(Path(folder) / "s")
        yield server
        server.close()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\n",
            b"hello world",
        ),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-more: 1\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["length", "after a 100", "chunks", "trailers", "until the end", "none"],
)
def test_an_answer_is_read_to_its_end(peer: Peer, answer: bytes, body: bytes) -> None:
    """However it says where that is."""
    peer.answers = [answer]
    assert peer.http.get("/").content == body


def test_large_answers_come_whole(peer: Peer) -> None:
    """In pieces that are not those in which they were sent."""
    data = bytes(range(256)) * 8192
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (data[:7], data[7:1000000], data[1000000:]))
    peer.answers = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"]
    with peer.http.stream("GET", "/") as answer:
        assert b"".join(answer.iter_raw()) == data


def test_a_connection_is_used_again_after_an_answer_was_read(peer: Peer) -> None:
    """Also after one in chunks; but not when the answer says that it ends."""
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    last = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    peer.answers = [EMPTY, chunked, last, EMPTY]
    for _ in range(4):
        peer.http.get("/")
    assert peer.connections == 2


def test_an_answer_that_is_not_read_ends_its_connection(peer: Peer) -> None:
    """The next request must not find the rest of it."""
    peer.answers = [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", EMPTY]
    with peer.http.stream("GET", "/"):
        pass
    assert peer.http.get("/").content == b""
    assert peer.connections == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhel", httpx.RemoteProtocolError),
        (b"SSH-2.0-OpenSSH close\r\n\r\n", httpx.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            httpx.RemoteProtocolError,
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-length: five\r\nconnection: close\r\n\r\n", httpx.RemoteProtocolError),
    ],
    ids=["none", "half", "no HTTP", "no chunk", "no length"],
)
def test_a_broken_answer_is_an_error_of_the_transport(
    peer: Peer, answer: bytes | None, error: type[httpx.TransportError]
) -> None:
    """So that the request is tried again, as with every other transport."""
    peer.answers = [answer]
    with pytest.raises(error):
        peer.http.get("/")


def test_a_silent_server_is_a_timeout(peer: Peer) -> None:
    """That of reading: the connection stood."""
    peer.answers = [b"HTTP/1.1 200 OK\r\n"]
    with pytest.raises(httpx.ReadTimeout):
        peer.http.get("/", timeout=0.1)


def test_a_body_of_unknown_length_is_sent_in_chunks(peer: Peer) -> None:
    """As code is, of which there may be more than fits into memory."""
    peer.answers = [EMPTY]
    peer.http.post("/", content=iter([b"one\n", b"", b"end\n"]))
    assert b"transfer-encoding: chunked" in peer.asked[0].lower()
    assert peer.bodies == [b"4\r\none\n\r\n4\r\n"]


def test_a_body_of_known_length_is_sent_as_it_is(peer: Peer) -> None:
    """Together with its head."""
    peer.answers = [EMPTY]
    peer.http.post("/", content=b"one\nend\n")
    assert b"content-length: 8" in peer.asked[0].lower()
    assert peer.bodies == [b"one\n"]


def test_no_header_can_smuggle_another(peer: Peer) -> None:
    """A line break in one is refused before anything is sent."""
    with pytest.raises(httpx.LocalProtocolError):
        peer.http.get("/", headers={"x-name": "a\r\nx-other: b"})
    assert peer.asked == []
