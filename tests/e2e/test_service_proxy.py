"""Services behind their address, from the public API to real processes and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from websockets.sync.client import connect

from dstack.api import Client, Run, Service
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended, processes

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "programs"
TOKEN = "a-good-long-token-0123"

# A web application with a page, an echo over WebSocket, and a model that counts what it was sent.
APPLICATION = """
import json, os, uvicorn

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer = {"path": scope["path"], "size": len(body), "headers": headers, "pid": os.getpid()}
    if scope["path"].endswith("/chat/completions"):
        message = {"role": "assistant", "content": str(len(json.loads(body)["messages"]))}
        answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "toy",
                  "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    data = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})

uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", ws="websockets-sansio")
"""


def application(home: Home, **fields: object) -> Service:
    """The application above as a service."""
    home.path.mkdir(mode=0o700, exist_ok=True)
    (home.path / "application.py").write_text(APPLICATION)
    return service(f"exec {sys.executable} {home.path}/application.py", **fields)


def cheap(**fields: object) -> Service:
    """A service whose replicas only say who they are."""
    return service(f"exec {sys.executable} {PROGRAMS}/replica.py", **fields)


def service(command: str, **fields: object) -> Service:
    """A service of one command."""
    return Service(**{"port": 8000, "commands": [command], "stop_duration": 1, **fields})  # type: ignore[arg-type]  # fields by name


def url_of(run: Run) -> str:
    """The address of a service."""
    run.refresh()
    assert run.url
    return run.url


def test_page_socket_and_model(client: Client, home: Home) -> None:
    """A service is reached at its address right after it was submitted: pages, WebSockets, its model, large bodies."""
    run = client.runs.submit(application(home, model="toy"), run_name="web")
    url = url_of(run)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/services/main/web/", url)
    wait_until(lambda: httpx.get(url, timeout=60).status_code == 200, timeout=60, what="the first answer")
    answer = httpx.post(f"{url}a%20b?c=d", content=bytes(30_000_000), timeout=60).json()
    assert (answer["path"], answer["size"]) == ("/a b", 30_000_000)
    assert answer["headers"]["x-forwarded-prefix"] == "/services/main/web"
    with connect(url.replace("http", "ws") + "socket", proxy=None, max_size=None) as socket:
        for message in ("hello", b"\0" * 3_000_000):
            socket.send(message)
            assert socket.recv() == message
    model = run.service_model
    assert model is not None
    with openai.OpenAI(base_url=model.url, api_key="none is needed here") as sdk:
        assert [known.id for known in sdk.models.list()] == ["toy"]
        told = sdk.chat.completions.create(model="toy", messages=[{"role": "user", "content": "hi"}])
        assert told.choices[0].message.content == "1"
    run.stop()
    ended(run)
    missing = httpx.get(url, timeout=60)
    assert missing.status_code == 404
    assert "'web'" in missing.json()["detail"][0]["msg"] or "ended" in missing.json()["detail"][0]["msg"]


def test_service_that_never_answers(client: Client, home: Home) -> None:
    """Whoever asks for a service whose port never answers reads what was probed, and the last lines of its log."""
    run = client.runs.submit(service("echo cannot find the weights; sleep 1000"))
    url = url_of(run)

    def told() -> bool:
        answer = httpx.get(url, timeout=60)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        return "cannot find the weights" in answer.json()["detail"][0]["msg"]

    wait_until(told, timeout=90, what="the last lines of the log")
    text = httpx.get(url, timeout=60, headers={"accept": "text/html"}).text
    assert "<h1>503 Service Unavailable</h1>" in text
    assert "cannot find the weights" in text


def test_address_survives_the_server(client: Client, home: Home) -> None:
    """After a SIGKILL of the server the service has the same address, with the same replica behind it."""
    run = client.runs.submit(application(home), run_name="web")
    assert run.wait_until_ready(timeout=60)
    url = url_of(run)
    before = httpx.get(url, timeout=60).json()["pid"]
    home.kill_server()
    assert url_of(run) == url
    assert httpx.get(url, timeout=60).json()["pid"] == before


@pytest.fixture
def shared(home: Home) -> Iterator[str]:
    """The address of a server on TCP."""
    home.path.mkdir(mode=0o700)
    server = subprocess.Popen(
        [sys.executable, "-m", "dstack_core._server", "--port", "0"],
        env={**home.env, "DSTACK_SERVER_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    found = re.search(r"http://\S+:\d+", server.stdout.readline())
    assert found
    yield found.group()
    server.kill()
    server.communicate()


def bearer(request: httpx.Request) -> httpx.Request:
    """Adds the token as programs do."""
    request.headers["authorization"] = f"Bearer {TOKEN}"
    return request


def test_shared_server(shared: str, home: Home) -> None:
    """On TCP the service is at the server's own address, for whoever has the token, which the replica never sees."""
    client = Client.from_config(project_name="main", server_url=shared, user_token=TOKEN)
    run = client.runs.submit(application(home), run_name="web")
    assert run.wait_until_ready(timeout=60)
    url = url_of(run)
    assert url.startswith(f"{shared}/services/main/web")
    assert httpx.get(url, timeout=60).status_code == 401
    for auth in (httpx.BasicAuth("me", TOKEN), bearer):
        seen = httpx.get(url, timeout=60, auth=auth).json()["headers"]
        assert "authorization" not in seen
        assert TOKEN not in repr(seen)
    run.stop(abort=True)
    ended(run)


def test_killed_under_load(client: Client, home: Home) -> None:
    """A replica that is killed under load fails no request, and its replacement serves."""
    run = client.runs.submit(cheap(replicas=2), run_name="web")
    url = url_of(run)

    def pids() -> set[int]:
        found = processes(home.path)
        return {pid for pid, command in found if command.rstrip().endswith("replica.py") and "exec" not in command}

    wait_until(lambda: len(answering(url)) == 2, timeout=90, what="two replicas that answer")
    before = answering(url)
    load = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "load.py"), url, "32", "15", "100"], stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: load.poll() is not None or connected(url) >= 32, what="the load")
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    (fresh,) = wait_until(lambda: pids() - before, timeout=60, what="the replacement's process")
    wait_until(lambda: fresh in answering(url), timeout=60, what="an answer of the replacement")
    result = json.loads(load.communicate(timeout=120)[0])
    assert result["failed"] == {}
    assert len(result["seconds"]) == 1500
    assert not load.returncode


def answering(url: str) -> set[int]:
    """The process ids of the replicas that answer now."""
    with httpx.Client(timeout=60) as client:
        return {int(client.get(url).text) for _ in range(8)}


def connected(url: str) -> int:
    """How many connections the server has at that address."""
    port = f":{urlsplit(url).port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(port) and line.split()[3] == "01" for line in lines)
