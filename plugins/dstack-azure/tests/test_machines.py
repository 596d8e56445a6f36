"""Runs on Azure, end to end: a real server, the unmodified SDK, and instances that are machines which boot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dstack.api import Client, Profile, RetryPolicy, Run, RunStatus, Task
from dstack_core.testing import Event, Fault, Fleet, wait_until
from tests.support.azure import Azure
from tests.support.booting_cloud import LONG, configure, machine_of, nothing_billed, served_through_attach
from tests.support.homes import Home, ended

pytestmark = pytest.mark.machines
SECRET = "pass-word-of-the-job"
KIND = "Standard_D2s_v5"


@pytest.fixture
def cloud(fleet: Fleet) -> Iterator[Azure]:
    """Azure whose instances are machines; when the test is over nothing of it may still cost money."""
    with Azure(("eastus",), fleet=fleet) as cloud:
        yield cloud


@pytest.fixture
def client(home: Home, cloud: Azure, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client whose server has this cloud."""
    configure(home, cloud, monkeypatch, "azure")
    return Client.from_config()


def submit(client: Client, *commands: str, spot: str = "on-demand", **more: object) -> Run:
    """A task on Azure."""
    profile = Profile(name="one", instance_types=[KIND], spot_policy=spot)
    task = Task(commands=list(commands), env={"WORD": SECRET})
    return client.runs.submit(task, backends=["azure"], profile=profile, **more)  # type: ignore[arg-type]  # by name


def account(run: Run) -> str:
    """What the server and the machine did."""
    return b"".join(run.logs(diagnose=True)).decode()


def test_a_task(client: Client, cloud: Azure, fleet: Fleet, home: Home) -> None:
    """It runs on a machine that was bought for it, and the machine is gone afterwards; its secret was nowhere."""
    run = submit(client, "echo from $(hostname)", "exit 7")
    machine = machine_of(fleet, cloud)
    shown = str(cloud.server(machine.name))
    assert b"".join(run.logs()).decode() == f"from {machine.name}\n", account(run)
    assert ended(run, LONG).status is RunStatus.FAILED
    assert "exited with code 7" in account(run)
    nothing_billed(cloud)
    shown += f"{account(run)} {home.log()}"
    assert SECRET not in shown
    assert cloud.config()["creds"]["client_secret"] not in shown


def test_attaching(client: Client, cloud: Azure) -> None:
    """A port of the instance is fetched from here, over SSH, with the user's own key."""
    served_through_attach(client, "azure", KIND)
    nothing_billed(cloud)


def test_a_task_that_is_stopped(client: Client, cloud: Azure) -> None:
    """It gets to say its last words, and the machine is gone afterwards, with all that belonged to it."""
    run = submit(client, "trap 'echo bye; exit 0' TERM; echo hi; while :; do sleep 0.1; done")
    said = b""
    for chunk in run.logs():
        said += chunk
        if said == b"hi\n":
            run.stop()
    assert said.endswith(b"bye\n"), account(run)
    assert ended(run, LONG).status is RunStatus.TERMINATED
    nothing_billed(cloud)


def test_a_server_that_is_killed_while_it_creates(client: Client, cloud: Azure, home: Home) -> None:
    """Azure has made the machine, and nobody was told: the next server finds the one machine, and the run ends well."""
    cloud.plane.fail(Fault.HANG, after=True, call="put_machine")
    run = submit(client, "echo here")
    wait_until(lambda: bool(cloud.truth().servers), timeout=LONG, what="the machine to be made")
    home.kill_server()
    cloud.heal()
    run = _again(run.name)
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE
    assert len(cloud.made) == 1
    nothing_billed(cloud)


def _again(name: str) -> Run:
    """The same run, by a client that starts another server."""
    found = Client.from_config().runs.get(name)
    assert found is not None
    return found


def test_a_machine_that_azure_accepts_and_cannot_make(client: Client, cloud: Azure) -> None:
    """Azure's words are kept, what it began is gone, and the run goes on with another one."""
    cloud.late.append("AllocationFailed")
    run = submit(client, "echo here")
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run, LONG).status is RunStatus.DONE
    assert "ProvisioningState/failed/AllocationFailed" in account(run)
    assert len(cloud.made) == 2
    nothing_billed(cloud)


def test_a_spot_instance_that_is_taken_away(client: Client, cloud: Azure) -> None:
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
    second = said.decode().split()[-1]
    assert said.decode() == f"on {first}\non {second}\n"
    assert second != first
    run.stop(abort=True)
    assert ended(run, LONG).status is RunStatus.ABORTED
    assert "spot interruption" in account(run)
    nothing_billed(cloud)
