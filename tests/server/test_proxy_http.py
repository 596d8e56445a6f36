"""Services over HTTP: what a replica gets, and what comes back."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from dstack_core._server.proxy.targets import Rewriting, model_target, service_target
from dstack_core.testing import wait_until
from tests.support.upstreams import Seen, respond


def ask(services: Any, request: bytes) -> bytes:
    """Everything that a bare connection gets for some bytes until the server closes it."""
    with services.connect() as connection:
        connection.sendall(request)
        return received(connection)


def received(connection: socket.socket) -> bytes:
    """All bytes until the end."""
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def until(connection: socket.socket, end: bytes) -> bytes:
    """The bytes up to and including `end`."""
    data = b""
    while not data.endswith(end):
        piece = connection.recv(1 << 16)
        assert piece, f"the server closed after {data!r}"
        data += piece
    return data


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """A request that is the last one on its connection."""
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"{method} {path} HTTP/1.1\r\nHost: x.test\r\nConnection: close\r\n{lines}\r\n".encode()


# ------------------------------------------------------------------------------------------------------- requests --


def test_request_and_answer(services: Any) -> None:
    """A request reaches a replica, and its answer the client."""
    (replica,) = services.add("web", respond(b"hello", "200 OK", "X-Thing: 1"))
    answer = services.get("/services/main/web/a/b?c=d")
    assert (answer.status_code, answer.content, answer.headers["x-thing"]) == (200, b"hello", "1")
    assert (replica.seen[0].method, replica.seen[0].target) == ("GET", "/a/b?c=d")


@pytest.mark.parametrize(
    "rest",
    [
        "/",
        "/a//b",
        "//evil.test/x",
        "/../../other/secret",
        "/%2e%2e/%2F..%2fx",
        "/a%20b%C3%A9%00",
        "/x;y=1,2?q=%26&q=a+b&&=",
        "/?url=http://a.test/?b=c",
        "/a%2525",
        "/services/main/other/",
        "/~!$&'()*+,;=:@|^`{}[]\"<>\\",
    ],
)
def test_path_as_it_is(services: Any, rest: str) -> None:
    """Path and query reach the replica byte for byte, and never another service."""
    (replica,) = services.add("web", respond())
    (other,) = services.add("other", respond())
    assert ask(services, get(f"/services/main/web{rest}")).startswith(b"HTTP/1.1 200 ")
    assert replica.seen[0].target == rest
    assert not other.seen


@pytest.mark.parametrize(
    "path",
    [
        "/services/main/../web/",
        "/services/main/%2e%2e/web/",
        "/services/main%2Fweb/",
        "/services/main/we%62/",
        "/services/main//web/",
        "/services//web/",
        "//services/main/web/",
        "/services/main/web%2F..%2Fother/",
        "/services/",
        "/services/main",
        "/./services/main/web/",
        "/%73ervices/main/web/",
        "/api/../services/main/web/",
    ],
)
def test_path_that_names_no_service(services: Any, path: str) -> None:
    """A path that is not plainly that of a service reaches none, and is refused."""
    replicas = services.add("web", respond()) + services.add("other", respond())
    answer = ask(services, get(path, "Authorization: Bearer a-good-long-token-0123"))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert not any(replica.seen for replica in replicas)


def test_whole_path_without_stripping(services: Any) -> None:
    """With `strip_prefix=False` the replica gets the whole path, and its answers stay as they are."""
    (replica,) = services.add(
        "web", respond(b"", "302 Found", "Location: /x", "Set-Cookie: a=b; Path=/"), strip_prefix=False
    )
    answer = services.get("/services/main/web/a%2Fb?c")
    assert replica.seen[0].target == "/services/main/web/a%2Fb?c"
    assert replica.seen[0].header("x-forwarded-prefix") is None
    assert (answer.headers["location"], answer.headers["set-cookie"]) == ("/x", "a=b; Path=/")


@pytest.mark.parametrize(("query", "where"), [("", "web/"), ("?a=b%20c", "web/?a=b%20c")])
def test_missing_slash(services: Any, query: str, where: str) -> None:
    """The address without its last slash leads to the one with it, whatever the method."""
    (replica,) = services.add("web", respond())
    for method in ("GET", "POST"):
        with services.client() as client:
            answer = client.request(method, f"/services/main/web{query}")
            assert (answer.status_code, answer.headers["location"]) == (307, where)
            assert client.request(method, f"/services/main/web{query}", follow_redirects=True).text == "ok"
    assert {seen.target for seen in replica.seen} == {f"/{query}"}


def test_headers_of_a_request(services: Any) -> None:
    """What belongs to the client's connection stays there; the rest arrives, with who the client is."""
    (replica,) = services.add("web", respond())
    own = ("Keep-Alive: 3", "TE: trailers", "Proxy-Authorization: x", "Connection: x-mine", "X-Mine: 1", "Upgrade: h2c")
    kept = ("Cookie: a=b", "X-Other: \xe9", "X-Twice: 1", "X-Twice: 2", "Authorization: Basic eDp5")
    ask(services, get("/services/main/web/", *own, *kept))
    seen = replica.seen[0]
    names = [name for name, _ in seen.headers]
    assert not {"keep-alive", "te", "proxy-authorization", "x-mine", "upgrade", "connection"} & set(names)
    assert [value for name, value in seen.headers if name == "x-twice"] == ["1", "2"]
    assert (seen.header("cookie"), seen.header("authorization")) == ("a=b", "Basic eDp5")
    assert (seen.header("host"), seen.header("x-forwarded-host")) == ("x.test", "x.test")
    assert (seen.header("x-forwarded-for"), seen.header("x-forwarded-proto")) == ("127.0.0.1", "http")
    assert seen.header("x-forwarded-prefix") == "/services/main/web"


