"""`run.attach()` to a machine that is reached over SSH: a real SSH server of this computer plays it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from dstack.api import AttachError, ConfigurationError, PortUsedError, Run, RunStatus
from dstack.api.server import APIClient
from dstack_core._client.ports import PortReservation, listen
from dstack_core._client.run import SubmittedRun
from dstack_core._client.ssh.login import Login
from dstack_core.testing import wait_until
from tests.client.scripted import ScriptedServer, json_of, located, log_piece, run_model
from tests.client.ssh.test_tunnel import children, echo
from tests.support.git_hosts import SshServer, ssh_server
from tests.support.homes import ROOT

__all__ = ["echo", "ssh_server"]
pytestmark = pytest.mark.root


@pytest.fixture
def key(ssh_server: SshServer, tmp_path: Path) -> Path:
    """The one that is let in."""
    return tmp_path / "sshd" / "key"


@pytest.fixture
def run(server: ScriptedServer, api: APIClient, ssh_server: SshServer, own_home: Path, key: Path, echo: int) -> Run:
    """A run on that machine; its port 80 says hello."""
    host_key = " ".join(key.with_name("host_key.pub").read_text().split()[:2])
    place = located(
        hostname="127.0.0.1",
        same_host_as_server=False,
        ssh_port=ssh_server.port,
        host_key=host_key,
        ports={80: echo},
    )
    model = run_model(ports=[(80, None)], at=place)
    server.on("get", lambda _: json_of(model)).on("logs", lambda _: log_piece(0, b"hi\n"))
    return Run(api, model, key)


def heard(port: int) -> bytes:
    """What is said at a local port, to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as there:
        return there.makefile("rb").read()


def test_its_ports_are_here_and_it_has_a_name(run: Run, user: Path) -> None:
    """Until it is detached; then nothing is left."""
    with run:
        assert run.attach()
        assert run.attach()
        assert run.ports is not None
        assert heard(run.ports[80]) == b"hello"
        assert (user / ".ssh" / "config").read_text().startswith("Include ")
    assert run.ports is None
    assert not (user / ".ssh").exists()
    assert children() == []


def test_any_port_may_be_another_one_by_then(run: Run, api: APIClient, key: Path) -> None:
    """At the submit it is only looked at, as the job might listen there itself: by now another program may have it."""
    submitted = SubmittedRun(api, run._model, PortReservation([(80, None)], job_listens_here=True), key)
    with ExitStack() as stack:
        with suppress(PortUsedError):
            stack.enter_context(listen(80))
        stack.enter_context(submitted)
        assert submitted.attach()
        assert submitted.ports is not None
        assert submitted.ports[80] != 80
        assert heard(submitted.ports[80]) == b"hello"


def test_a_break_ends_it(run: Run, user: Path) -> None:
    """The port is closed, the entry is gone, who follows the output is told, and it can be attached again."""
    assert run.attach()
    assert run.ports is not None
    port = run.ports[80]
    (ssh,) = children()
    os.kill(ssh, signal.SIGKILL)
    wait_until(lambda: run.ports is None, what="the end of the attach")
    wait_until(lambda: not (user / ".ssh").exists(), what="the end of its entry")
    with pytest.raises(ConnectionRefusedError):
        heard(port)
    with pytest.raises(AttachError, match=r"broke .*The run 'a-run' goes on.* Attach again"):
        next(run.logs())
    run.check_attached()
    assert run.attach()
    assert next(run.logs()) == b"hi\n"
    run.detach()


def test_a_break_is_no_matter_for_the_output_of_a_run_without_ports(
    run: Run, server: ScriptedServer, user: Path
) -> None:
    """Its output is followed to the end, also to that of another attempt; whoever asks is told."""
    place = run._model.jobs[0].job_submissions[-1].job_provisioning_data
    server.on("get", lambda _: json_of(run_model(at=place)))
    assert run.attach()
    assert run.ports == {}
    (ssh,) = children()
    os.kill(ssh, signal.SIGKILL)
    wait_until(lambda: run.ports is None, what="the end of the attach")
    assert next(run.logs()) == b"hi\n"
    with pytest.raises(AttachError, match="broke"):
        run.check_attached()
    assert not (user / ".ssh").exists()


def test_a_break_with_the_end_of_the_run_is_none(run: Run, server: ScriptedServer) -> None:
    """Its machine was switched off, as it should be."""
    assert run.attach()
    (ssh,) = children()
    server.on("get", lambda _: json_of(run_model(RunStatus.DONE)))
    os.kill(ssh, signal.SIGKILL)
    wait_until(lambda: run.ports is None, what="the end of the attach")
    assert next(run.logs()) == b"hi\n"
    assert run.attach()
    assert run.ports is None


_FORKS = """
import os, sys
from pathlib import Path
from dstack_core._client.attachment import Attachment
from dstack_core._client.ssh.login import Login
from tests.client.scripted import located
attachment = Attachment([], located(), None, Login.parse(sys.argv[1]))
if os.fork() == 0:
    sys.exit()
os.wait()
print(attachment.broken, Path("~/.ssh/config").expanduser().exists(), list(attachment._entry.folder.iterdir()) != [])
"""


def test_a_forked_child_leaves_it_to_its_parent(run: Run, key: Path, user: Path) -> None:
    """When the child ends, all is still there; when the parent ends, it is not, though it says no word."""
    data = run._model.jobs[0].job_submissions[-1].job_provisioning_data
    assert data is not None
    login = Login("a-run", "a", "127.0.0.1", data.ssh_port or 0, "root", data.host_key or "", str(key))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-W", "ignore", "-c", _FORKS, login.text()]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("None True True\n", "")
    assert not (user / ".ssh").exists()


def test_a_taken_port_is_told_before_anything_is_done(run: Run, user: Path, api: APIClient) -> None:
    """Nobody logs in for nothing."""
    with listen(0) as taken:
        number = taken.getsockname()[1]
        place = run._model.jobs[0].job_submissions[-1].job_provisioning_data  # the same place
        other = Run(api, run_model(ports=[(80, number)], at=place))
        with pytest.raises(PortUsedError):
            other._forwarded(None)  # without asking the server
    assert not (user / ".ssh").exists()
    assert children() == []


def test_a_key_that_is_not_there(run: Run) -> None:
    """It is named, and nothing is left."""
    with pytest.raises(ConfigurationError, match="/no/key"):
        run.attach("/no/key")
    assert run.ports is None


def test_a_configuration_that_cannot_be_written(run: Run, user: Path) -> None:
    """The ports are forwarded all the same, and a warning says what will not work."""
    (user / ".ssh").write_text("no folder")
    with pytest.warns(UserWarning, match="`ssh a-run` will not work"):
        run.attach()
    assert run.ports is not None
    assert heard(run.ports[80]) == b"hello"
    run.detach()
    assert (user / ".ssh").read_text() == "no folder"
