"""`dstack server`: over TCP, with a token."""

from __future__ import annotations

import re
import socket
import stat
from typing import Any

import httpx
import pytest

TOKEN = "a-good-long-token-0123"
LIST = "/api/project/main/runs/list"


def url(server: Any) -> str:
    """Where the server says it listens."""
    found = re.search(r"http://\S+:\d+", server.process.stdout.readline())
    assert found, server.process.stderr.read()
    return found.group()


def asked(address: str, token: str | None) -> httpx.Response:
    """An answer to a request with that token."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.post(address + LIST, json={}, headers=headers, timeout=60)


def test_token_of_the_environment(start: Any) -> None:
    """The right token gets in, a wrong one or none does not, and is told what to do."""
    server = start("--port", "0", env={"DSTACK_SERVER_TOKEN": TOKEN})
    address = url(server)
    assert asked(address, TOKEN).json() == []
    for token in (None, "wrong", TOKEN[:-1], TOKEN.upper()):
        answer = asked(address, token)
        assert answer.status_code == 401
        assert answer.json()["detail"][0]["code"] == "unauthorized"
        assert "token" in answer.json()["detail"][0]["msg"]
        assert TOKEN not in answer.text
    assert httpx.get(address + "/api/server/info", timeout=60).json()["local"] is False
    assert TOKEN not in server.log()


def test_user_over_tcp(start: Any) -> None:
    """Whoever has the token is the administrator."""
    address = url(start("--port", "0", "--token", TOKEN))
    spec = {"configuration": {"type": "task", "commands": ["true"]}, "profile": {}}
    headers = {"authorization": f"Bearer {TOKEN}"}
    plan = httpx.post(
        f"{address}/api/project/main/runs/get_plan", json={"run_spec": spec}, headers=headers, timeout=60
    ).json()
    assert plan["user"] == "admin"


def test_made_token(start: Any) -> None:
    """A token is made once, shown once with the lines for the client, and only its hash is kept."""
    server = start("--port", "0")
    address = url(server)
    shown = [server.process.stdout.readline() for _ in range(6)]
    token = next(line for line in shown if "token:" in line).split()[-1]
    assert asked(address, token).status_code == 200
    file = server.home / "server" / "token"
    assert token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    server.process.terminate()
    assert server.ended() == 0
    again = start("--port", "0")
    assert asked(url(again), token).status_code == 200
    again.process.terminate()
    assert token not in again.process.stdout.read()
    assert token not in again.log()


def test_socket_beside_tcp(start: Any) -> None:
    """The unix socket answers as well, without a token: clients on this computer find the server as always."""
    server = start("--port", "0")
    url(server)
    with server.client() as client:
        assert client.post(LIST, json={}).json() == []


def test_no_shutdown_over_tcp(start: Any) -> None:
    """Only a client on the server's computer can stop it."""
    address = url(start("--port", "0", "--token", TOKEN))
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{address}/api/server/shutdown", headers=headers, timeout=60).status_code == 400
    assert asked(address, TOKEN).status_code == 200


@pytest.mark.parametrize("token", ["", "short", "with a space in the middle", "ünïcödé-long-enough"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_bad_token(start: Any, host: str, token: str) -> None:
    """An empty or weak token is refused before anything listens."""
    server = start("--host", host, "--port", "0", "--token", token)
    assert server.ended() == 78
    assert "at least 16" in server.process.stderr.read()


def test_damaged_token_file(start: Any, tmp_path: Any) -> None:
    """A token file that is not ours is named, with the cure."""
    (tmp_path / "home" / "server").mkdir(parents=True)
    (tmp_path / "home" / "server" / "token").write_text("sha256:xyz")
    server = start("--port", "0")
    assert server.ended() == 78
    assert "Delete it" in server.process.stderr.read()


def test_port_taken(start: Any) -> None:
    """A taken port is said, with what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start("--port", str(taken.getsockname()[1]))
        assert server.ended() == 78
    assert "--port" in server.process.stderr.read()


def test_everywhere(start: Any) -> None:
    """A server that others can reach warns that traffic is not encrypted."""
    server = start("--host", "0.0.0.0", "--port", "0", "--token", TOKEN)
    url(server)
    server.process.terminate()
    assert "not encrypted" in server.process.stdout.read()
