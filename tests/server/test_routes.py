"""Requests and answers, over a real socket."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

MAIN = "/api/project/main"
SPEC = {"run_name": "train", "configuration": {"type": "task", "commands": ["echo hi"]}, "profile": {}}


def submit(client: httpx.Client, **changes: Any) -> httpx.Response:
    """Submits `SPEC`, changed."""
    body = {"run_spec": {**SPEC, **changes}, "submit_key": str(uuid4())}
    return client.post(f"{MAIN}/runs/submit", json=body)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal, after a look at its shape."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    (detail, *_) = answer.json()["detail"]
    assert detail["code"] == code
    assert isinstance(detail["fields"], list)
    return str(detail["msg"])


def test_info(client: httpx.Client, server: Any) -> None:
    """The server says who it is."""
    info = client.get("/api/server/info").json()
    assert info["pid"] == server.process.pid
    assert info["local"] is True
    assert info["home"] == str(server.home)


def test_life_of_a_run(client: httpx.Client) -> None:
    """Plan, submit, get, list, stop, metrics, activity and delete answer with their models."""
    plan = client.post(f"{MAIN}/runs/get_plan", json={"run_spec": SPEC}).json()
    assert plan["run_spec"]["run_name"] == "train"
    run = submit(client).json()
    assert run["status"] == "submitted"
    assert client.post(f"{MAIN}/runs/get", json={"run_name": "train"}).json() == run
    assert client.post(f"{MAIN}/runs/list", json={"all": True}).json() == [run]
    assert client.post(f"{MAIN}/runs/list").json() == [run]
    assert client.post(f"{MAIN}/runs/stop", json={"runs_names": ["train"]}).json() == {}
    assert client.get(f"{MAIN}/runs/{run['id']}/metrics").json()["processes"] == 3
    assert client.post(f"{MAIN}/runs/{run['id']}/activity").json() == {}
    assert client.post(f"{MAIN}/runs/delete", json={"runs_names": ["train"]}).json() == {}
    assert client.post(f"{MAIN}/runs/list", json={}).json() == []


def test_user_is_the_one_of_this_computer(client: httpx.Client) -> None:
    """Over the unix socket the user is known from the system."""
    assert submit(client).json()["user"]


def test_backends(client: httpx.Client) -> None:
    """Backends are listed, and checked when asked."""
    assert client.get(f"{MAIN}/backends/list").json()[0]["problems"] == []
    assert client.get(f"{MAIN}/backends/list", params={"check": "true"}).json()[0]["problems"] == ["no credentials"]


def test_refusals_of_the_engine(client: httpx.Client) -> None:
    """Each class of refusal has its status and code."""
    submit(client)
    assert "is active" in refused(submit(client), 409, "run_name_taken")
    assert "no GPU" in refused(submit(client, run_name="nothing-fits"), 400, "no_offers")
    assert "nobody" in refused(client.post(f"{MAIN}/runs/get", json={"run_name": "nobody"}), 404, "not_found")
    assert "other" in refused(client.post("/api/project/other/runs/list", json={}), 404, "not_found")
    assert "other" in refused(client.get("/api/project/other/backends/list"), 404, "not_found")
    assert "xyz" in refused(client.get(f"{MAIN}/runs/xyz/logs"), 404, "not_found")


def test_unknown_route_and_method(client: httpx.Client) -> None:
    """A route that is not there suggests that the versions differ."""
    assert "upgrade" in refused(client.get("/api/nope"), 404, "not_found")
    assert "upgrade" in refused(client.get(f"{MAIN}/runs/submit"), 405, "not_found")


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"run_name": 3}, "run_name", "string"),
        ({"run_name": None, "wait": "long"}, "wait", "number"),
        ({"run_id": "xyz"}, "run_id", "UUID"),
        ([], "", "object"),
    ],
)
def test_wrong_field(client: httpx.Client, body: object, field: str, words: str) -> None:
    """A wrong field is named with what is allowed there."""
    answer = client.post(f"{MAIN}/runs/get", json=body)
    assert words in refused(answer, 400, "error")
    assert answer.json()["detail"][0]["fields"] == ([field] if field else [])


def test_not_json(client: httpx.Client) -> None:
    """A body that is not JSON is refused with the place where it breaks."""
    assert "JSON" in refused(client.post(f"{MAIN}/runs/get", content=b'{"run_name": '), 400, "error")


def test_wrong_query(client: httpx.Client) -> None:
    """A wrong query field is named, too."""
    answer = client.get(f"{MAIN}/runs/{uuid4()}/logs", params={"offset": "-1"})
    assert "offset" in refused(answer, 400, "error")


def test_secret_value_is_not_repeated(client: httpx.Client, server: Any) -> None:
    """A wrong `env` is refused without its values, in the answer and in the log."""
    answer = submit(client, configuration={"type": "task", "env": {"TOKEN": {"x": "hunter2"}}})
    assert "env" in refused(answer, 400, "error")
    assert "hunter2" not in answer.text
    assert "hunter2" not in server.log()


def test_unforeseen_failure(client: httpx.Client, server: Any) -> None:
    """A bug becomes a 500 with a number that is in the log; the client sees no traceback."""
    message = refused(submit(client, run_name="boom"), 500, "server_error")
    number = next(word for word in message.split() if word.startswith("E-"))
    assert f"[{number}]" in server.log()
    assert "RuntimeError" in server.log()
    assert "RuntimeError" not in message
    assert "hunter2" not in message


@pytest.mark.parametrize("chunked", [False, True])
def test_oversize_body(client: httpx.Client, chunked: bool) -> None:
    """A body over the limit is read to its end, dropped, and refused; the server goes on."""
    body = b"x" * (9 << 20)
    answer = client.post(f"{MAIN}/runs/submit", content=iter([body]) if chunked else body)
    assert "8 MB" in refused(answer, 413, "too_large")
    assert client.get("/api/server/info").status_code == 200


def test_endless_body(client: httpx.Client) -> None:
    """A body without end is cut off."""
    try:
        answer = client.post(f"{MAIN}/runs/submit", content=(b"x" * (1 << 20) for _ in range(1000)))
    except httpx.TransportError:
        pass
    else:
        refused(answer, 413, "too_large")
    assert client.get("/api/server/info").status_code == 200


def test_long_poll_of_a_client_that_leaves(client: httpx.Client, server: Any) -> None:
    """A wait ends in the server when its client has hung up."""
    from dstack_core.testing import wait_until

    submit(client)
    with pytest.raises(httpx.ReadTimeout):
        client.post(f"{MAIN}/runs/get", json={"run_name": "train", "after_version": 9, "wait": 60}, timeout=2)
    wait_until(lambda: "poll cancelled" in server.events(), what="the end of the wait")
