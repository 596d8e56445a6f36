"""Nimbus itself, over HTTP: an ordinary cloud, with the traps that ordinary clouds have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from dstack_core.testing import Event, Fault, NimbusServer, wait_until


@pytest.fixture
def nimbus() -> Iterator[NimbusServer]:
    """One of its own."""
    with NimbusServer() as server:
        yield server


@pytest.fixture
def http(nimbus: NimbusServer) -> Iterator[httpx.Client]:
    """A client with the right token."""
    headers = {"Authorization": f"Bearer {nimbus.token}"}
    with httpx.Client(base_url=nimbus.url, headers=headers, timeout=10) as client:
        yield client


def order(**changes: Any) -> dict[str, Any]:
    """A body that makes a server."""
    return {"name": "a", "type": "small", "zone": "north-a", "labels": {"owner": "me"}, **changes}


def test_one_key_is_one_server(http: httpx.Client) -> None:
    """The same key and body give the same server, another body is refused, and no key makes a new one each time."""
    keyed = {"Idempotency-Key": "k"}
    first, again = (http.post("/v1/servers", json=order(), headers=keyed) for _ in range(2))
    assert (first.status_code, again.json()) == (201, first.json())
    assert http.post("/v1/servers", json=order(name="b"), headers=keyed).status_code == 409
    assert http.post("/v1/servers", json=order()).json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"type": "huge"}, 422, "invalid"),
        ({"zone": "moon"}, 422, "invalid"),
        ({"labels": {"Owner": "x"}}, 422, "invalid"),
        ({"name": "x" * 64}, 422, "invalid"),
        ({"colour": "red"}, 422, "invalid"),
        ({"type": "medium", "zone": "north-b"}, 503, "no_capacity"),
    ],
)
def test_what_cannot_be_made_is_refused(http: httpx.Client, change: dict[str, Any], status: int, code: str) -> None:
    """With a code, and a message for a person."""
    answer = http.post("/v1/servers", json=order(**change))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"]


def test_pages_are_fifty_of_one_region(http: httpx.Client) -> None:
    """Filtered by labels, and without those that are gone."""
    for number in range(60):
        http.post("/v1/servers", json=order(zone="north-a" if number < 55 else "west-a"))
    query = {"region": "north", "label": "owner:me"}
    first, second = (http.get("/v1/servers", params={**query, "page": page}).json() for page in (1, 2))
    assert (len(first["servers"]), len(second["servers"]), first["pages"]) == (50, 5, 2)
    assert http.get("/v1/servers", params={"region": "north", "label": "owner:you"}).json()["servers"] == []
    assert http.get("/v1/servers", params={"region": "moon"}).status_code == 422
    assert http.get("/v1/servers", params={"region": "north", "page": "0"}).status_code == 422


def test_a_disk_outlives_its_server(nimbus: NimbusServer, http: httpx.Client) -> None:
    """Unless it is deleted with it, then or later."""
    path = "/v1/servers/" + http.post("/v1/servers", json=order()).json()["id"]
    assert http.delete(path).status_code == 202
    wait_until(lambda: http.get(path).json()["status"] == "deleted")
    assert len(nimbus.truth().leftovers) == 1
    assert http.delete(path, params={"delete_disks": "true"}).status_code == 202
    assert nimbus.truth().leftovers == []


def test_who_has_no_token_gets_nothing(nimbus: NimbusServer, http: httpx.Client) -> None:
    """Not even what is sold; and the unknown is 404."""
    assert httpx.get(f"{nimbus.url}/v1/types").status_code == 401
    assert http.get("/v1/servers/none").status_code == 404
    assert http.get("/v2").status_code == 404
    assert http.post("/v1/servers", content=b"{").status_code == 400


def test_faults_befall_the_calls_that_they_are_meant_for(nimbus: NimbusServer, http: httpx.Client) -> None:
    """So many, after so many, and only those that make or change something where that is meant."""
    nimbus.fail(Fault.QUOTA)
    assert http.get("/v1/types").status_code == 200
    assert http.post("/v1/servers", json=order()).json()["error"]["code"] == "quota_exceeded"
    assert http.post("/v1/servers", json=order()).status_code == 201
    nimbus.fail(Fault.THROTTLE, 1, skip=1)
    assert [http.get("/v1/types").status_code for _ in range(3)] == [200, 429, 200]
    assert nimbus.fail(Fault.SERVER_ERROR, 1, after=True).words
    assert http.post("/v1/servers", json=order()).status_code == 500
    assert len(nimbus.truth().servers) == 2
    with pytest.raises(ValueError, match="cannot come after"):
        nimbus.fail(Fault.QUOTA, after=True)


def test_lag_and_events(nimbus: NimbusServer, http: httpx.Client) -> None:
    """A listing that lags has no new servers, the server itself is there; and something can happen to it."""
    nimbus.lag(3600)
    made = http.post("/v1/servers", json=order(name=f"n-{uuid4().hex[:8]}")).json()
    assert http.get("/v1/servers", params={"region": "north"}).json()["servers"] == []
    nimbus.befall(made["id"], Event.SPOT_INTERRUPTION)
    assert http.get(f"/v1/servers/{made['id']}").json()["reason"] == "spot"
    assert [server.billed for server in nimbus.truth().servers] == [False]
