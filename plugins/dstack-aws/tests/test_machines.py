"""Runs on EC2, end to end: a real server, the unmodified SDK, and instances that are machines which boot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from dstack.api import Client, Profile, RetryPolicy, Run, RunStatus, Task
from dstack_core.testing import Event, Fleet
from tests.support.booting_cloud import LONG, configure, machine_of, nothing_billed, served_through_attach
from tests.support.ec2 import Ec2
from tests.support.homes import Home, ended

pytestmark = pytest.mark.machines
SECRET = "pass-word-of-the-job"
KIND = "m5.large"


@pytest.fixture
def cloud(fleet: Fleet) -> Iterator[Ec2]:
    """EC2 whose instances are machines; when the test is over nothing of it may still cost money."""
    with Ec2(("us-east-1",), fleet=fleet) as cloud:
        yield cloud


@pytest.fixture
def client(home: Home, cloud: Ec2, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client whose server has this cloud."""
    configure(home, cloud, monkeypatch, "aws")
    return Client.from_config()


def submit(client: Client, *commands: str, spot: str = "on-demand", ports: Sequence[str] = (), **more: object) -> Run:
    """A task on EC2."""
    profile = Profile(name="one", instance_types=[KIND], spot_policy=spot)
    task = Task(commands=list(commands), env={"WORD": SECRET}, ports=list(ports))
    return client.runs.submit(task, backends=["aws"], profile=profile, **more)  # type: ignore[arg-type]  # by name


def account(run: Run) -> str:
    """What the server and the machine did."""
    return b"".join(run.logs(diagnose=True)).decode()


def test_a_task(client: Client, cloud: Ec2, fleet: Fleet, home: Home) -> None:
    """It runs on a machine that was bought for it, and the machine is gone afterwards; its secret was nowhere."""
    run = submit(client, "echo from $(hostname)", "exit 7")
    machine = machine_of(fleet, cloud)
    assert b"".join(run.logs()).decode() == f"from {machine.name}\n", account(run)
    assert ended(run, LONG).status is RunStatus.FAILED
    assert "exited with code 7" in account(run)
    nothing_billed(cloud)
    (server,) = cloud.truth().servers
    shown = f"{server.labels} {cloud.server(server.id).user_data} {account(run)} {home.log()}"
    assert SECRET not in shown
    assert cloud.config()["creds"]["secret_key"] not in shown


def test_attaching(client: Client, cloud: Ec2) -> None:
    """A port of the instance is fetched from here, over SSH, with the user's own key, which is in its user-data."""
    served_through_attach(client, "aws", KIND)
    nothing_billed(cloud)


def test_zones_without_capacity_are_passed_over(client: Client, cloud: Ec2) -> None:
    """Two zones have none, which Amazon says with HTTP 500: each is asked once, and the third has one."""
    for zone in ("us-east-1a", "us-east-1b"):
        cloud.plane.capacity(0, zone=zone)
    run = submit(client, "echo here")
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE
    assert cloud.seen["ec2:RunInstances"] == 3
    said = account(run)
    refused = [line for line in said.splitlines() if "intent -> failed" in line]
    assert len(refused) == 2
    assert all("InsufficientInstanceCapacity" in line for line in refused)
    nothing_billed(cloud)


def test_a_spot_instance_that_is_taken_away(client: Client, cloud: Ec2) -> None:
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
