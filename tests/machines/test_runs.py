"""Runs on machines that boot: a real server, a cloud of real machines, SSH, cloud-init."""

from __future__ import annotations

import hashlib
import signal
import subprocess

import pytest

from dstack.api import Client, Profile, Resources, Run, RunStatus, Task
from dstack_core._models.runs import Reason
from dstack_core.testing import Fleet, Machine, NimbusServer, wait_until
from tests.support.booting_cloud import (
    LONG,
    Prepared,
    configure,
    fail_at,
    machine_of,
    nothing_billed,
    start_with_grace,
)
from tests.support.homes import Home, ended

pytestmark = pytest.mark.machines
SECRET = "pass-word-of-the-job"


@pytest.fixture
def client(cloud_home: Home, client: Client) -> Client:
    """A client of the home that has the cloud."""
    return client


def submit(client: Client, *commands: str, machine: str = "small", **more: object) -> Run:
    """A task on the cloud."""
    profile = Profile(name="one", regions=["south"], instance_types=[machine], spot_policy="on-demand")
    return client.runs.submit(Task(commands=list(commands), **more), backends=["nimbus"], profile=profile)  # type: ignore[arg-type]  # fields by name


def output(run: Run) -> str:
    """All that it printed."""
    return b"".join(run.logs()).decode()


def account(run: Run) -> str:
    """What the server and the machine did."""
    return b"".join(run.logs(diagnose=True)).decode()


def runs(run: Run) -> None:
    """Waits until it runs."""

    def look() -> bool:
        run.refresh()
        return run.status is RunStatus.RUNNING

    wait_until(look, timeout=LONG, what=f"{run.name} to run")


def test_a_process(client: Client, cloud: NimbusServer, fleet: Fleet, cloud_home: Home) -> None:
    """A task runs as a process of the machine: output, exit code, and no secret anywhere but in its environment."""
    run = submit(
        client, "echo from $(hostname)", "[ $WORD = $EXPECTED ] && exit 7", env={"WORD": SECRET, "EXPECTED": SECRET}
    )
    machine = machine_of(fleet, cloud)
    assert output(run) == f"from {machine.name}\n"
    assert ended(run, LONG).status is RunStatus.FAILED
    assert "exited with code 7" in account(run)
    assert SECRET not in account(run)
    assert SECRET not in cloud_home.log()
    assert SECRET.encode() not in machine.console()
    nothing_billed(cloud)


def test_no_secret_is_where_others_may_look(client: Client, cloud: NimbusServer, fleet: Fleet) -> None:
    """While the job runs, its secret is neither in the user-data, nor in the list of processes, nor on the disk."""
    run = submit(client, "touch /started; while [ ! -e /go ]; do sleep 0.1; done", env={"WORD": SECRET})
    machine = machine_of(fleet, cloud)
    wait_until(lambda: machine.run("test", "-e", "/started").code == 0, timeout=LONG, what="the job")
    look = f"ps axww; cat /var/lib/cloud/seed/nocloud/user-data; grep -rl {SECRET} /var/lib/dstack /var/log /tmp /run"
    said = machine.run("sh", "-c", look).output.decode()
    assert "user" in said
    assert SECRET not in said.replace(f"grep -rl {SECRET}", "")
    assert not [
        line for line in said.splitlines() if line.startswith(("/var/", "/tmp/", "/run/")) and "user-data" not in line
    ]
    machine.run("touch", "/go")
    assert ended(run, LONG).status is RunStatus.DONE
    nothing_billed(cloud)


