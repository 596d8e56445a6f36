"""Whoever is attached to a dev environment says so, again and again, and stops with the attachment."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from starlette.responses import Response

from dstack.api import DevEnvironment, Profile, Run
from dstack.api.server import APIClient
from dstack_core._models.offers import Requirements
from dstack_core._models.runs import Job, JobSpec, RunSpec
from dstack_core._models.runs import Run as RunModel
from dstack_core.testing import wait_until
from tests.client.scripted import ScriptedServer, json_of, located, refusal, run_model


def model(inactivity: int | None) -> RunModel:
    """A dev environment that runs on this computer."""
    base = run_model(at=located())
    spec = JobSpec(job_name="a-run-0-0", requirements=Requirements(), inactivity_duration=inactivity)
    job = Job(job_spec=spec, job_submissions=base.jobs[0].job_submissions)
    return base.model_copy(
        update={"jobs": (job,), "run_spec": RunSpec(configuration=DevEnvironment(), profile=Profile())}
    )


def good(_: dict[str, Any]) -> Response:
    """Taken note of."""
    return Response("{}", media_type="application/json")


@pytest.fixture
def attached(server: ScriptedServer, api: APIClient) -> Run:
    """An attached dev environment that ends after a second without anybody."""
    found = model(1)
    server.on("runs/get", lambda _: json_of(found)).on("activity", good)
    run = Run(api, found)
    assert run.attach()
    return run


def threads() -> list[threading.Thread]:
    """Those that say so."""
    return [thread for thread in threading.enumerate() if thread.name == "dstack-presence"]


def test_it_is_said_at_once_and_again(server: ScriptedServer, attached: Run) -> None:
    """Of this very run, several times within what it stays without."""
    began = time.monotonic()
    wait_until(lambda: len(server.asked("activity")) >= 5, timeout=30, what="five words")
    assert time.monotonic() - began > 0.9
    paths = {path for path, _ in server.requests if path.endswith("activity")}
    assert paths == {f"api/project/main/runs/{attached.id}/activity"}
    attached.detach()


def test_no_word_after_detaching(server: ScriptedServer, attached: Run) -> None:
    """The thread is gone when `detach` returns; a second `detach` does nothing."""
    assert len(threads()) == 1
    assert threads()[0].daemon
    attached.detach()
    assert threads() == []
    said = len(server.asked("activity"))
    attached.detach()
    assert len(server.asked("activity")) == said
    assert attached.attach()
    wait_until(lambda: len(server.asked("activity")) > said, timeout=30, what="a word after attaching again")
    attached.detach()


def test_a_server_that_refuses_is_told_again(server: ScriptedServer, attached: Run) -> None:
    """Something is wrong with it for a while; nobody notices."""
    server.on("activity", lambda _: refusal(409, "error", "not now"), lambda _: Response("oops", 500), good)
    said = len(server.asked("activity"))
    wait_until(lambda: len(server.asked("activity")) >= said + 4, timeout=30, what="words after the refusals")
    attached.detach()


def test_a_run_that_is_deleted(server: ScriptedServer, attached: Run) -> None:
    """There is nothing left to say."""
    server.on("activity", lambda _: refusal(404, "not_found", "there is no such run"))
    wait_until(lambda: threads() == [], timeout=30, what="the end of the thread")
    attached.detach()


def test_a_word_that_takes_long_holds_nobody_up(server: ScriptedServer, attached: Run) -> None:
    """`detach` does not wait for a server that does not answer."""
    go, asked, answered = threading.Event(), threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> Response:
        asked.set()
        go.wait(60)
        answered.set()
        return good(body)

    server.on("activity", slow)
    assert asked.wait(30)
    attached.detach()
    assert not answered.is_set()
    go.set()
    wait_until(lambda: threads() == [], timeout=30, what="the end of the thread")


def test_a_run_that_ends_for_no_want_of_activity(server: ScriptedServer, api: APIClient) -> None:
    """Without a limit there is nothing to say."""
    server.on("runs/get", lambda _: json_of(model(None))).on("activity", good)
    with Run(api, model(None)) as run:
        assert run.attach()
        assert threads() == []
    assert server.asked("activity") == []
