"""What a machine of the fleet promises, each on machines that really boot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

from dstack_core.testing import Fleet, Machine, wait_until
from tests.support.machines import Key, answers

pytestmark = pytest.mark.machines

SERVICE = """
[Service]
ExecStart=/bin/sh -c 'echo begun >>/var/begun; exec sleep infinity'
Restart=always
RestartSec=0
[Install]
WantedBy=multi-user.target
"""
GOODBYE = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/touch /var/goodbye
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(autouse=True)
def _ended(fleet: Fleet) -> Iterator[None]:
    """No machine outlives its test."""
    yield
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(Machine.terminate, fleet.machines))


def up(machine: Machine) -> Machine:
    """The machine, when its sshd answers."""
    wait_until(lambda: answers(machine), timeout=120, what=f"{machine} to answer")
    return machine


def finished(machine: Machine) -> Machine:
    """The machine, when its cloud-init has finished."""
    wait_until(lambda: machine.state == "running", timeout=60)
    machine.run("cloud-init", "status", "--wait")
    return machine


def ended(machine: Machine, state: str) -> None:
    """Waits for a state."""
    wait_until(lambda: machine.state == state, timeout=60, what=f"{machine} to be {state}")


def output(machine: Machine, *argv: str) -> str:
    """What a command says that succeeds."""
    result = machine.run(*argv)
    assert result.code == 0, result
    return result.output.decode().strip()


def cloud_config(**config: object) -> str:
    """User-data."""
    return f"#cloud-config\n{json.dumps(config)}"


def host_key(machine: Machine) -> str:
    """The key that sshd shows to the world."""
    argv = ["ssh-keyscan", "-t", "ed25519", machine.address]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_a_machine_boots_as_its_user_data_says(fleet: Fleet, machine_key: Key) -> None:
    """Cloud-init does what user-data and meta-data say, and sshd lets in who is named there."""
    user_data = machine_key.user_data(runcmd=["echo $(cloud-init query instance-id) >/var/done"])
    machine = fleet.boot(user_data, name="i-0001", meta_data={"region": "north"})
    assert machine in fleet.machines
    assert machine.address.startswith("127.0.1.")
    up(machine)
    assert machine.state == "running"
    finished(machine)
    assert machine_key.ssh(machine, "cat /var/done; hostname; whoami").stdout.split() == ["i-0001", "i-0001", "root"]
    assert output(machine, "cloud-init", "status") == "status: done"
    assert output(machine, "cloud-init", "query", "ds.meta_data.region") == "north"


def test_the_console_says_what_failed(fleet: Fleet) -> None:
    """What goes wrong while a machine boots is on its console, and still there when it is gone."""
    machine = finished(fleet.boot("#cloud-config\nruncmd: ['cat /no/such/file']\n"))
    wait_until(lambda: b"scripts-user" in machine.console(), what="the console to say what failed")
    assert b"/no/such/file" in machine.console()
    machine.terminate()
    assert b"/no/such/file" in machine.console()


def test_user_data_that_cannot_be_read_is_no_reason_not_to_boot(fleet: Fleet) -> None:
    """As in life, a machine whose user-data is broken boots without it, and says so on its console."""
    machine = up(fleet.boot("#cloud-config\n{ [\n"))
    wait_until(lambda: b"Failed loading yaml blob" in machine.console(), what="the console to say so")


def test_services_are_kept_alive_and_come_back_with_the_machine(fleet: Fleet) -> None:
    """A unit that user-data enables runs, is started again when it dies, and runs after a reboot."""
    files = [{"path": "/etc/systemd/system/agent.service", "content": SERVICE}]
    machine = finished(fleet.boot(cloud_config(write_files=files, runcmd=["systemctl enable --now agent"])))
    assert output(machine, "cat", "/var/begun").split() == ["begun"]
    output(machine, "systemctl", "kill", "--signal=SIGKILL", "agent")
    wait_until(lambda: len(output(machine, "cat", "/var/begun").split()) == 2)
    machine.reboot()
    wait_until(lambda: len(machine.run("cat", "/var/begun").output.split()) == 3, timeout=60)


@pytest.mark.parametrize(
    ("on_shutdown", "state", "ways"),
    [
        ("terminate", "terminated", ["poweroff", "shutdown -h now", "systemctl poweroff"]),
        ("stop", "stopped", ["poweroff"]),
    ],
)
def test_powering_off_from_inside_has_the_consequence_that_was_ordered(
    fleet: Fleet, on_shutdown: Literal["stop", "terminate"], state: str, ways: list[str]
) -> None:
    """However a machine powers itself off, it is then stopped or terminated, as was ordered."""
    machines = [fleet.boot(cloud_config(runcmd=[way]), on_shutdown=on_shutdown) for way in ways]
    for machine in machines:
        ended(machine, state)
    assert fleet.machines == (machines if state == "stopped" else [])


def test_a_machine_that_is_stopped_and_started_is_the_same_machine(fleet: Fleet, machine_key: Key) -> None:
    """Stopping and starting keeps disk, host key and address, and user-data's commands are not run again."""
    machine = finished(up(fleet.boot(machine_key.user_data(runcmd=["echo once >>/var/runs"]))))
    key, address = host_key(machine), machine.address
    machine.stop()
    assert machine.state == "stopped"
    assert not answers(machine)
    machine.stop()
    machine.start()
    finished(up(machine))
    assert (host_key(machine), machine.address) == (key, address)
    assert machine_key.ssh(machine, "cat /var/runs").stdout.split() == ["once"]
    with pytest.raises(ValueError, match="Only a machine that is stopped"):
        machine.start()