def test_headers_of_a_proxy_in_front(services: Any) -> None:
    """What a proxy in front says of the client is kept, and added to."""
    (replica,) = services.add("web", respond())
    headers = {"x-forwarded-for": "1.2.3.4", "x-forwarded-proto": "https", "x-forwarded-host": "a.test"}
    services.get("/services/main/web/", headers={**headers, "x-forwarded-prefix": "/up"})
    seen = replica.seen[0]
    assert seen.header("x-forwarded-for") == "1.2.3.4, 127.0.0.1"
    assert (seen.header("x-forwarded-proto"), seen.header("x-forwarded-host")) == ("https", "a.test")
    assert seen.header("x-forwarded-prefix") == "/up/services/main/web"


def test_over_the_socket(services: Any) -> None:
    """Over the unix socket a service needs no token, and the client has no address."""
    (replica,) = services.add("web", respond(), auth=True)
    with services.server.client() as client:
        assert client.get("/services/main/web/").text == "ok"
    assert replica.seen[0].header("x-forwarded-for") is None


def test_connections_are_kept(services: Any) -> None:
    """Requests that follow one another share a connection to the replica, whoever sends them."""
    (replica,) = services.add("web", respond())
    for _ in range(5):
        assert services.get("/services/main/web/").text == "ok"
    assert replica.connections == 1


def test_old_connection_is_not_used_for_a_post(services: Any) -> None:
    """A connection that the replica closes while it is idle fails no request."""

    async def once(request: Seen) -> None:
        await request.body()
        await request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        raise ConnectionError("closed, though it did not say so")

    (replica,) = services.add("web", once)
    for _ in range(10):
        with services.client() as client:
            assert client.post("/services/main/web/", content=b"x").text == "ok"
        wait_until(lambda: replica.open == 0, what="the end of the connection")
    assert replica.connections == 10


# -------------------------------------------------------------------------------------------------------- answers --


