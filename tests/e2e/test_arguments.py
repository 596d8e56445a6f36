"""What is passed to the client arrives: each argument of submit, of plans, and of the client itself."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from dstack.api import (
    Client,
    ConfigurationError,
    Profile,
    Resources,
    RetryPolicy,
    ServerClientError,
    Service,
    SpotPolicy,
    Task,
    VirtualRepo,
)
from tests.e2e.test_server_real import TOKEN, shared
from tests.support.homes import Home, ended

__all__ = ["shared"]

TASK = Task(commands=["pwd; echo done"])
REPO = VirtualRepo("none")


def profile_of(spec: Any) -> dict[str, Any]:
    """What was passed beside the configuration, as the server has it."""
    profile = spec.profile
    return {name: getattr(profile, name) for name in ("backends", "spot_policy", "max_duration", "max_price")}


PASSED = {"backends": ("local",), "spot_policy": SpotPolicy.ONDEMAND, "max_duration": 3600, "max_price": 1.5}


def test_every_argument_of_submit_reaches_the_server(client: Client) -> None:
    """Each argument of `submit` is in the run as the server keeps it, and the run obeys it."""
    before = datetime.now(UTC)
    run = client.runs.submit(
        configuration=TASK,
        configuration_path="train.dstack.yml",
        repo=REPO,
        backends=["local"],
        resources=Resources(cpu=1, memory="1MB"),
        spot_policy="on-demand",
        retry_policy=RetryPolicy(limit="1h"),
        max_duration="1h",
        max_price=1.5,
        working_dir="deep/inside",
        run_name="every-argument",
        reserve_ports=False,
    )
    spec = client.client.get_run(client.project, run.name).run_spec
    assert profile_of(spec) == PASSED
    assert spec.profile.retry_policy == RetryPolicy(retry=True, limit=3600)
    assert str(spec.profile.resources.memory) == "1MB.."
    assert (spec.configuration_path, spec.working_dir) == ("train.dstack.yml", "deep/inside")
    assert run.name == "every-argument"
    assert before - timedelta(seconds=5) < run.submitted_at < datetime.now(UTC) + timedelta(seconds=5)
    assert b"/deep/inside\n" in b"".join(ended(run).logs())


def test_every_argument_of_a_plan_reaches_the_server(client: Client) -> None:
    """Each argument of `get_plan` is in the plan, and `exec_plan` submits what was planned."""
    plan = client.runs.get_plan(
        configuration=TASK,
        repo=REPO,
        configuration_path="train.dstack.yml",
        backends=["local"],
        resources=Resources(cpu=1),
        spot_policy="on-demand",
        retry_policy=RetryPolicy(retry=True),
        max_duration="1h",
        max_price=1.5,
        working_dir="planned",
        run_name="planned",
    )
    assert profile_of(plan.run_spec) == PASSED
    assert [offer.backend for offer in plan.job_plans[0].offers] == ["local"]
    run = client.runs.exec_plan(run_plan=plan, repo=REPO, reserve_ports=False)
    assert run.name == "planned"
    assert b"/planned\n" in b"".join(ended(run).logs())


def test_a_client_can_be_made_of_its_parts(client: Client) -> None:
    """`Client(...)` with the low-level client of another one sees the same runs; a key for SSH is used where SSH is."""
    run = client.runs.submit(TASK)
    other = Client(api_client=client.client, project_name=client.project, ssh_identity_file="~/.ssh/none")
    found = other.runs.get(run.name)
    assert found is not None
    assert found.id == run.id
    assert found.attach(ssh_identity_file="~/.ssh/none") in (True, False)
    with Client.from_config(ssh_identity_file="~/.ssh/none") as third:
        assert third.project == client.project


@pytest.mark.parametrize("fields", [{"nodes": 2}, {"groups": [{"name": "a", "nodes": 2}]}])
def test_what_is_not_carried_out_is_refused(client: Client, fields: dict[str, Any]) -> None:
    """A field that this version cannot carry out is refused by name, never passed over."""
    task = Task.model_validate({"commands": ["true"], **fields})
    with pytest.raises((ConfigurationError, ServerClientError), match=next(iter(fields))):
        client.runs.submit(task)


def test_a_profile_reaches_the_plan_and_gives_way_to_what_is_passed(client: Client) -> None:
    """What `profile` says is in the plan, but for what is passed beside it."""
    profile = Profile(name="cheap", backends=["local"], max_price=3.0, max_duration="2h")
    plan = client.runs.get_plan(TASK, profile=profile, max_price=1.5, spot_policy="on-demand", max_duration="1h")
    assert profile_of(plan.run_spec) == PASSED


ECHO = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def test_a_service_says_who_may_ask_and_which_path_it_sees(shared: str, home: Home) -> None:
    """On a shared server, `auth=False` lets everybody in, and `strip_prefix=False` keeps the path as it came."""
    with Client.from_config("main", shared, TOKEN) as client:
        commands = [f'exec {sys.executable} -c "$ECHO"']
        guarded = Service(name="guarded", port=8000, commands=commands, env={"ECHO": ECHO})
        public = Service(
            name="public", port=8001, commands=commands, env={"ECHO": ECHO}, auth=False, strip_prefix=False
        )
        runs = [client.runs.submit(service, reserve_ports=False) for service in (guarded, public)]
        try:
            assert [run.wait_until_ready(timeout=60) for run in runs] == [True, True]
            assert httpx.get(f"{runs[0].url}x").status_code == 401
            assert httpx.get(f"{runs[0].url}x", headers={"Authorization": f"Bearer {TOKEN}"}).text == "/x"
            assert httpx.get(f"{runs[1].url}x").text == "/services/main/public/x"
        finally:
            for run in runs:
                run.stop(abort=True)
