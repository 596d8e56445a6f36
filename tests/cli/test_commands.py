"""The command `dstack`, as a person at a terminal or a script sees it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from dstack.api import Client, RunStatus, Service, Task
from dstack_core import __version__
from dstack_core._cli.tables import ago
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended

DSTACK = [sys.executable, "-m", "dstack_core._cli"]


def dstack(home: Home, *args: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [*DSTACK, *args],
        env=home.env,
        cwd=home.path.parent,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version_and_help_need_no_server(home: Home) -> None:
    """Both are there without a home folder, and list every command."""
    assert dstack(home, "version").stdout == f"dstack-core {__version__}\n"
    for command in (
        "server",
        "backends",
        "apply",
        "init",
        "ps",
        "logs",
        "attach",
        "stop",
        "delete",
        "doctor",
        "plugin",
        "version",
    ):
        assert f"\n  {command} " in dstack(home, "--help").stdout
    assert not home.path.exists()


def test_help_loads_nothing_heavy(home: Home) -> None:
    """What a person waits for is the interpreter, not a database."""
    code = (
        "import sys, dstack_core._cli.app; print([m for m in ('httpx', 'pydantic', 'rich.table') if m in sys.modules])"
    )
    assert home.run(code).stdout == b"[]\n"


def test_server_is_the_real_one(home: Home) -> None:
    """Its arguments, its help and its exit code are passed through."""
    shown = dstack(home, "server", "--help")
    assert "--host HOST" in shown.stdout
    assert dstack(home, "server", "--nonsense").returncode == 2


CLOUDS = ("aws", "azure", "gcp", "lambda")


def test_backends(client: Client, home: Home) -> None:
    """Name, version and state of each, and how to configure one that is not."""
    shown = dstack(home, "backends")
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["NAME", *CLOUDS, "local"]
    assert "not configured" in shown.stdout
    assert {backend.name for backend in client.backends.list()} == {"local"}
    *clouds, local = client.backends.installed()
    assert [(cloud.name, cloud.state) for cloud in clouds] == [(name, "not_configured") for name in CLOUDS]
    assert (local.name, local.state, local.reason) == ("local", "configured", None)


def test_a_run_from_begin_to_end(client: Client, home: Home) -> None:
    """Listed, read, and deleted, by name."""
    assert "no runs yet" in dstack(home, "ps").stdout
    ended(client.runs.submit(Task(commands=["printf 'a [b] c\\377'; exit 3"]), run_name="a-run"))
    listed = dstack(home, "ps").stdout
    assert "a-run" in listed
    assert "failed" in listed
    raw = subprocess.run([*DSTACK, "logs", "a-run"], env=home.env, capture_output=True, timeout=60, check=True)
    assert raw.stdout == b"a [b] c\xff"
    assert "submitted by" in dstack(home, "logs", "a-run", "--diagnose").stdout
    assert dstack(home, "stop", "a-run").stdout == "a-run has ended already: failed\n"
    assert dstack(home, "delete", "a-run", given="n\n").returncode == 1
    assert dstack(home, "delete", "a-run", given="y\n").returncode == 0
    assert client.runs.get("a-run") is None


def test_a_service_is_listed_with_its_replicas(client: Client, home: Home) -> None:
    """How many are ready, and what keeps the others from it; the output of each can be read."""
    service = Service(port=8000, commands=["echo mine; exec sleep 1000"], replicas=2, stop_duration=1)
    run = client.runs.submit(service, run_name="svc")
    wait_until(lambda: "connection refused" in dstack(home, "ps").stdout, timeout=60, what="the problem in the list")
    listed = dstack(home, "ps").stdout
    assert "0 of 2 ready" in listed
    with subprocess.Popen([*DSTACK, "logs", "svc", "--replica", "1"], env=home.env, stdout=subprocess.PIPE) as reading:
        assert reading.stdout is not None
        assert reading.stdout.readline() == b"mine\n"
        run.stop(abort=True)
        assert reading.wait(60) == 0
    assert "no replica 7" in dstack(home, "logs", "svc", "--replica", "7").stderr


def test_stop_asks_first(client: Client, home: Home) -> None:
    """A no leaves the run alone; -y does not ask; --abort kills."""
    run = client.runs.submit(Task(commands=["sleep 1000"], stop_duration=1), run_name="a-run")
    assert dstack(home, "stop", "a-run", given="n\n").returncode == 1
    run.refresh()
    assert not run.status.is_finished
    assert dstack(home, "stop", "a-run", "--abort", "-y").returncode == 0
    assert ended(run).status is RunStatus.ABORTED


@pytest.mark.parametrize("command", ["logs", "stop", "attach", "delete"])
def test_a_run_that_does_not_exist(client: Client, home: Home, command: str) -> None:
    """One line on standard error, and how to see which runs there are."""
    done = dstack(home, command, "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dstack: There is no run 'nope' in project 'main'. `dstack ps -a` shows all runs.\n"


def test_a_project_that_does_not_exist(home: Home) -> None:
    """Said without a traceback."""
    done = dstack(home, "ps", "--project", "nope")
    assert done.returncode == 1
    assert done.stderr.startswith("dstack: Project nope is not configured.")


def test_attach_shows_ports_and_output_and_ends_as_the_run_does(client: Client, home: Home) -> None:
    """The output is standard output, all else is standard error; the exit code says whether the run succeeded."""
    go = home.path / "go"
    task = Task(commands=["echo hi", f"while [ ! -e {go} ]; do sleep 0.05; done", "exit 4"], ports=["*:18423"])
    client.runs.submit(task, run_name="a-run", reserve_ports=False)
    with subprocess.Popen(
        [*DSTACK, "attach", "a-run"], env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == "hi\n"
        go.touch()
        out, err = attached.communicate(timeout=60)
    assert (attached.returncode, out) == (1, "")
    assert "Port 18423 of a-run is at 127.0.0.1:18423" in err
    assert "exited with code 4" in err


def test_ctrl_c_detaches_and_the_run_goes_on(client: Client, home: Home) -> None:
    """Exit code 130, and the way to stop the run."""
    run = client.runs.submit(Task(commands=["echo hi", "sleep 1000"], stop_duration=1), run_name="a-run")
    with subprocess.Popen(
        [*DSTACK, "attach", "a-run"], env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == "hi\n"
        attached.send_signal(signal.SIGINT)
        _, err = attached.communicate(timeout=60)
    assert attached.returncode == 130
    assert err == "\nDetached; a-run goes on. To stop it: dstack stop a-run\n"
    run.refresh()
    assert run.status is RunStatus.RUNNING


def test_a_reader_that_has_seen_enough(client: Client, home: Home) -> None:
    """`dstack logs RUN | head -1` ends quietly."""
    ended(client.runs.submit(Task(commands=["yes | head -c 3000000"]), run_name="a-run"))
    with subprocess.Popen(
        [*DSTACK, "logs", "a-run"], env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        assert reading.stdout.readline() == b"y\n"
        reading.stdout.close()
        assert reading.stderr.read() == b""


def test_a_terminal_gets_colours_and_its_own_width(client: Client, home: Home) -> None:
    """On a terminal of 80 columns no line is longer than that, and the terminal is left as it was."""
    ended(client.runs.submit(Task(commands=["exit 3"]), run_name="a-run-with-quite-a-long-name"))
    parent, child = pty.openpty()
    env = {**home.env, "TERM": "xterm-256color", "COLUMNS": "80"}
    shown = b""
    with subprocess.Popen([*DSTACK, "ps"], env=env, stdin=child, stdout=child, stderr=child) as listing:
        os.close(child)
        wait_until(lambda: listing.poll() is not None, timeout=60, what="the end of dstack ps")
        shown = os.read(parent, 65536)
    os.close(parent)
    assert b"\x1b[31mfailed" in shown
    assert b"a-run-with-quite-a-long-name" in shown


def test_how_long_ago() -> None:
    """As people say it."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    said = [ago(now - timedelta(seconds=s), now) for s in (0, 1, 59, 60, 7200, 86400 * 3)]
    assert said == ["now", "1 sec ago", "59 secs ago", "1 min ago", "2 hours ago", "3 days ago"]
    assert ago(now + timedelta(seconds=5), now) == "now"
