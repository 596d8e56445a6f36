"""The port for browsers of a local server: opened when there is a service, on this computer, for pages of its own."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from dstack_core._server.proxy.front import BrowserFront
from tests.server.conftest import ServerProcess, address
from tests.support.upstreams import LoopThread, Replica, Seen, respond

SERVICE: dict[str, object] = {"configuration": {"type": "service", "commands": ["serve"], "port": 80}, "profile": {}}
TASK: dict[str, object] = {"configuration": {"type": "task", "commands": ["true"]}, "profile": {}}


def submit(server: Any, spec: dict[str, object] = SERVICE, name: str = "web") -> str | None:
    """Submits a run; the address for browsers that the server shows afterwards."""
    with server.client() as client:
        body = {"run_spec": {**spec, "run_name": name}, "submit_key": "01890000-0000-7000-8000-000000000001"}
        client.post("/api/project/main/runs/submit", json=body).raise_for_status()
        return client.get("/api/server/info").json()["services_url"]  # type: ignore[no-any-return]  # JSON


def describe(home: Path, **services: dict[str, object]) -> None:
    """Says which services there are."""
    draft = home / "services.json.new"
    draft.write_text(json.dumps(services))
    draft.replace(home / "services.json")


@pytest.fixture(scope="module")
def local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, str]]:
    """A local server that has had a service, and its address for browsers."""
    server = ServerProcess(tmp_path_factory.mktemp("local") / "home", "--local").wait_up()
    url = submit(server)
    assert url
    yield server, url
    server.kill()


@pytest.fixture
def front(local_server: tuple[ServerProcess, str], loop: LoopThread) -> tuple[str, Replica]:
    """The address for browsers of a local server with a service `web`, and its replica."""
    server, url = local_server
    replica = Replica(loop, respond())
    describe(server.home, web={"ports": [replica.port], "auth": True})
    return url, replica


def test_opened_by_the_first_service(server: Any) -> None:
    """A server that never had a service listens on no port; with the first one it does, on this computer only."""
    assert submit(server, TASK, "task") is None
    assert not listening(server.process.pid)
    url = submit(server)
    assert url
    assert listening(server.process.pid) == [("127.0.0.1", urlsplit(url).port)]
    assert submit(server, name="another") == url


def listening(pid: int) -> list[tuple[str, int]]:
    """Where a process accepts TCP connections."""
    own = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    found = []
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                found.append((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "localhost:80"])
def test_service(front: tuple[str, Any], host: str) -> None:
    """A browser of this computer needs no token, whichever name of this computer it uses."""
    url, replica = front
    headers = {"host": host.format(port=urlsplit(url).port), "authorization": "Bearer theirs"}
    assert httpx.get(f"{url}/services/main/web/a", headers=headers, timeout=60).text == "ok"
    assert replica.seen[0].header("authorization") == "Bearer theirs"


@pytest.mark.parametrize(
    "path",
    ["/", "/api/server/info", "/api/project/main/runs/list", "/services", "/services/../api/server/info"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_but_services(front: tuple[str, Any], method: str, path: str) -> None:
    """Nothing of the API is behind this port."""
    with socket.create_connection((urlsplit(front[0]).hostname, urlsplit(front[0]).port), timeout=60) as connection:
        head = "Host: localhost\r\nContent-Length: 2\r\n\r\n{}"
        connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.test"},
        {"host": "evil.test:{port}"},
        {"host": "127.0.0.1.evil.test"},
        {"host": "localhost.evil.test"},
        {"host": "localhost@evil.test"},
        {"host": "0.0.0.0:{port}"},
        {"host": "[::2]"},
        {"host": ""},
        {"origin": "http://evil.test"},
        {"origin": "https://localhost.evil.test"},
        {"origin": "null"},
        {"origin": "file://"},
    ],
)
@pytest.mark.parametrize("path", ["/services/main/web/", "/models/main/models"])
def test_foreign_page(front: tuple[str, Any], headers: dict[str, str], path: str) -> None:
    """A page of another site reaches no service, neither by a name that it points at this computer nor by a form."""
    url, replica = front
    headers = {name: value.format(port=urlsplit(url).port) for name, value in headers.items()}
    answer = httpx.post(url + path, headers=headers, timeout=60)
    assert answer.status_code == 403
    assert not replica.seen


@pytest.mark.parametrize(("origin", "status"), [("http://evil.test", 403), ("null", 403), ("http://localhost:51", 101)])
def test_websocket_of_a_page(front: tuple[str, Any], local_server: Any, loop: Any, origin: str, status: int) -> None:
    """A page of another site opens no WebSocket; one that is served from this computer does."""

    async def agrees(request: Seen) -> None:
        key = str(request.header("sec-websocket-key")) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
        head = f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        await request.answer(f"HTTP/1.1 101 Switching Protocols\r\n{head}".encode())
        await request.reader.read()

    replica = Replica(loop, agrees)
    describe(local_server[0].home, ws={"ports": [replica.port], "auth": True})
    url = front[0].replace("http", "ws") + "/services/main/ws/"
    if status == 101:
        with connect(url, origin=Origin(origin), proxy=None, close_timeout=0):
            assert replica.seen
    else:
        with pytest.raises(InvalidStatus) as refused, connect(url, origin=Origin(origin), proxy=None):
            pass
        assert refused.value.response.status_code == status
        assert not replica.seen


def end(server: ServerProcess) -> None:
    """Kills a server, and takes away its socket: what is there next is that of the next server."""
    server.kill()
    server.socket.unlink()


def test_port_survives_a_restart(server: Any, start: Any) -> None:
    """After a restart a service has the address that it had; the port is not opened where there is none any more."""
    url = submit(server)
    end(server)
    (server.home / "runs.json").write_text(json.dumps(["web"]))
    again = start().wait_up()
    with again.client() as client:
        assert client.get("/api/server/info").json()["services_url"] == url
    end(again)
    (server.home / "runs.json").unlink()
    once_more = start().wait_up()
    with once_more.client() as client:
        assert client.get("/api/server/info").json()["services_url"] is None
    assert submit(once_more) == url


def test_port_that_is_taken(server: Any, start: Any) -> None:
    """Where another program has taken the port meanwhile, another one is used, and kept."""
    url = submit(server)
    end(server)
    file = server.home / "server" / "services.port"
    with socket.create_server(("127.0.0.1", int(str(urlsplit(url).port)))):
        again = start().wait_up()
        other = submit(again)
    assert other != url
    assert file.read_text() == f"{urlsplit(other).port}\n"


@pytest.mark.parametrize("kept", ["", "x", "0", "70000", "-1", "22222222222222"])
def test_damaged_file(tmp_path: Path, kept: str) -> None:
    """A file that holds no port is replaced."""
    file = tmp_path / "services.port"
    file.write_text(kept)
    front = opened(file)
    assert front.url == f"http://127.0.0.1:{int(file.read_text())}"


def opened(file: Path) -> BrowserFront:
    """A front that has its port, though nobody answers there."""

    async def listen(listener: socket.socket) -> None:
        listener.close()

    async def work() -> BrowserFront:
        front = BrowserFront(file)
        await asyncio.gather(front.open(listen), front.open(listen))
        return front

    return asyncio.run(work())


def test_ten_homes(tmp_path: Path) -> None:
    """Ten homes that open their ports at the same time each have their own, whatever they kept."""
    listeners: list[socket.socket] = []

    async def listen(listener: socket.socket) -> None:
        await asyncio.sleep(0)
        listeners.append(listener)

    async def work() -> list[str | None]:
        fronts = [BrowserFront(tmp_path / str(number) / "services.port") for number in range(10)]
        for front in fronts:
            front._file.parent.mkdir()
            front._file.write_text("23456")
        await asyncio.gather(*(front.open(listen) for front in fronts))
        return [front.url for front in fronts]

    urls = asyncio.run(work())
    assert [urlsplit(url).port for url in urls] == [listener.getsockname()[1] for listener in listeners]
    assert len(set(urls)) == 10
    for listener in listeners:
        listener.close()


def test_no_port_on_tcp(start: Any) -> None:
    """A server on TCP serves its services there, and opens no other port."""
    server = start("--port", "0", env={"DSTACK_SERVER_TOKEN": "a-good-long-token-0123"})
    url = address(server)
    assert submit(server) is None
    assert listening(server.process.pid) == [("127.0.0.1", urlsplit(url).port)]
    assert stat.S_IMODE(server.home.stat().st_mode) == 0o700
