"""The protocol at its edges: what may be repeated, what is refused, and how long polls behave."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

import pytest

from tests.support.real_agents import LONG, RealAgent, Refused


def test_health(agent: RealAgent) -> None:
    """Who it is, and which job it has."""
    assert agent.health["protocol"] == 1
    assert agent.health["jobs"] == []
    agent.run("true")
    assert agent.get("/v1/health")["jobs"] == ["1"]


def test_the_same_job_again_changes_nothing(agent: RealAgent) -> None:
    """A PUT whose answer got lost is repeated, and the job runs once."""
    spec = {"shell": "echo once >> count; cat count", "env": {"A": "1"}}
    for _ in range(5):
        agent.call("PUT", "/v1/jobs/1", spec)
    assert agent.output() == b"once\n"
    assert agent.call("PUT", "/v1/jobs/1", spec)["status"] == "exited"


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("PUT", "/v1/jobs/1", {"shell": "something else"}, 409),
        ("PUT", "/v1/jobs/2", {"shell": "sleep 600"}, 409),
        ("PUT", "/v1/jobs/1", {}, 409),
        ("GET", "/v1/jobs/2", None, 404),
        ("GET", "/v1/jobs/2/log", None, 404),
        ("POST", "/v1/jobs/2/stop", {"grace": 1}, 404),
        ("GET", "/v1/jobs/1?after=x", None, 400),
        ("GET", "/v1/jobs/1/log?offset=-1", None, 400),
        ("POST", "/v1/jobs/1/stop", {"grace": "soon"}, 400),
        ("PUT", "/v1/lease", {"seconds": -1}, 400),
        ("PUT", "/v1/lease", [], 400),
        ("GET", "/v2/health", None, 404),
        ("DELETE", "/v1/health", None, 404),
        ("GET", "/", None, 404),
    ],
)
def test_refusals(agent: RealAgent, method: str, target: str, body: object, status: int) -> None:
    """A status in the 400s and a reason; the job is unharmed."""
    agent.run("sleep 600")
    with pytest.raises(Refused) as refused:
        agent.call(method, target, body)
    assert refused.value.status == status
    assert agent.state()["status"] == "running"


@pytest.mark.parametrize("spec", [{}, {"shell": None}, {"shell": "true", "stop_grace": "soon"}, []])
def test_specs_that_make_no_job(agent: RealAgent, spec: object) -> None:
    """Refused, and the agent is still free for a real one."""
    with pytest.raises(Refused) as refused:
        agent.call("PUT", "/v1/jobs/1", spec)
    assert refused.value.status == 400
    agent.run("true")
    assert agent.wait()["exit_code"] == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"PUT /v1/jobs/1 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"PUT /v1/jobs/1 HTTP/1.1\r\nContent-Length: 5\r\n\r\n{bad}",
        b"PUT /v1/jobs/1 HTTP/1.1\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"GET /v1/hea",
        b"",
    ],
)
def test_garbage(agent: RealAgent, garbage: bytes) -> None:
    """What is no request gets a 400 or nothing, and the agent goes on."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LONG)
        client.connect(agent.address)
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(4096)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert agent.get("/v1/health")["pid"] == agent.pid


def test_requests_in_pieces_and_in_a_row(agent: RealAgent) -> None:
    """Byte by byte, and several at once on one connection: answered one after the other, in order."""
    agent.run("true")
    agent.wait()
    request = b"GET /v1/jobs/%d HTTP/1.1\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LONG)
        client.connect(agent.address)
        for byte in request % 1:
            client.sendall(bytes([byte]))
        client.sendall(b"".join(request % number for number in (2, 1, 2, 1)))
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 5 or not answers.endswith(b"}"):
            answers += client.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"404", b"200", b"404", b"200"]


def test_long_poll_of_the_state(agent: RealAgent) -> None:
    """Answered by the change; without one, after the wait."""
    state = agent.run("while ! test -e go; do sleep 0.02; done")
    begun = time.monotonic()
    assert agent.get(f"/v1/jobs/1?after={state['seq']}&wait=0.3")["seq"] == state["seq"]
    assert time.monotonic() - begun >= 0.3
    answers: list[dict[str, Any]] = []
    waiter = threading.Thread(target=lambda: answers.append(agent.get(f"/v1/jobs/1?after={state['seq']}&wait=60")))
    waiter.start()
    (agent.directory / "job/go").touch()
    waiter.join(LONG)
    assert answers[0]["status"] == "exited"
    assert answers[0]["seq"] > state["seq"]


def test_a_client_that_goes_away_while_waiting(agent: RealAgent) -> None:
    """Its place is cleared; the agent is not disturbed."""
    agent.run("while ! test -e go; do sleep 0.02; done; echo x")
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(agent.address)
            client.sendall(
                b"GET /v1/jobs/1/log?wait=60 HTTP/1.1\r\n\r\nGET /v1/jobs/1?after=99&wait=60 HTTP/1.1\r\n\r\n"
            )
    (agent.directory / "job/go").touch()
    assert agent.output() == b"x\n"
    assert agent.complaints() == ""


def test_a_client_that_does_not_read(agent: RealAgent) -> None:
    """Its answers wait; nobody else does, and the job is not held up."""
    agent.run("head -c 5000000 /dev/zero; echo end")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(agent.address)
        for _ in range(3):
            client.sendall(b"GET /v1/jobs/1/log?wait=5&limit=8000000 HTTP/1.1\r\n\r\n")
        assert agent.wait()["log_bytes"] == 5_000_004
        assert len(agent.output()) == 5_000_004


def test_values_of_every_kind(agent: RealAgent) -> None:
    """Text outside ASCII, quotes, newlines and NUL-free binary survive both directions."""
    value = "ü\n\"'\\ \U0001f600 \x7f\t$(x)"
    agent.run('printf %s "$V"', env={"V": value})
    assert agent.output().decode() == value
