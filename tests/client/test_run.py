"""`Run` and `SubmittedRun` against a scripted server: waiting, attaching, detaching, stopping."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from starlette.responses import Response

from dstack.api import AttachError, PortUsedError, Run, RunStatus, SubmittedRun
from dstack.api.server import APIClient
from dstack_core._client.ports import PortReservation, listen
from dstack_core._models.runs import Reason
from tests.client.scripted import ScriptedServer, json_of, located, run_model


class Page(BaseHTTPRequestHandler):
    """Says hello."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a web server, as a job would run it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as job:
        thread = threading.Thread(target=job.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield job.server_port
        job.shutdown()
        thread.join()


@pytest.fixture
def port() -> int:
    """A local port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def fetch(port: int) -> bytes:
    """The page at a local port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return bytes(answer.read())


def serving(server: ScriptedServer, api: APIClient, *models: Any) -> Run:
    """A run that is as `models` say, one after the other."""
    server.on("get", *[lambda _, model=model: json_of(model) for model in models]).on("stop", lambda _: Response("{}"))
    return Run(api, models[0])


def test_what_a_run_says_before_it_has_an_instance(api: APIClient) -> None:
    """Everything can be asked at any time."""
    run = Run(api, run_model(RunStatus.SUBMITTED))
    assert (run.name, run.status, run.backend, run.hostname, run.ports) == (
        "a-run",
        RunStatus.SUBMITTED,
        None,
        None,
        None,
    )
    assert (run.exit_code, run.reason, run.message, run.finished_at, run.cost) == (None, None, None, None, 0.0)
    assert repr(run) == "<Run 'a-run': submitted>"


def test_what_a_run_says_that_has_no_jobs_yet(api: APIClient) -> None:
    """A run whose first job is not made yet has no instance either."""
    run = Run(api, run_model(RunStatus.PENDING, jobs=()))
    assert (run.backend, run.hostname, run.exit_code) == (None, None, None)


def test_what_a_failed_run_says(api: APIClient) -> None:
    """Where it ran, and why it ended."""
    model = run_model(RunStatus.FAILED, at=located(), reason=Reason.EXITED_WITH_ERROR, message="the job exited with 3")
    run = Run(api, model)
    assert (run.backend, run.hostname) == ("local", "127.0.0.1")
    assert (run.reason, run.message) == (Reason.EXITED_WITH_ERROR, "the job exited with 3")
    assert repr(run) == "<Run 'a-run': failed on local>"


def test_refresh_asks_for_this_very_run(server: ScriptedServer, api: APIClient) -> None:
    """By id: the name may belong to another run by now."""
    run = serving(server, api, run_model(RunStatus.DONE))
    run.refresh()
    assert run.status is RunStatus.DONE
    assert server.asked("get")[0]["run_id"] == str(run.id)


def test_attach_waits_for_news_instead_of_asking_again_and_again(server: ScriptedServer, api: APIClient) -> None:
    """Each question waits for a version newer than the one that is known."""
    submitted = run_model(RunStatus.SUBMITTED, version=3)
    pulling = run_model(RunStatus.PULLING, version=4)
    run = serving(server, api, submitted, pulling, run_model(RunStatus.RUNNING, at=located(), version=5))
    assert run.attach() is True
    assert [asked["after_version"] for asked in server.asked("get")] == [None, 3, 4]
    assert all(asked["wait"] > 0 for asked in server.asked("get")[1:])
    assert run.ports == {}
    run.detach()
    assert run.ports is None


@pytest.mark.parametrize("status", [s for s in RunStatus if s.is_finished])
def test_attaching_to_a_run_that_has_ended(server: ScriptedServer, api: APIClient, status: RunStatus) -> None:
    """True only if it ended well."""
    run = serving(server, api, run_model(status, ports=[(80, None)]))
    assert run.attach() is (status is RunStatus.DONE)
    assert run.ports is None


def test_attach_forwards_to_where_the_job_listens(server: ScriptedServer, api: APIClient, page: int, port: int) -> None:
    """A container's port appears at the local port that was asked for, until detached."""
    model = run_model(ports=[(80, port)], at=located(ports={80: page}))
    run = serving(server, api, model)
    assert run.attach()
    assert run.attach()
    assert run.ports == {80: port}
    assert fetch(port) == b"hello"
    run.detach()
    run.detach()
    with pytest.raises(OSError, match="refused"):
        fetch(port)


def test_attach_finds_a_free_port(server: ScriptedServer, api: APIClient, page: int) -> None:
    """`"*:80"`: any free one, and `ports` says which."""
    run = serving(server, api, run_model(ports=[(80, None)], at=located(ports={80: page})))
    with run:
        run.attach()
        assert run.ports is not None
        assert fetch(run.ports[80]) == b"hello"
    assert run.ports is None


def test_a_process_that_listens_at_the_wanted_port_needs_no_forwarding(
    server: ScriptedServer, api: APIClient, page: int
) -> None:
    """The same port on both sides of the same computer: it is there already."""
    run = serving(server, api, run_model(ports=[(page, page)], at=located(ports={page: page})))
    run.attach()
    assert run.ports == {page: page}
    assert fetch(page) == b"hello"
    run.detach()
    assert fetch(page) == b"hello"


def test_a_process_that_listens_at_any_port_needs_no_forwarding(
    server: ScriptedServer, api: APIClient, page: int
) -> None:
    """Any local port will do, so the job's own does."""
    run = serving(server, api, run_model(ports=[(page, None)], at=located()))
    run.attach()
    assert run.ports == {page: page}
    run.detach()


def test_a_port_that_is_taken_at_attach(server: ScriptedServer, api: APIClient, page: int, port: int) -> None:
    """Said with the holder; nothing stays half attached."""
    run = serving(server, api, run_model(ports=[(81, None), (80, port)], at=located(ports={80: page, 81: page})))
    with listen(port), pytest.raises(PortUsedError):
        run.attach()
    assert run.ports is None
    assert run.attach()
    run.detach()


def test_ports_on_another_computer(server: ScriptedServer, api: APIClient) -> None:
    """This version forwards on this computer only, and says so."""
    away = located(hostname="10.1.2.3", same_host_as_server=False)
    run = serving(server, api, run_model(ports=[(80, None)], at=away))
    with pytest.raises(AttachError, match=r"another computer \(10\.1\.2\.3\)"):
        run.attach()


def test_what_was_reserved_is_what_is_attached(server: ScriptedServer, api: APIClient, page: int, port: int) -> None:
    """The port that was held from the submit on is forwarded without being free for a moment."""
    model = run_model(ports=[(80, port)], at=located(ports={80: page}))
    serving(server, api, model)
    run = SubmittedRun(api, model, PortReservation([(80, port)]))
    with pytest.raises(PortUsedError):
        listen(port)
    run.attach()
    assert fetch(port) == b"hello"
    run.stop()
    listen(port).close()
    assert server.asked("stop") == [{"runs_names": [], "run_ids": [str(run.id)], "abort": False}]


def test_a_held_port_that_the_job_serves_itself_is_given_to_it(
    server: ScriptedServer, api: APIClient, page: int, port: int
) -> None:
    """Where the job listens at the very port, forwarding would lead in a circle."""
    model = run_model(ports=[(port, port)], at=located(ports={port: port}))
    serving(server, api, model)
    run = SubmittedRun(api, model, PortReservation([(port, port)]))
    run.attach()
    assert run.ports == {port: port}
    listen(port).close()
    run.detach()


def test_the_ports_of_a_run_that_fails_are_given_back(server: ScriptedServer, api: APIClient, port: int) -> None:
    """Nothing will ever be forwarded to them."""
    model = run_model(RunStatus.FAILED, ports=[(80, port)])
    serving(server, api, model)
    run = SubmittedRun(api, model, PortReservation([(80, port)]))
    assert run.attach() is False
    listen(port).close()


def test_abort(server: ScriptedServer, api: APIClient) -> None:
    """`abort` is passed on."""
    run = serving(server, api, run_model())
    run.stop(abort=True)
    assert server.asked("stop")[0]["abort"] is True