def test_an_image(home: Home, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with an image runs in a container of the machine."""
    with NimbusServer(machines=Prepared(fleet), container_engine=True) as cloud:  # type: ignore[arg-type]  # boots
        configure(home, cloud, monkeypatch)
        run = submit(Client.from_config(), "echo in $(hostname)", "exit 5", image="small:1")
        machine = machine_of(fleet, cloud)
        said = output(run)
        assert said.startswith("in "), account(run)
        assert machine.name not in said
        assert ended(run, LONG).status is RunStatus.FAILED
        assert "exited with code 5" in account(run)
        nothing_billed(cloud)


@pytest.mark.parametrize("abort", [False, True], ids=["stop", "abort"])
def test_a_stop(client: Client, cloud: NimbusServer, abort: bool) -> None:
    """A polite stop lets the job say goodbye; an abort does not. Either ends the machine."""
    run = submit(client, "trap 'echo goodbye; exit 0' TERM; echo begun; while :; do sleep 0.1; done")
    runs(run)
    wait_until(lambda: b"begun" in next(iter(run.logs()), b""), timeout=LONG)
    run.stop(abort=abort)
    assert ended(run, LONG).status is (RunStatus.ABORTED if abort else RunStatus.TERMINATED)
    assert ("goodbye" in output(run)) is not abort
    nothing_billed(cloud)


def test_a_machine_whose_set_up_fails(client: Client, cloud: NimbusServer) -> None:
    """It is ended, and the run's account has the reason and the machine's own console."""
    run = submit(client, "true", machine="t4", resources=Resources(gpu="T4"))
    assert ended(run, LONG).status is RunStatus.FAILED
    said = account(run)
    assert "starting -> terminating: the set-up of the machine failed: no NVIDIA GPU works here" in said
    assert "console of" in said
    assert "dstack: set-up failed: no NVIDIA GPU works here" in said
    nothing_billed(cloud)


def test_a_cut_longer_than_the_keep_alive(client: Client, cloud: NimbusServer, fleet: Fleet) -> None:
    """The network is gone until the server has given its connection up: the same run goes on, without a gap."""
    run = submit(client, "i=0; while [ ! -e /enough ]; do echo $i; i=$((i+1)); sleep 0.01; done")
    machine = machine_of(fleet, cloud)
    runs(run)
    reader = iter(run.logs())
    said = next(reader)
    machine.cut()
    wait_until(lambda: not connected(machine), timeout=LONG, what="the connection to be given up")
    machine.mend()
    while len(said.split()) < 100 or not connected(machine):
        said += next(reader)
    machine.run("touch", "/enough")
    said += b"".join(reader)
    assert said.split() == [b"%d" % number for number in range(len(said.split()))]
    assert ended(run, LONG).status is RunStatus.DONE
    assert len(cloud.truth().servers) == 1
    nothing_billed(cloud)


def test_200_mb_of_output(client: Client, cloud: NimbusServer) -> None:
    """Every byte arrives, once, in its place."""
    noisy = "import sys\nfor n in range(2_000_000):\n    sys.stdout.write('%099d\\n' % n)\n"
    run = submit(client, f'python3 -c "{noisy}"')
    digest, expected = hashlib.sha256(), hashlib.sha256()
    for first in range(0, 2_000_000, 10_000):
        expected.update(b"".join(b"%099d\n" % n for n in range(first, first + 10_000)))
    for chunk in run.logs():
        digest.update(chunk)
    assert digest.digest() == expected.digest()
    assert ended(run, LONG).status is RunStatus.DONE
    nothing_billed(cloud)


def connected(machine: Machine) -> bool:
    """Whether somebody on this computer is connected to the machine's SSH server."""
    found = subprocess.run(
        ["ss", "-Htn", "state", "established", "dst", f"{machine.address}:22"], capture_output=True, check=True
    )
    return bool(found.stdout.strip())


def test_the_server_is_gone_for_good(cloud_home: Home, cloud: NimbusServer, fleet: Fleet) -> None:
    """The job goes on to its end; then the machine powers itself off, and its cloud says that nothing is billed."""
    server = start_with_grace(cloud_home, 25)
    run = submit(Client.from_config(), "while [ ! -e /go ]; do sleep 0.1; done; touch /done; sync")
    machine = machine_of(fleet, cloud)
    runs(run)
    server.kill()
    server.wait()
    machine.run("touch", "/go")
    wait_until(lambda: machine.state == "terminated", timeout=LONG, what="the machine to power itself off")
    nothing_billed(cloud)
    assert cloud_home.server_pid() is None


TREE = "setsid -f sh -c 'trap : TERM; while :; do sleep 98765; done' & sleep 98764 & "


def test_the_agent_is_killed(client: Client, cloud: NimbusServer, fleet: Fleet) -> None:
    """The run fails with that reason, no process of its tree goes on, and the machine is gone."""
    run = submit(client, TREE + "touch /started; sleep 98763")
    machine = machine_of(fleet, cloud)
    wait_until(lambda: machine.run("test", "-e", "/started").code == 0, timeout=LONG, what="the job")
    assert machine.run("pgrep", "-cf", "sleep 9876").output.strip() >= b"3"
    # It would be too fast to look at the processes.
    machine.run("systemctl", "mask", "--runtime", "poweroff.target")
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "dstack-agent")
    wait_until(
        lambda: machine.run("pgrep", "-f", "98765|98764|98763").code == 1, timeout=20, what="the end of its tree"
    )
    machine.run("systemctl", "unmask", "--runtime", "poweroff.target")
    assert ended(run, LONG).status is RunStatus.FAILED
    assert run.reason is Reason.AGENT_LOST
    nothing_billed(cloud)


def test_the_agent_is_killed_and_no_server_is_there(
    client: Client, cloud: NimbusServer, fleet: Fleet, cloud_home: Home
) -> None:
    """The machine powers itself off, long before its lease ends, and the next server finds the run lost."""
    run = submit(client, "sleep 98765")
    machine = machine_of(fleet, cloud)
    runs(run)
    cloud_home.kill_server()
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "dstack-agent")
    wait_until(lambda: machine.state == "terminated", timeout=LONG, what="the machine to power itself off")
    assert ended(run, LONG).status is RunStatus.FAILED
    assert run.reason in {Reason.AGENT_LOST, Reason.INSTANCE_LOST}
    nothing_billed(cloud)


def test_the_agent_of_a_container_is_killed(home: Home, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails with that reason, and its container is gone with the machine."""
    with NimbusServer(machines=Prepared(fleet), container_engine=True) as cloud:  # type: ignore[arg-type]  # boots
        configure(home, cloud, monkeypatch)
        run = submit(Client.from_config(), "echo begun; sleep 98765", image="small:1")
        assert next(iter(run.logs())) == b"begun\n"
        machine = machine_of(fleet, cloud)
        machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "dstack-agent")
        assert ended(run, LONG).status is RunStatus.FAILED
        assert run.reason is Reason.AGENT_LOST
        nothing_billed(cloud)


STEPS = [
    ("create", "before"),
    ("create", "after"),
    ("greet", "after"),
    ("keep", "after"),
    ("show", "before"),
    ("show", "after"),
    ("start", "before"),
    ("start", "after"),
    ("give", "before"),
    ("give", "after"),
]


@pytest.mark.parametrize(("step", "when"), STEPS, ids=["-".join(step) for step in STEPS])
def test_a_server_killed_while_it_provisions(cloud_home: Home, cloud: NimbusServer, step: str, when: str) -> None:
    """Wherever it is killed, another one goes on: one instance in the end, the run finishes, and none is left."""
    server = fail_at(cloud_home, step, when)
    run = submit(Client.from_config(), "echo once")
    assert server.wait(LONG) == -signal.SIGKILL
    assert output(run) == "once\n"
    assert ended(run, LONG).status is RunStatus.DONE
    assert len(cloud.truth().servers) == 1
    nothing_billed(cloud)
