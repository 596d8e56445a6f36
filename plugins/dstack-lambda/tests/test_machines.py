"""Runs on Lambda, end to end: a real server, HTTP to its API, and instances that are machines which boot."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dstack.api import Client, Profile, Run, RunStatus, Task
from dstack_core.testing import Fleet, wait_until
from tests.support.booting_cloud import LONG, configure, fail_at, machine_of, nothing_billed, served_through_attach
from tests.support.homes import Home, ended
from tests.support.lambda_cloud import LambdaCloud

pytestmark = pytest.mark.machines
SECRET = "pass-word-of-the-job"
KIND = "cpu_4x_general"


@pytest.fixture
def cloud(fleet: Fleet) -> Iterator[LambdaCloud]:
    """Lambda whose instances are machines; when the test is over nothing of it may still cost money."""
    with LambdaCloud(("us-east-1",), fleet=fleet) as cloud:
        yield cloud
    assert cloud.wrong == []


@pytest.fixture
def lambda_home(home: Home, cloud: LambdaCloud, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose server has this cloud."""
    configure(home, cloud, monkeypatch, "lambda")
    return home


@pytest.fixture
def client(lambda_home: Home) -> Client:
    """A client of that server."""
    return Client.from_config()


def submit(client: Client, *commands: str, **more: object) -> Run:
    """A task on Lambda."""
    profile = Profile(name="one", instance_types=[KIND])
    task = Task(commands=list(commands), env={"WORD": SECRET})
    return client.runs.submit(task, backends=["lambda"], profile=profile, **more)  # type: ignore[arg-type]  # by name


def account(run: Run) -> str:
    """What the server and the machine did."""
    return b"".join(run.logs(diagnose=True)).decode()


def test_a_task(client: Client, cloud: LambdaCloud, fleet: Fleet, lambda_home: Home) -> None:
    """It runs on a machine that was bought for it, and the machine is gone afterwards; its secret was nowhere."""
    run = submit(client, "echo from $(hostname)", "exit 7")
    machine = machine_of(fleet, cloud)
    (server,) = cloud.truth().servers
    assert b"".join(run.logs()).decode() == f"from {machine.name}\n", account(run)
    assert ended(run, LONG).status is RunStatus.FAILED
    assert "exited with code 7" in account(run)
    nothing_billed(cloud)
    shown = f"{cloud.instance(server.id).order} {account(run)} {lambda_home.log()}"
    assert SECRET not in shown
    assert cloud.config()["api_key"] not in shown
    assert len(cloud.keys) == 1


def test_attaching(client: Client, cloud: LambdaCloud) -> None:
    """A port of the instance is fetched from here, over SSH, with the user's own key."""
    served_through_attach(client, "lambda", KIND)
    nothing_billed(cloud)


def test_stop(client: Client, cloud: LambdaCloud) -> None:
    """A task that is stopped may finish what it does, and its machine is ended: nobody else would do that."""
    run = submit(client, "trap 'echo goodbye; exit 0' TERM; echo begun; while :; do sleep 0.1; done")
    wait_until(lambda: b"begun" in next(iter(run.logs()), b""), timeout=LONG, what="the job")
    run.stop()
    assert ended(run, LONG).status is RunStatus.TERMINATED
    assert b"goodbye" in b"".join(run.logs())
    nothing_billed(cloud)


# Killed before the launch was sent, the next server looks for minutes before it sends one: see the conformance suite.
def test_the_server_is_killed_while_it_creates(lambda_home: Home, cloud: LambdaCloud) -> None:
    """Lambda has no token that would tell: there is one instance all the same, the run ends, and nothing is left."""
    dying = fail_at(lambda_home, "create", "after")
    run = submit(Client.from_config(), "echo once")
    assert dying.wait(LONG) == -signal.SIGKILL
    assert b"".join(run.logs()) == b"once\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE
    assert len(cloud.truth().servers) == 1
    nothing_billed(cloud)


def test_a_machine_that_is_switched_off_is_ended(client: Client, cloud: LambdaCloud, fleet: Fleet) -> None:
    """Its system is down and it costs what it cost before, so the server has it ended."""
    run = submit(client, "echo here", "sleep 1000")
    machine = machine_of(fleet, cloud)
    wait_until(lambda: b"here" in next(iter(run.logs()), b""), timeout=LONG, what="the job")
    machine.kill()
    assert ended(run, 2 * LONG).status is RunStatus.FAILED
    nothing_billed(cloud)