@pytest.mark.parametrize(
    ("method", "answer", "status", "body"),
    [
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc"),
        (
            "GET",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX-T: 1\r\n\r\n",
            200,
            b"abc",
        ),
        ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: x\r\n\r\n", 304, b""),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200, b""),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b""),
        ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", 200, b"a"),
        ("GET", b"HTTP/1.1 599 Odd\r\nContent-Length: 0\r\n\r\n", 599, b""),
        ("OPTIONS", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
        ("DELETE", b"HTTP/1.1 404 Not Found\r\nContent-Length: 1\r\n\r\na", 404, b"a"),
        ("PATCH", b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", 200, b"a"),
    ],
)
def test_answers(services: Any, method: str, answer: bytes, status: int, body: bytes) -> None:
    """Every kind of answer arrives, and the next request on the same connections gets its own."""

    async def handler(request: Seen) -> None:
        await request.answer(answer if request.target == "/one" else b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntwo")

    services.add("web", handler)
    with services.client() as client:
        for _ in range(2):
            first = client.request(method, "/services/main/web/one")
            assert (first.status_code, first.content) == (status, body)
            assert "x-t" not in first.headers
            assert client.get("/services/main/web/two").content == b"two"


def test_answer_until_the_end(services: Any) -> None:
    """An answer without a length ends with the replica's connection."""

    async def handler(request: Seen) -> None:
        await request.answer(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000)
        request.writer.close()

    services.add("web", handler)
    assert services.get("/services/main/web/").content == b"x" * 100_000


def test_headers_of_an_answer(services: Any) -> None:
    """What belongs to the replica's connection stays there; the rest arrives, in its order."""
    own = (
        "Connection: keep-alive, X-Mine",
        "X-Mine: 1",
        "Keep-Alive: timeout=5",
        "Proxy-Authenticate: x",
        "Upgrade: h2c",
    )
    services.add("web", respond(b"ok", "200 OK", *own, "Server: theirs", "Vary: a", "Vary: b", "Date: then"))
    answer = services.get("/services/main/web/")
    assert not {"connection", "x-mine", "keep-alive", "proxy-authenticate", "upgrade"} & set(answer.headers)
    assert answer.headers.get_list("vary") == ["a", "b"]
    assert (answer.headers["server"], answer.headers["date"]) == ("theirs", "then")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (b"/login", b"/services/main/web/login"),
        (b"/", b"/services/main/web/"),
        (b"/a?next=/b", b"/services/main/web/a?next=/b"),
        (b"http://x.test/a", b"http://x.test/services/main/web/a"),
        (b"HTTPS://X.test/a", b"HTTPS://X.test/services/main/web/a"),
        (b"//x.test/a", b"//x.test/services/main/web/a"),
        (b"http://x.test", b"http://x.test/services/main/web/"),
        (b"http://other.test/a", b"http://other.test/a"),
        (b"//other.test/a", b"//other.test/a"),
        (b"relative/x", b"relative/x"),
        (b"?a=b", b"?a=b"),
        (b"", b""),
        (b"/services/main/web/a", b"/services/main/web/a"),
        (b"/services/main/web", b"/services/main/web"),
        (b"/services/main/website", b"/services/main/web/services/main/website"),
        (b"mailto:x@x.test", b"mailto:x@x.test"),
    ],
)
def test_location(location: bytes, expected: bytes) -> None:
    """A redirect to the replica itself gets the prefix that the replica never saw; any other stays."""
    assert Rewriting(b"/services/main/web", b"x.test").location(location) == expected


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        (b"a=b", b"a=b"),
        (b"a=b; Path=/", b"a=b; Path=/services/main/web/"),
        (b"a=b; path = /x; HttpOnly", b"a=b; path = /services/main/web/x; HttpOnly"),
        (b"a=b;PATH=/x", b"a=b;PATH=/services/main/web/x"),
        (b"a=path=/; Secure", b"a=path=/; Secure"),
        (b"a=b; Path=/services/main/web/x", b"a=b; Path=/services/main/web/x"),
        (b"__Host-a=b; Path=/; Secure", b"__Host-a=b; Path=/; Secure"),
    ],
)
def test_cookie(cookie: bytes, expected: bytes) -> None:
    """A cookie for a path of the replica becomes one for the path that the browser sees."""
    assert Rewriting(b"/services/main/web", b"x.test").cookie(cookie) == expected


