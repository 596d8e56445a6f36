"""The low-level client against a server that misbehaves: retries, refusals, versions, secrets."""

from __future__ import annotations

import os
import socket
import threading
import uuid

import pytest
from starlette.responses import Response

from dstack.api import (
    ClientError,
    NoOffersError,
    NotFoundError,
    RunNameTakenError,
    ServerClientError,
    ServerUnavailableError,
    VersionMismatchError,
)
from dstack.api.server import APIClient
from dstack_core import __version__
from dstack_core._models.wire import API_VERSION
from dstack_core.errors import DstackError
from tests.client.scripted import TOKEN, ScriptedServer, info, json_of, lost, refusal, run_model


def submit(api: APIClient) -> None:
    """Submits a run named `a-run`."""
    spec = run_model().run_spec.model_copy(update={"run_name": "a-run"})
    api.submit("main", spec, uuid.UUID(int=9))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "error", ServerClientError),
        (400, "no_offers", NoOffersError),
        (404, "not_found", NotFoundError),
        (409, "run_name_taken", RunNameTakenError),
        (401, "unauthorized", ServerClientError),
        (403, "forbidden", ServerClientError),
        (400, "of a newer server", ServerClientError),
        (500, "server_error", ClientError),
    ],
)
def test_a_refusal_is_an_error_of_its_class(
    server: ScriptedServer, api: APIClient, status: int, code: str, kind: type[Exception]
) -> None:
    """The server's words, and the class that its code stands for."""
    server.on("runs/list", lambda _: refusal(status, code, "First this.", "Then that."))
    with pytest.raises(kind) as raised:
        api.list_runs("main")
    assert type(raised.value) is kind
    assert str(raised.value) == "First this.\nThen that."


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (Response("<html>bad gateway</html>", 502), ServerUnavailableError, "502 Bad Gateway"),
        (Response("nope", 418), ClientError, "which a dstack server does not say"),
        (Response("[]", 500), ClientError, "500 Internal Server Error"),
        (Response('{"detail": "text"}', 400), ClientError, "400 Bad Request"),
        (Response("", 302, {"location": "/login"}), ClientError, "302 Found"),
    ],
)
def test_answers_of_something_else(
    server: ScriptedServer, api: APIClient, answer: Response, kind: type[Exception], says: str
) -> None:
    """A proxy, a login page, another program: said with its status and the address."""
    server.on("runs/list", lambda _: answer)
    with pytest.raises(kind, match=says) as raised:
        api.list_runs("main")
    assert server.url in str(raised.value)


def test_an_address_where_something_else_answers(server: ScriptedServer, api: APIClient) -> None:
    """The first question shows that it is no dstack server."""
    server.on("server/info", lambda _: Response("<html>hello</html>"))
    with pytest.raises(ServerUnavailableError, match=r"is no dstack server\. Check its url"):
        api.list_runs("main")


def test_a_newer_server_asks_for_a_newer_client(server: ScriptedServer, api: APIClient) -> None:
    """Another version of the HTTP API: the pip line says what to install here."""
    server.on("server/info", lambda _: json_of(info(api=API_VERSION + 1, version="99.1")))
    with pytest.raises(VersionMismatchError, match=r"pip install --upgrade 'dstack-core==99\.1'"):
        api.list_runs("main")


def test_an_older_server_is_to_be_upgraded(server: ScriptedServer, api: APIClient) -> None:
    """Another version of the HTTP API: says which side is old."""
    server.on("server/info", lambda _: json_of(info(api=API_VERSION - 1, version="0.0.1")))
    with pytest.raises(VersionMismatchError, match=r"older than this client .*Upgrade the server"):
        api.list_runs("main")


def test_a_newer_server_of_the_same_api_is_used(server: ScriptedServer, api: APIClient) -> None:
    """The API's version is what counts, and it is asked for once."""
    server.on("server/info", lambda _: json_of(info(version="99.1"))).on("runs/list", lambda _: Response("[]"))
    assert api.list_runs("main") == []
    assert api.list_runs("main") == []
    assert len(server.asked("server/info")) == 1


def test_the_token_goes_to_the_server_and_nowhere_else(server: ScriptedServer, api: APIClient) -> None:
    """Sent as a header; in no representation and no message."""
    server.on("runs/list", lambda _: Response("nope", 418))
    with pytest.raises(ClientError) as raised:
        api.list_runs("main")
    assert server.headers["authorization"] == f"Bearer {TOKEN}"
    assert __version__ in server.headers["user-agent"]
    assert TOKEN not in f"{api!r} {raised.value!r} {raised.value.__cause__!r}"


def test_user_and_password_of_a_url_are_not_shown() -> None:
    """A URL may hold secrets, too."""
    api = APIClient("http://me:hush@127.0.0.1:9")
    assert "hush" not in repr(api)
    with pytest.raises(ServerUnavailableError) as raised:
        api.list_runs("main")
    assert "hush" not in str(raised.value)