def test_stopping_lets_the_system_shut_down(fleet: Fleet) -> None:
    """A machine that is stopped ends its services first."""
    files = [{"path": "/etc/systemd/system/last.service", "content": GOODBYE}]
    machine = finished(fleet.boot(cloud_config(write_files=files, runcmd=["systemctl enable --now last"])))
    machine.stop()
    machine.start()
    assert output(machine, "ls", "/var/goodbye")


def test_a_reboot_from_inside_is_no_shutdown(fleet: Fleet) -> None:
    """A machine that reboots itself stays the same running machine, with its disk."""
    machine = fleet.boot("#cloud-config\nruncmd: ['echo kept >/var/kept; reboot']\n", on_shutdown="terminate")
    wait_until(lambda: machine.starts == 2, timeout=60)
    up(machine)
    assert machine.state == "running"
    assert output(machine, "cat", "/var/kept") == "kept"


def test_a_killed_machine_says_no_goodbye(fleet: Fleet, machine_key: Key) -> None:
    """A machine that the cloud takes away is gone at once and for good, and whoever was connected notices."""
    machine = up(fleet.boot(machine_key.user_data(), on_shutdown="stop"))
    with subprocess.Popen(machine_key.argv(machine, "echo in; exec sleep 600"), stdout=subprocess.PIPE) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"in\n"
        machine.kill()
        assert machine.state == "terminated"
        assert machine not in fleet.machines
        assert session.wait(60) == 255
    assert b"Stopping" not in machine.console()
    machine.terminate()


def test_a_cut_network_loses_packets_and_no_connection(fleet: Fleet, machine_key: Key) -> None:
    """While the network is cut nothing comes through, in old connections and new ones; mended, the old ones go on."""
    machine = up(fleet.boot(machine_key.user_data()))
    count = "n=0; while n=$((n+1)); do echo $n; sleep 0.02; done"
    with subprocess.Popen(machine_key.argv(machine, count), stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "1\n"
        machine.cut()
        assert not answers(machine)
        assert not reaches_its_gateway(machine)
        assert session.poll() is None
        machine.mend()
        lines = [int(session.stdout.readline()) for _ in range(200)]
        assert lines == list(range(2, 202))
        session.kill()
    assert answers(machine)
    assert reaches_its_gateway(machine)


def reaches_its_gateway(machine: Machine) -> bool:
    """Whether the machine gets any answer from the other end of its cable; a refusal is one."""
    gateway = output(machine, "sh", "-c", "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")
    code = f"import socket; s = socket.socket(); s.settimeout(2); print(s.connect_ex(('{gateway}', 9)))"
    return output(machine, "python3", "-c", code) in ("0", "111")


def test_a_cut_outlasts_a_reboot(fleet: Fleet) -> None:
    """A machine that is cut off stays so when it boots again, until it is mended."""
    machine = up(fleet.boot())
    machine.cut()
    machine.reboot()
    finished(machine)
    assert output(machine, "systemctl", "is-active", "ssh") == "active"
    assert not answers(machine)
    machine.mend()
    up(machine)


def test_containers_run_on_a_machine_with_an_engine(fleet: Fleet) -> None:
    """A machine that was ordered with a container engine runs containers."""
    machine = finished(fleet.boot(container_engine=True))
    wait_until(lambda: machine.run("docker", "version").code == 0, timeout=60, what="dockerd to answer")
    image = "tar -C / -c bin lib lib64 usr/bin/echo usr/lib64 usr/lib/*-linux-gnu | docker import - tools"
    output(machine, "sh", "-c", image)
    assert output(machine, "docker", "run", "--rm", "tools", "/usr/bin/echo", "from inside") == "from inside"


def test_ten_machines_at_once_are_ten_machines(fleet: Fleet) -> None:
    """Ten that are ordered at once all boot, each with an address, an id and a host key of its own."""
    machines = [fleet.boot(name=f"i-{number}") for number in range(10)]
    for machine in machines:
        up(machine)
    assert len({machine.address for machine in machines}) == 10
    assert len({host_key(machine) for machine in machines}) == 10
    assert len({output(machine, "cat", "/etc/machine-id") for machine in machines}) == 10
    assert [output(machine, "hostname") for machine in machines] == [f"i-{number}" for number in range(10)]


def test_files_can_be_put_on_a_machine(fleet: Fleet) -> None:
    """What tests put on the disk is there, with its mode."""
    machine = fleet.boot()
    machine.put("/usr/local/bin/hello", b"#!/bin/sh\necho hello\n", mode=0o755)
    ended(machine, "running")
    assert output(machine, "hello") == "hello"
    assert machine.run("false").code == 1