def test_redirect_that_a_browser_follows(services: Any) -> None:
    """A replica that redirects to a path of its own, with a cookie for all of it, works below its prefix."""

    async def handler(request: Seen) -> None:
        if request.target == "/":
            head = f"Location: http://{request.header('host')}/in\r\nSet-Cookie: s=1; Path=/\r\nContent-Length: 0"
            await request.answer(f"HTTP/1.1 302 Found\r\n{head}\r\n\r\n".encode())
        else:
            body = f"{request.target} {request.header('cookie')}"
            await request.answer(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    services.add("web", handler)
    with services.client(follow_redirects=True) as client:
        answer = client.get("/services/main/web/")
    assert (answer.text, answer.url.path) == ("/in s=1", "/services/main/web/in")


# ------------------------------------------------------------------------------------------------------- refusals --

NONSENSE = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nab",
    "bad header": b"HTTP/1.1 200 OK\r\nBad Header: x\r\n\r\n",
    "NUL in a header": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
    "coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "status 999": b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    "switch without a name": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "long head": b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 5000 * 100 + b"\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X-Many: x\r\n" * 100_000,
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
def test_nonsense(services: Any, answer: bytes) -> None:
    """An answer that is none is a 502 that says why, or breaks off where its head is out already."""

    async def handler(request: Seen) -> None:
        await request.answer(answer)

    services.add("bad", handler)
    services.add("web", respond())
    try:
        found = services.get("/services/main/bad/")
        assert found.status_code == 502
        assert "'bad' failed: " in found.json()["detail"][0]["msg"]
        assert found.json()["detail"][0]["code"] == "bad_gateway"
    except httpx.RemoteProtocolError:
        assert b"chunked" in answer
    assert services.get("/services/main/web/").text == "ok"


def test_two_answers_to_one_request(services: Any) -> None:
    """What a replica sends beyond its answer is nobody's answer."""

    async def handler(request: Seen) -> None:
        await request.answer(
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
            b"HTTP/1.1 200 OK\r\nX-Evil: 1\r\nContent-Length: 4\r\n\r\nevil"
        )

    services.add("web", handler)
    with services.client() as client:
        for _ in range(3):
            answer = client.get("/services/main/web/")
            assert (answer.text, answer.headers.get("x-evil")) == ("one", None)


def test_unknown_service(services: Any) -> None:
    """A name that no service has is a 404 that says so."""
    answer = services.get("/services/main/nope/", headers={"authorization": "Bearer a-good-long-token-0123"})
    assert answer.status_code == 404
    assert "nope" in answer.json()["detail"][0]["msg"]


def test_nothing_ready(services: Any) -> None:
    """Without a ready replica a request waits, and then is told what was probed and what came of it."""
    services.set("web", [], auth=True, patience=0.1, problem="GET / on port 80 <refused>\nlast line of the log")
    token = {"authorization": "Bearer a-good-long-token-0123"}
    answer = services.get("/services/main/web/", headers=token)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "GET / on port 80 <refused>\nlast line of the log" in answer.json()["detail"][0]["msg"]
    page = services.get("/services/main/web/", headers={**token, "accept": "text/html,*/*"})
    assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
    assert "&lt;refused&gt;\nlast line of the log" in page.text


def test_log_of_a_public_service_is_not_public(services: Any) -> None:
    """Whoever may use a service without a token does not get to read its log."""
    services.set("web", [], auth=False, patience=0.1, problem="password=hunter2")
    answer = services.get("/services/main/web/")
    assert answer.status_code == 503
    assert "hunter2" not in answer.text
    known = services.get("/services/main/web/", headers={"authorization": "Bearer a-good-long-token-0123"})
    assert "hunter2" in known.text


def test_request_waits_for_a_replica(services: Any) -> None:
    """A request that comes before a replica is ready is answered by the first that is."""
    replica = services.replica(respond(b"at last"))
    services.set("web", [], auth=False)
    with services.connect() as connection:
        connection.sendall(get("/services/main/web/"))
        wait_until(lambda: "waiting for a replica" in services.events(), what="the wait")
        services.set("web", [replica.port])
        assert received(connection).endswith(b"at last")


# ------------------------------------------------------------------------------------------------------ smuggling --

POST = b"POST {} HTTP/1.1\r\nHost: x\r\n"
GET = b"GET {} HTTP/1.1\r\nHost: x\r\n"
BAD_REQUESTS = {
    "length and chunked": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "list of lengths": POST + b"Content-Length: 1, 1\r\n\r\na",
    "signed length": POST + b"Content-Length: +1\r\n\r\na",
    "odd coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "folded": GET + b"X: a\r\n b\r\n\r\n",
    "bare CR": GET + b"X: a\rY: b\r\n\r\n",
    "bare LF": b"GET {} HTTP/1.1\nHost: x\n\n",
    "NUL": GET + b"X: a\0b\r\n\r\n",
    "space in the path": b"GET {} x HTTP/1.1\r\nHost: x\r\n\r\n",
    "no ASCII in the path": b"GET {}\xe9 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET {}\r\n\r\n",
    "bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "two hosts": GET + b"Host: y\r\n\r\n",
    "two tokens": GET + b"Authorization: Basic eDp5\r\nAuthorization: Bearer x\r\n\r\n",
    "tunnel": b"CONNECT {} HTTP/1.1\r\nHost: x\r\n\r\n",
    "tunnel to a host": b"CONNECT x.test:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_ambiguous_request(services: Any, request_bytes: bytes) -> None:
    """A request that two parsers could read in two ways reaches no replica."""
    (replica,) = services.add("web", respond())
    with services.connect() as connection:
        connection.sendall(request_bytes.replace(b"{}", b"/services/main/web/"))
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert not answer or answer[9:12] in {b"400", b"401", b"501"}, answer
    assert [seen.target for seen in replica.seen if seen.method != "POST"] == []
    # One with a wrong chunk was begun: the replica is told that it never ended.
    wait_until(lambda: replica.open == 0 or not replica.seen, what="the end of what was begun")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /services/main/web/ HTTP/1.1\r\nX: " + b"x" * 80_000 + b"\r\n\r\n",
        b"GET /services/main/web/" + b"x" * 80_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /services/main/web/ HTTP/1.1\r\n" + b"X: x\r\n" * 20_000 + b"\r\n",
        b"GET /services/main/web/ HTTP/1.1\r\n" + b"X: x\r\n" * 2_000_000,
    ],
    ids=["header", "path", "headers", "endless"],
)
def test_long_head(services: Any, request_bytes: bytes) -> None:
    """A head that is too long is refused, however long the client goes on."""
    (replica,) = services.add("web", respond())
    with services.connect() as connection:
        try:
            connection.sendall(request_bytes)
            answer = connection.recv(1 << 16)
        except ConnectionError:
            answer = b""
    assert not answer or answer[9:12] in {b"431", b"400"}, answer
    assert not replica.seen


def test_requests_in_a_row(services: Any) -> None:
    """Requests that come in one piece are answered one after the other, each with its own answer."""

    async def handler(request: Seen) -> None:
        body = await request.body() or request.target.encode()
        await request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    services.add("web", handler)
    post = b"POST /services/main/web/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nGET /"
    answer = ask(services, post + post + get("/services/main/web/last"))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.endswith(b"/last")


@pytest.mark.parametrize(("path", "found"), [("/models/main/x", ("main", b"x")), ("/models/main/v1/x", ("main", b"x"))])
def test_model_paths(path: str, found: tuple[str, bytes]) -> None:
    """Both addresses that OpenAI's clients may be given are read; a path without project is none."""
    assert model_target(path.encode()) == found
    assert model_target(b"/models/") is None
    assert service_target(b"/services/main/", b"") is None