def test_nobody_there() -> None:
    """Says who does not answer, why, and that nothing was submitted."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerUnavailableError, match="refused") as raised:
        submit(APIClient(f"http://127.0.0.1:{port}", "t"))
    assert "Check that it runs" in str(raised.value)
    assert str(raised.value).endswith("The run was not submitted.")


def test_a_host_that_does_not_exist_is_not_tried_for_long() -> None:
    """No such name: the second try would say the same."""
    with pytest.raises(ServerUnavailableError, match="does not answer"):
        APIClient("http://nowhere.invalid:1", "t").list_runs("main")


def test_a_submit_whose_answer_is_lost_is_repeated_with_the_same_key(server: ScriptedServer, api: APIClient) -> None:
    """The server acted, the connection died before it could say so: the same key again, so the run exists once."""
    server.on("runs/submit", lost, lost, lambda _: json_of(run_model()))
    submit(api)
    assert [asked["submit_key"] for asked in server.asked("runs/submit")] == [str(uuid.UUID(int=9))] * 3


def test_a_submit_that_stays_unanswered_says_so(
    server: ScriptedServer, api: APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last try it is not known whether the run exists, and the message names it."""
    monkeypatch.setattr("dstack_core._client.connection.PATIENCE", 0.2)
    server.on("runs/submit", lost)
    with pytest.raises(ServerUnavailableError, match="not known whether the run 'a-run' was submitted"):
        submit(api)


def test_a_submit_that_meets_another_server_on_its_second_try_says_so(server: ScriptedServer, api: APIClient) -> None:
    """Whatever ends the tries after one that was sent, the error says that the run may exist."""
    server.on("runs/submit", lost, lambda _: Response("nope", 418))
    with pytest.raises(ClientError) as raised:
        submit(api)
    assert "not known whether the run 'a-run' was submitted" in raised.value.__notes__[0]


def test_a_server_that_comes_back_is_found_again(server: ScriptedServer) -> None:
    """A restart of the server is a pause, not an error."""
    api = APIClient(server.url, TOKEN)
    server.on("runs/list", lambda _: Response("[]"))
    api.list_runs("main")
    server.__exit__()
    answers: list[object] = []
    reader = threading.Thread(target=lambda: answers.append(api.list_runs("main")))
    reader.start()
    again = ScriptedServer(server.port)
    again.on("runs/list", lambda _: Response("[]"))
    with again:
        reader.join(60)
        api.close()
    assert answers == [[]]


def test_many_threads_share_a_client(server: ScriptedServer, api: APIClient) -> None:
    """All of 64 threads get an answer at the same time."""
    together = threading.Barrier(64, timeout=60)

    def answer(_: object) -> Response:
        return Response("[]")

    server.on("runs/list", answer)
    results: list[object] = []

    def ask() -> None:
        together.wait()
        results.append(api.list_runs("main"))

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[]] * 64


def test_a_forked_child_has_connections_of_its_own(server: ScriptedServer, api: APIClient) -> None:
    """Parent and child take turns with one client, and neither reads the other's answers."""
    import warnings

    server.on("runs/list", lambda _: Response("[]"))
    api.list_runs("main")
    with warnings.catch_warnings():
        # The scripted server's thread is none of the child's business.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        os._exit(0 if [api.list_runs("main") for _ in range(20)] == [[]] * 20 else 1)
    assert [api.list_runs("main") for _ in range(20)] == [[]] * 20
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_closed_client_can_be_used_again(server: ScriptedServer, api: APIClient) -> None:
    """Closing gives the connections back; the next request opens new ones."""
    server.on("runs/list", lambda _: Response("[]"))
    for _ in range(2):
        assert api.list_runs("main") == []
        api.close()


def test_names_are_quoted_in_paths(server: ScriptedServer, api: APIClient) -> None:
    """A project whose name holds a slash does not lead elsewhere."""
    with pytest.raises(DstackError):
        api.list_runs("a/../b c")
    assert server.requests[-1][0] == "api/project/a/../b c/runs/list"


def test_every_request_of_the_protocol(server: ScriptedServer, api: APIClient) -> None:
    """Each method asks its route, and reads the answer into the server's own model."""
    run = run_model()
    server.on("stop", lambda _: Response("{}")).on("delete", lambda _: Response("{}"))
    server.on("list", lambda _: Response(f"[{run.model_dump_json()}]")).on("get", lambda _: json_of(run))
    metrics = '{"at": "2026-01-01T00:00:00Z", "cpu_seconds": 1, "memory_mib": 2, "processes": 3}'
    server.on("metrics", lambda _: Response(metrics))
    assert api.get_server_info() == info()
    assert api.list_runs("main", all=True, limit=3) == [run]
    assert api.get_run("main", "a-run") == run
    assert api.get_metrics("main", run.id).processes == 3
    api.stop_runs("main", ["a-run"], abort=True)
    api.delete_runs("main", ["a-run"])
    assert server.asked("runs/list") == [{"all": True, "limit": 3}]
    assert server.asked("runs/stop") == [{"runs_names": ["a-run"], "run_ids": [], "abort": True}]
    assert server.asked("runs/delete") == [{"runs_names": ["a-run"]}]
