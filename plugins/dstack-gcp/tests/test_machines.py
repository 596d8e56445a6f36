"""Runs on Compute Engine, end to end: a real server, the unmodified SDK, and instances that are machines which boot."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from dstack.api import Client, Profile, RetryPolicy, Run, RunStatus, Task
from dstack_core.testing import Event, Fleet
from tests.support.booting_cloud import LONG, configure, fail_at, machine_of, nothing_billed, served_through_attach
from tests.support.gcp import Gcp
from tests.support.homes import Home, ended

pytestmark = pytest.mark.machines
SECRET = "pass-word-of-the-job"
KIND = "e2-standard-4"
INSERT = "compute.instances.insert"


@pytest.fixture
def cloud(fleet: Fleet) -> Iterator[Gcp]:
    """Google Cloud whose instances are machines; when the test is over nothing of it may still cost money."""
    with Gcp(("us-central1",), fleet=fleet) as cloud:
        yield cloud


@pytest.fixture
def gcp_home(home: Home, cloud: Gcp, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose server has this cloud."""
    configure(home, cloud, monkeypatch, "gcp")
    return home


@pytest.fixture
def client(gcp_home: Home) -> Client:
    """A client of that server."""
    assert gcp_home.server_pid() is None
    return Client.from_config()


def submit(client: Client, *commands: str, spot: str = "on-demand", **more: object) -> Run:
    """A task on Compute Engine."""
    profile = Profile(name="one", instance_types=[KIND], spot_policy=spot)
    task = Task(commands=list(commands), env={"WORD": SECRET})
    return client.runs.submit(task, backends=["gcp"], profile=profile, **more)  # type: ignore[arg-type]  # by name


def account(run: Run) -> str:
    """What the server and the machine did."""
    return b"".join(run.logs(diagnose=True)).decode()


def test_a_task(client: Client, cloud: Gcp, fleet: Fleet, home: Home) -> None:
    """It runs on a machine that was bought for it, and the machine is gone afterwards; its secret was nowhere."""
    run = submit(client, "echo from $(hostname)", "exit 7")
    machine = machine_of(fleet, cloud)
    assert b"".join(run.logs()).decode() == f"from {machine.name}\n", account(run)
    assert ended(run, LONG).status is RunStatus.FAILED
    assert "exited with code 7" in account(run)
    nothing_billed(cloud)
    (server,) = cloud.truth().servers
    shown = f"{server.labels} {cloud.server(server.id).body} {account(run)} {home.log()}"
    assert SECRET not in shown
    assert json.loads(cloud.config()["creds"]["data"])["private_key"] not in shown


def test_attaching(client: Client, cloud: Gcp) -> None:
    """A port of the instance is fetched from here, over SSH, with the user's own key."""
    served_through_attach(client, "gcp", KIND)
    nothing_billed(cloud)


def test_a_task_that_is_stopped(client: Client, cloud: Gcp) -> None:
    """The machine is gone afterwards."""
    run = submit(client, "echo here", "while :; do sleep 1; done")
    assert next(iter(run.logs())) == b"here\n", account(run)
    run.stop()
    assert ended(run, LONG).status is RunStatus.TERMINATED, account(run)
    nothing_billed(cloud)


def test_zones_without_capacity_are_passed_over(client: Client, cloud: Gcp) -> None:
    """Two zones have none, which Google says in the operation: each is asked once, and the third has one."""
    for zone in ("us-central1-a", "us-central1-b"):
        cloud.plane.capacity(0, zone=zone)
    run = submit(client, "echo here")
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE
    assert cloud.seen[INSERT] == 3
    refused = [line for line in account(run).splitlines() if "intent -> failed" in line]
    assert len(refused) == 2
    assert all("ZONE_RESOURCE_POOL_EXHAUSTED" in line for line in refused)
    nothing_billed(cloud)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_is_killed_while_it_creates(gcp_home: Home, cloud: Gcp, when: str) -> None:
    """Right before and right after the cloud is asked: the next server finishes the run, on one machine."""
    server = fail_at(gcp_home, "create", when)
    run = submit(Client.from_config(), "echo here")
    assert server.wait(LONG) == -signal.SIGKILL
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE, account(run)
    assert len(cloud.truth().servers) == 1
    nothing_billed(cloud)


def test_a_spot_instance_that_is_taken_away(client: Client, cloud: Gcp) -> None:
    """The first machine is taken away in the middle; the policy says so, so the run goes on with another one."""
    forever = ("echo on $(hostname)", "while :; do sleep 1; done")
    run = submit(client, *forever, spot="spot", retry_policy=RetryPolicy(retry=True))
    said, first = b"", ""
    for chunk in run.logs():
        said += chunk
        if not first:
            (server,) = cloud.truth().servers
            first = server.id
            cloud.befall(first, Event.SPOT_INTERRUPTION)
        elif said.count(b"\n") == 2:
            break
    (second,) = [server.id for server in cloud.truth().servers if server.billed]
    assert said.decode() == f"on {first}\non {second}\n"
    run.stop(abort=True)
    assert ended(run, LONG).status is RunStatus.ABORTED
    assert "spot interruption" in account(run)
    nothing_billed(cloud)
