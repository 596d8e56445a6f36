"""Who may use services, and what no replica gets to see."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from tests.server.conftest import TOKEN
from tests.support.upstreams import respond

BEARER = f"Bearer {TOKEN}"
WEB = "/services/main/web/"


def basic(password: str, user: str = "me") -> str:
    """The header of HTTP Basic."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "authorization", [BEARER, f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, ""), basic(TOKEN).replace("Basic", "BASIC")]
)
def test_token(services: Any, authorization: str) -> None:
    """The token gets in, from programs and from browsers, and stays here."""
    (replica,) = services.add("web", respond(), auth=True)
    assert services.get(WEB, headers={"authorization": authorization}).text == "ok"
    assert replica.seen[0].header("authorization") is None
    assert TOKEN not in repr(replica.seen)
    assert base64.b64encode(TOKEN.encode())[:10].decode() not in repr(replica.seen)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN} {TOKEN}",
        f"Digest {TOKEN}",
        TOKEN,
        basic("wrong"),
        basic("", TOKEN),
        "Basic !!!",
        f"Basic {TOKEN}",
        "Basic",
    ],
)
@pytest.mark.parametrize(
    "path", [WEB, "/services/main/web", "/services/main/nope/", "/services/x", "/models/main/models"]
)
def test_stranger(services: Any, authorization: str | None, path: str) -> None:
    """Without the token nothing is reached, and nothing is learnt about which services there are."""
    (replica,) = services.add("web", respond(), auth=True, model="m", problem="password=hunter2")
    answer = services.get(path, headers={} if authorization is None else {"authorization": authorization})
    assert answer.status_code == 401
    assert answer.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="dstack", charset="UTF-8"']
    assert "token" in answer.text
    assert "hunter2" not in answer.text
    assert not replica.seen


def test_public_service(services: Any) -> None:
    """With `auth=False` everybody gets in; what they bring is for the replica, unless it is our token."""
    (replica,) = services.add("web", respond())
    for authorization in (None, "Bearer theirs", basic("theirs"), BEARER, basic(TOKEN)):
        headers = {} if authorization is None else {"authorization": authorization}
        assert services.get(WEB, headers=headers).text == "ok"
    seen = [request.header("authorization") for request in replica.seen]
    assert seen == [None, "Bearer theirs", basic("theirs"), None, None]


def test_token_over_the_socket(services: Any) -> None:
    """Over the unix socket the token is not asked for, and not passed on."""
    (replica,) = services.add("web", respond(), auth=True)
    with services.server.client() as client:
        assert client.get(WEB, headers={"authorization": BEARER}).text == "ok"
        assert client.get(WEB, headers={"authorization": "Bearer theirs"}).text == "ok"
    assert [seen.header("authorization") for seen in replica.seen] == [None, "Bearer theirs"]


@pytest.mark.parametrize(
    ("authorization", "origin", "status"),
    [
        (basic(TOKEN), "http://evil.test", 403),
        (basic(TOKEN), "null", 403),
        (basic(TOKEN), None, 200),
        (basic(TOKEN), "{url}", 200),
        (BEARER, "http://page.test", 200),
    ],
)
def test_foreign_page(services: Any, authorization: str, origin: str | None, status: int) -> None:
    """A page of another site cannot use what a browser knows; a program that has the token may be anywhere."""
    (replica,) = services.add("web", respond(), auth=True)
    headers = {"authorization": authorization}
    if origin is not None:
        headers["origin"] = origin.format(url=services.url)
    with services.client() as client:
        assert client.post(WEB, headers=headers).status_code == status
    assert len(replica.seen) == (status == 200)


def test_token_is_in_no_log(services: Any) -> None:
    """Neither a right token nor a wrong one is written down."""
    services.add("web", respond(), auth=True)
    for authorization in (BEARER, basic(TOKEN), "Bearer some-wrong-token", basic("some-wrong-token")):
        services.get(WEB, headers={"authorization": authorization})
    log = services.server.log()
    assert TOKEN not in log
    assert "some-wrong-token" not in log


def test_api_is_as_strict_as_before(services: Any) -> None:
    """The API is not reached by a path that looks like that of a service, nor by HTTP Basic."""
    path = "/api/project/main/runs/list"
    assert (
        httpx.post(services.url + path, json={}, headers={"authorization": basic(TOKEN)}, timeout=60).status_code == 401
    )
    with services.connect() as connection:
        connection.sendall(
            b"POST /services/../api/project/main/runs/list HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
