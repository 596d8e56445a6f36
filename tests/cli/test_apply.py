"""`dstack apply` and `dstack init`: from a file to a run and its end, as a person at a terminal or a script sees it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack.api import Client, Run, RunStatus
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended

DSTACK = [sys.executable, "-m", "dstack_core._cli"]


@pytest.fixture
def project(home: Home) -> Path:
    """A folder to run from."""
    folder = home.path.parent / "project"
    folder.mkdir()
    return folder


def dstack(home: Home, project: Path, *args: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [*DSTACK, *args],
        env={**home.env, **env},
        cwd=project,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def applying(home: Home, project: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs. It is killed if it is still there in the end."""
    with subprocess.Popen(
        [*DSTACK, "apply", "-y", *args],
        env=home.env,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        try:
            yield command
        finally:
            command.kill()


def the_run(client: Client, name: str) -> Run:
    """The run of that name."""
    run = client.runs.get(name)
    assert run is not None
    return run


def test_a_file_is_run_to_its_end(client: Client, home: Home, project: Path) -> None:
    """The plan and all else goes to standard error, the output to standard output; the exit code is the run's."""
    (project / ".dstack.yml").write_text("type: task\nname: a-run\ncommands: [echo hello, exit 3]\n")
    done = dstack(home, project, "apply", "-y")
    assert (done.returncode, done.stdout) == (3, "hello\n")
    facts = dict(line.split(maxsplit=1) for line in done.stderr.splitlines()[:6])
    assert facts["Configuration"].strip() == ".dstack.yml"
    assert (facts["Type"].strip(), facts["Name"].strip(), facts["Project"].strip()) == ("task", "a-run", "main")
    assert "1  local    local   local" in done.stderr
    assert "a-run is submitted. Ctrl+C stops it.\n" in done.stderr
    assert done.stderr.endswith("the job exited with code 3\n")
    assert the_run(client, "a-run").status is RunStatus.FAILED


def test_it_asks_first(client: Client, home: Home, project: Path) -> None:
    """A no, and nobody there to answer, leave it at the plan; a yes does not."""
    (project / "x.yml").write_text("type: task\ncommands: [echo hello]\n")
    for answer in ("n\n", "\n", ""):
        done = dstack(home, project, "apply", "-f", "x.yml", given=answer)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Submit it? [y/N]: " in done.stderr
        assert done.stderr.endswith("Pass -y to say yes.\n") == (answer == "")
    assert client.runs.list(all=True) == []
    assert dstack(home, project, "apply", "-f", "x.yml", given="y\n").stdout == "hello\n"


def test_options_win_over_the_profile_and_the_file(client: Client, home: Home, project: Path) -> None:
    """Name, variables, price and backends; the profile of that name, or else the default one."""
    (project / "x.yml").write_text(
        "type: task\nname: other\ncommands: ['echo $A $B $C']\nenv: {A: file, B: file}\nmax_price: 1\n"
    )
    (project / ".dstack").mkdir()
    (project / ".dstack" / "profiles.yml").write_text(
        "profiles:\n- {name: p, max_price: 2, max_duration: 1h}\n- {name: d, default: true, max_duration: 2h}\n"
    )
    options = ("-n", "a-run", "--profile", "p", "--max-price", "3", "-b", "local", "-e", "B=option", "--env", "C")
    done = dstack(home, project, "apply", "-y", "-f", "x.yml", *options, C="here")
    assert (done.returncode, done.stdout) == (0, "file option here\n")
    assert "Profile        p" in done.stderr
    run = the_run(client, "a-run")._model
    assert (run.run_spec.configuration_path, run.run_spec.profile.backends) == ("x.yml", ("local",))
    job = run.jobs[0].job_spec
    assert (job.requirements.max_price, job.max_duration) == (3, 3600)
    assert "Max duration   2h" in dstack(home, project, "apply", "-f", "x.yml").stderr


def test_detached(client: Client, home: Home, project: Path) -> None:
    """Returns at once, and says how to follow and to stop it."""
    (project / ".dstack.yml").write_text("type: task\nname: a-run\ncommands: [sleep 1000]\nstop_duration: 1s\n")
    done = dstack(home, project, "apply", "-y", "-d")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("submitted. To follow it: dstack attach a-run. To stop it: dstack stop a-run\n")
    assert not the_run(client, "a-run").status.is_finished


def test_ctrl_c_stops_politely(client: Client, home: Home, project: Path) -> None:
    """Without a question; what the run says at its end is seen, and its exit code is told."""
    wait = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done"
    (project / ".dstack.yml").write_text(f'type: task\nname: a-run\ncommands: ["{wait}"]\n')
    with applying(home, project) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "up\n"
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
    assert command.returncode == 7
    assert out.endswith("bye\n")
    assert "\nStopping a-run; Ctrl+C again aborts it\n" in err
    assert ended(the_run(client, "a-run")).status is RunStatus.TERMINATED


def test_a_second_ctrl_c_aborts(client: Client, home: Home, project: Path) -> None:
    """A run that does not want to stop is killed."""
    wait = "trap 'echo no' TERM; echo up; while :; do sleep 0.1; done"
    (project / ".dstack.yml").write_text(f'type: task\nname: a-run\ncommands: ["{wait}"]\nstop_duration: 1h\n')
    with applying(home, project) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "up\n"
        command.send_signal(signal.SIGINT)
        while (line := command.stdout.readline()) != "no\n":
            assert line
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
    assert command.returncode not in (0, None)
    assert "\nAborting a-run; Ctrl+C once more leaves it\n" in err
    assert ended(the_run(client, "a-run")).status is RunStatus.ABORTED


def test_a_third_ctrl_c_leaves(client: Client, home: Home, project: Path) -> None:
    """Also when no server answers; the run is left as it is."""
    (project / ".dstack.yml").write_text("type: task\nname: a-run\ncommands: [echo up, sleep 1000]\n")
    with applying(home, project) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.readline() == "up\n"
        server = home.server_pid()
        assert server is not None
        os.kill(server, signal.SIGSTOP)
        try:
            for word in ("Stopping", "Aborting"):
                command.send_signal(signal.SIGINT)
                while not command.stderr.readline().startswith(word):
                    assert command.poll() is None
            command.send_signal(signal.SIGINT)
            assert command.wait(60) == 130
        finally:
            os.kill(server, signal.SIGCONT)
    the_run(client, "a-run").stop(abort=True)


def test_a_dev_environment(client: Client, home: Home, project: Path) -> None:
    """Its ports are forwarded, the way in is shown, and Ctrl+C ends it."""
    (project / ".dstack.yml").write_text(
        "type: dev-environment\nname: a-run\nide: zed\nports: ['*:18426']\ninactivity_duration: 1h\n"
    )
    with applying(home, project) as command:
        assert command.stdout is not None
        shown = ""
        while "It runs until" not in shown:
            line = command.stdout.readline()
            assert line, shown
            shown += line
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
    assert "  Open in Zed:" in shown
    assert "Inactivity     1h" in err
    assert "Port 18426 of a-run is at 127.0.0.1:18426\n" in err
    assert command.returncode == 143
    assert ended(the_run(client, "a-run")).status is RunStatus.TERMINATED


def test_nothing_can_run_it(client: Client, home: Home, project: Path) -> None:
    """Said with the reason, and not asked about."""
    (project / ".dstack.yml").write_text("type: task\ncommands: [x]\nresources: {memory: 900TB}\n")
    done = dstack(home, project, "apply", given="y\n")
    assert done.returncode == 1
    assert "memory=921600GB.." in done.stderr
    assert "  local: " in done.stderr
    assert "Submit it?" not in done.stderr
    assert done.stderr.endswith("dstack: No offer can run this now.\n")


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [
        (None, (), "There is no .dstack.yml in"),
        ("type: task\ncomands: [x]\n", (), ".dstack.yml, line 2, comands: unknown key 'comands' (did you mean 'com"),
        ("type: task\ncommands: [x]\n", ("--profile", "nope"), "There is no profile 'nope'."),
        ("type: task\ncommands: [x]\n", ("-e", "A=1", "-e", "A=2"), "'A' is given twice: keep one of them"),
        ("type: task\ncommands: [x]\n", ("-e", "NOBODY_SET_THIS"), "not set in your environment: NOBODY_SET_THIS"),
        ("type: task\ncommands: [x]\n", ("-n", "No Name"), "'No Name' cannot name a run"),
    ],
)
def test_mistakes(home: Home, project: Path, text: str | None, args: tuple[str, ...], words: str) -> None:
    """One line on standard error, without a traceback."""
    if text is not None:
        (project / ".dstack.yml").write_text(text)
    done = dstack(home, project, "apply", *args)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dstack: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1 or "Write one, for example" in done.stderr


def test_on_a_terminal(client: Client, home: Home, project: Path) -> None:
    """The plan has colours, the question waits for an answer, and no line is broken at 80 columns."""
    (project / ".dstack.yml").write_text("type: task\nname: a-run\ncommands: [echo hello]\n")
    parent, child = pty.openpty()
    env = {**home.env, "TERM": "xterm-256color", "COLUMNS": "80"}
    shown = b""
    with subprocess.Popen([*DSTACK, "apply"], env=env, cwd=project, stdin=child, stdout=child, stderr=child) as command:
        os.close(child)
        while b"Submit it? [y/N]:" not in shown:
            shown += os.read(parent, 65536)
        os.write(parent, b"y\n")
        while b"hello\r\n" not in shown:
            shown += os.read(parent, 65536)
        wait_until(lambda: command.poll() is not None, timeout=60, what="the end of dstack apply")
    os.close(parent)
    assert command.returncode == 0
    assert b"\x1b[32mavailable" in shown
    assert b"\x1b[1mConfiguration" in shown


def test_init_of_a_folder_that_does_not_exist(home: Home, project: Path) -> None:
    """Named, without a traceback."""
    done = dstack(home, project, "init", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dstack: ")
    assert "nowhere" in done.stderr
