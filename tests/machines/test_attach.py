"""Attaching to runs on machines that boot: ports, `ssh RUN`, and what is left of it afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack.api import AttachError, Client, RunStatus
from dstack_core.testing import Fleet, Machine, NimbusServer, wait_until
from tests.machines.test_runs import client, runs, submit
from tests.support.booting_cloud import LONG, Prepared, configure, machine_of, nothing_billed
from tests.support.homes import Home, ended

__all__ = ["client"]

pytestmark = pytest.mark.machines
MINE = b"# mine\nHost *\n    LogLevel ERROR\n"
SERVE = "echo hello >page; exec python3 -m http.server 8000 --bind 127.0.0.1"


@pytest.fixture(autouse=True)
def users(home: Home) -> Iterator[Path]:
    """The user's `~/.ssh/config`; when the test is over it is as it was, byte for byte."""
    path = home.path.parent / ".ssh" / "config"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(MINE)
    yield path
    assert path.read_bytes() == MINE
    assert [entry.name for entry in path.parent.iterdir()] == ["config"]
    assert sorted(entry.name for entry in (home.path / "ssh").rglob("*")) == [
        "attached",
        "id_ed25519",
        "id_ed25519.pub",
    ]


def ssh(users: Path, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """What a person does in another terminal. OpenSSH does not look at `$HOME`, so it is told where to look."""
    return subprocess.run(
        ["ssh", "-F", str(users), "-o", "BatchMode=yes", *command],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def fetch(port: int, page: str = "page") -> str:
    """A page at a local port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=30) as answer:
        return str(answer.read().decode())


def fetched(port: int) -> bool:
    """Whether the page is there (yet)."""
    try:
        return fetch(port) == "hello\n"
    except OSError:
        return False


def test_a_process(client: Client, cloud: NimbusServer, users: Path) -> None:
    """A port is fetched, `ssh RUN` lands in the job's folder, and two attaches do not disturb each other."""
    run = submit(client, SERVE, ports=["*:8000"], working_dir="some/where")
    assert run.attach()
    assert run.ports is not None
    wait_until(lambda: fetched(run.ports[8000]), timeout=LONG, what="the page")  # type: ignore[index]  # while attached
    said = ssh(users, run.name, "cat page; pwd; exit 3")
    assert (said.returncode, said.stderr) == (3, "")
    assert said.stdout == "hello\n/var/lib/dstack/job/some/where\n"
    assert ssh(users, "-T", run.name, text="cat page\n").stdout == "hello\n"
    assert ssh(users, "-tt", run.name, text="tty; exit 4\n").returncode == 4
    _copies(users, run.name)
    _goes_through(users, run.name)
    other = client.runs.get(run.name)
    assert other is not None
    assert other.attach()
    assert other.ports is not None
    assert other.ports != run.ports
    run.detach()
    assert run.ports is None
    assert fetched(other.ports[8000])
    assert ssh(users, run.name, "cat page").stdout == "hello\n"
    other.detach()
    assert ssh(users, run.name, "cat page").returncode == 255
    run.stop()
    assert ended(run, LONG).status is RunStatus.TERMINATED
    nothing_billed(cloud)


def _copies(users: Path, name: str) -> None:
    """Files are copied as with any machine."""
    there = users.parent.parent / "copy"
    done = subprocess.run(["scp", "-q", "-F", str(users), f"{name}:page", str(there)], check=False, timeout=60)
    assert done.returncode == 0
    assert there.read_text() == "hello\n"


def _goes_through(users: Path, name: str) -> None:
    """An editor forwards a port of its own choice, in a session of its own."""
    path = str(users.parent.parent / "forwarded")
    argv = ["ssh", "-F", str(users), "-T", "-L", f"{path}:127.0.0.1:8000", name, "echo ready; cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as editor:
        assert editor.stdout is not None
        assert editor.stdout.readline() == b"ready\n"
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(path)
            there.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            assert there.makefile("rb").read().endswith(b"\r\n\r\nhello\n")
        editor.communicate(timeout=30)


def test_a_container(home: Home, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, users: Path) -> None:
    """`ssh RUN` lands in the container, with its files, its variables and its network."""
    with NimbusServer(machines=Prepared(fleet), container_engine=True) as cloud:  # type: ignore[arg-type]  # boots
        configure(home, cloud, monkeypatch)
        run = submit(
            Client.from_config(),
            "echo $WORD >/word",
            "while [ ! -e /go ]; do sleep 0.1; done",
            image="small:1",
            env={"WORD": "hello"},
            ports=["*:8000"],
        )
        assert run.attach()
        machine = machine_of(fleet, cloud)
        wait_until(lambda: ssh(users, run.name, "cat /word").stdout == "hello\n", timeout=LONG, what="the job")
        assert ssh(users, run.name, "echo $WORD; exit 3").returncode == 3
        assert ssh(users, run.name, "hostname").stdout.strip() not in {"", machine.name}
        assert ssh(users, "-T", run.name, text="cat /word\n").stdout == "hello\n"
        assert ssh(users, "-tt", run.name, text="cat /word; exit 4\n").returncode == 4
        assert ssh(users, f"{run.name}.machine", "hostname").stdout.strip() == machine.name
        refused = subprocess.run(
            ["scp", "-q", "-F", str(users), f"{run.name}:/etc/hostname", "/dev/null"], capture_output=True, check=False
        )
        assert refused.returncode != 0
        assert ssh(users, run.name, "cat >/go", text="now").returncode == 0
        assert ended(run, LONG).status is RunStatus.DONE
        run.detach()
        nothing_billed(cloud)


def test_a_cut_ends_it(client: Client, cloud: NimbusServer, fleet: Fleet, users: Path) -> None:
    """The ports are closed, the error says what happened, and attaching again works once the network does."""
    run = submit(client, SERVE, ports=["*:8000"])
    assert run.attach()
    assert run.ports is not None
    port = run.ports[8000]
    wait_until(lambda: fetched(port), timeout=LONG, what="the page")
    machine = machine_of(fleet, cloud)
    machine.cut()
    try:
        wait_until(lambda: run.ports is None, timeout=60, what="the end of the attach")
        with pytest.raises(OSError, match="refused"):
            fetch(port)
        assert users.read_bytes() == MINE
        with pytest.raises(AttachError, match=f"broke.*The run '{run.name}' goes on"):
            list(run.logs())
        with pytest.raises(AttachError, match="cannot be reached over SSH from this computer"):
            run.attach()
    finally:
        machine.mend()
    assert run.attach()
    assert run.ports is not None
    assert fetched(run.ports[8000])
    run.stop(abort=True)
    nothing_billed(cloud)


def test_a_cut_ends_the_command(
    client: Client, cloud: NimbusServer, fleet: Fleet, cloud_home: Home, users: Path
) -> None:
    """`dstack attach` does not hang, though the job says nothing and has no ports: the error says what happened."""
    run = submit(client, "echo hi; sleep 1000")
    argv = [sys.executable, "-m", "dstack_core._cli", "attach", run.name]
    with subprocess.Popen(argv, env=cloud_home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"hi\n"
        machine = machine_of(fleet, cloud)
        machine.cut()
        _, err = attached.communicate(timeout=90)
        machine.mend()
    assert attached.returncode == 1
    assert f"broke (it did not answer for 15 s, or was switched off). The run '{run.name}' goes on" in err.decode()
    assert users.read_bytes() == MINE
    run.stop(abort=True)
    nothing_billed(cloud)


def test_the_end_of_the_run_ends_it(client: Client, cloud: NimbusServer, fleet: Fleet) -> None:
    """That is no error: all of the output is read, and nothing is left."""
    run = submit(client, "while [ ! -e /go ]; do sleep 0.1; done; echo over", ports=["*:8000"])
    assert run.attach()
    machine_of(fleet, cloud).run("touch", "/go")
    assert b"".join(run.logs()) == b"over\n"
    nothing_billed(cloud)
    assert ended(run, LONG).status is RunStatus.DONE
    wait_until(lambda: run.ports is None, timeout=LONG, what="the end of the attach")
    run.detach()


def test_another_machine_at_its_address(client: Client, cloud: NimbusServer, fleet: Fleet) -> None:
    """Whoever shows another key than the pinned one is told nothing, and it is said."""
    run = submit(client, SERVE, ports=["*:8000"])
    runs(run)
    other = (
        "ssh-keygen -q -t ed25519 -N '' -f /root/k && cat /root/k >/etc/ssh/ssh_host_ed25519_key && "
        "cat /root/k.pub >/etc/ssh/ssh_host_ed25519_key.pub && (systemctl restart ssh || systemctl restart sshd)"
    )
    assert machine_of(fleet, cloud).run("sh", "-c", other).code == 0
    with pytest.raises(AttachError, match="host key is not the one that was pinned"):
        run.attach()
    assert run.ports is None
    run.stop(abort=True)
    nothing_billed(cloud)


def test_a_key_that_is_not_let_in(client: Client, cloud: NimbusServer, tmp_path: Path) -> None:
    """The error says which one is."""
    run = submit(client, SERVE)
    runs(run)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    with pytest.raises(AttachError, match="the one with which the run was submitted"):
        run.attach(tmp_path / "other")
    run.stop(abort=True)
    nothing_billed(cloud)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_command(
    client: Client, cloud: NimbusServer, fleet: Fleet, cloud_home: Home, users: Path, number: signal.Signals
) -> None:
    """It says how to log in; however it ends, its ssh ends with it, and the run goes on."""
    run = submit(client, "echo hi", SERVE, ports=["*:8000"])
    argv = [sys.executable, "-m", "dstack_core._cli", "attach", run.name]
    with subprocess.Popen(argv, env=cloud_home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"hi\n"
        assert ssh(users, run.name, "true").returncode == 0
        os.kill(attached.pid, number)
        _, err = attached.communicate(timeout=60)
    assert f"To log in: ssh {run.name}\n".encode() in err
    wait_until(lambda: not _connected_by_ssh(machine_of(fleet, cloud)), timeout=30, what="its ssh to end")
    if number == signal.SIGKILL:
        assert users.read_bytes() != MINE
        run.attach()
        run.detach()
    assert users.read_bytes() == MINE
    run.refresh()
    assert run.status is RunStatus.RUNNING
    run.stop(abort=True)
    nothing_billed(cloud)


def _connected_by_ssh(machine: Machine) -> bool:
    """Whether a command `ssh` of this computer is connected to the machine."""
    found = subprocess.run(
        ["ss", "-Htnp", "state", "established", "dst", f"{machine.address}:22"], capture_output=True, check=True
    )
    return b'"ssh"' in found.stdout
