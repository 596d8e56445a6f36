"""A service as the program holds it that submitted it: where it is, whether it is ready, and where attach leads."""

from __future__ import annotations

import socket
import uuid
from typing import Any

import pytest

from dstack.api import PortUsedError, Run, RunStatus, Service, Task
from dstack.api.server import APIClient
from dstack_core._client.ports import to_hold, with_free_ports
from dstack_core._models.configurations import AppSpec
from dstack_core._models.offers import Requirements
from dstack_core._models.runs import Job, JobSpec, JobSubmission, ServiceInfo
from dstack_core._models.runs import Run as RunModel
from tests.client.scripted import NOW, ScriptedServer, info, json_of, located, log_end, run_model

S = RunStatus


def a_service(*, ready: int = 1, **changes: Any) -> RunModel:
    """A service that runs."""
    service = ServiceInfo(path="/services/main/a-run/", model="llama", replicas=2, ready=ready)
    return run_model(**{"service": service, **changes})


def on_loopback_only(api: APIClient) -> APIClient:
    """The same client, as for a local server, which alone can say where its services are."""
    api._connection.services_url = None
    return api


def test_the_address_on_a_shared_server(api: APIClient, server: ScriptedServer) -> None:
    """The server's own, and the path; nobody is asked for it."""
    run = Run(api, a_service())
    assert run.url == run.service_url == f"{server.url}/services/main/a-run/"
    model = run.service_model
    assert model is not None
    assert (model.name, model.url) == ("llama", f"{server.url}/models/main/")
    assert server.requests == []


def test_no_address_holds_a_password() -> None:
    """What the URL of the server says of its user stays with the client."""
    api = APIClient("http://me:hush@127.0.0.1:3000/dstack/")
    assert Run(api, a_service()).url == "http://127.0.0.1:3000/dstack/services/main/a-run/"
    api.close()


def test_the_address_on_the_local_server(api: APIClient, server: ScriptedServer) -> None:
    """Where that server says; nowhere, as long as it says nothing."""
    run = Run(on_loopback_only(api), a_service())
    assert (run.url, run.service_model) == (None, None)
    server.on("server/info", lambda _: json_of(info(services_url="http://127.0.0.1:41234")))
    assert run.url == "http://127.0.0.1:41234/services/main/a-run/"


def test_what_is_no_service_has_no_address(api: APIClient) -> None:
    """A task, and a service that has ended; a service without a model has no model."""
    for model in (run_model(), run_model(S.TERMINATED)):
        assert (Run(api, model).url, Run(api, model).service_model) == (None, None)
    bare = run_model(service=ServiceInfo(path="/services/main/a-run/"))
    assert Run(api, bare).service_model is None


def test_waiting_until_it_is_ready(server: ScriptedServer, api: APIClient) -> None:
    """Until one replica is, until the run has ended, or until the time is over."""
    unready, done = a_service(ready=0), run_model(S.FAILED)
    for last, expected in ((a_service(ready=1), True), (done, False)):
        answers = [lambda _, model=model: json_of(model) for model in (unready, unready, last)]
        server.on("get", *answers)
        assert Run(api, unready).wait_until_ready() is expected
    server.on("get", lambda _: json_of(unready))
    assert Run(api, unready).wait_until_ready(timeout=0.05) is False


def replica(number: int, status: RunStatus, port: int, *, ready: bool) -> Job:
    """One replica, whose port 8000 is at `port` of this computer."""
    spec = JobSpec(
        job_name=f"a-run-{number}-0",
        replica_num=number,
        app_specs=(AppSpec(port=8000, map_to_port=None, app_name="app_0"),),
        requirements=Requirements(),
    )
    attempt = JobSubmission(
        id=uuid.UUID(int=number),
        submission_num=0,
        submitted_at=NOW,
        status=status,
        ready_at=NOW if ready else None,
        job_provisioning_data=located(ports={8000: port}),
    )
    return Job(job_spec=spec, job_submissions=(attempt,))


@pytest.mark.parametrize(("ready", "where"), [((False, False), 1), ((False, True), 2), ((True, True), 1)])
def test_attach_leads_to_a_replica_that_is_ready(
    server: ScriptedServer, api: APIClient, ready: tuple[bool, bool], where: int
) -> None:
    """The first that is; else the first that runs. The one that waits for its machine is no choice."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in listeners]
    jobs = (
        replica(0, S.PROVISIONING, ports[0], ready=False),
        replica(1, S.RUNNING, ports[1], ready=ready[0]),
        replica(2, S.RUNNING, ports[2], ready=ready[1]),
    )
    server.on("get", lambda _: json_of(a_service(jobs=jobs)))
    run = Run(api, a_service(jobs=jobs))
    try:
        assert run.attach()
        assert run.ports is not None
        listeners[where].settimeout(30)
        with socket.create_connection(("127.0.0.1", run.ports[8000])):
            listeners[where].accept()[0].close()
    finally:
        run.detach()
        for listener in listeners:
            listener.close()


def test_logs_of_another_replica(server: ScriptedServer, api: APIClient) -> None:
    """Which one is part of the question; replica 0 need not be named."""
    server.on("logs", lambda _: log_end(0))
    run = Run(api, a_service())
    list(run.logs(replica_num=1))
    list(run.logs())
    assert [asked.get("replica_num") for asked in server.asked("logs")] == ["1", None]


def test_the_port_of_the_web_is_a_wish() -> None:
    """A service's bare port holds no local port at submit, and gets any free one where 80 cannot be had."""
    assert to_hold(Service(commands=["true"], port=8080)) == []
    assert to_hold(Service(commands=["true"], port="8000:8080")) == [(8080, 8000)]
    assert to_hold(Task(commands=["true"], ports=["80:8080"])) == [(8080, 80)]
    try:
        with socket.create_server(("127.0.0.1", 80)):
            taken = with_free_ports([(8080, 80)])
    except OSError:
        taken = with_free_ports([(8080, 80)])
    assert taken == [(8080, None)]
    assert with_free_ports([(8080, 8000)]) == [(8080, 8000)]


def test_a_port_that_was_asked_for_is_no_wish(server: ScriptedServer, api: APIClient) -> None:
    """Taken, it is refused as that of a task is."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        job = replica(0, S.RUNNING, 1, ready=True)
        wanted = AppSpec(port=8000, map_to_port=taken.getsockname()[1], app_name="app_0")
        spec = job.job_spec.model_copy(update={"app_specs": (wanted,)})
        jobs = (job.model_copy(update={"job_spec": spec}),)
        server.on("get", lambda _: json_of(a_service(jobs=jobs)))
        with pytest.raises(PortUsedError):
            Run(api, a_service(jobs=jobs)).attach()
