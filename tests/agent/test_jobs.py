"""Jobs as process trees: how they start, how they end, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dstack_core._transport import agent_command
from dstack_core.testing import wait_until
from tests.support.real_agents import LONG, RealAgent, Refused, StartAgent

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
while True: time.sleep(60)
"""

DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2): os.dup2(null, fd)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
"""


def test_exit_code(agent: RealAgent) -> None:
    """The main process's own, with reason `exited` and all three times in order."""
    agent.run("exit 42")
    state = agent.wait()
    assert (state["exit_code"], state["reason"], state["message"]) == (42, "exited", None)
    assert state["started_at"] <= state["running_at"] <= state["finished_at"]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTERM, signal.SIGKILL])
def test_end_by_signal(agent: RealAgent, number: signal.Signals) -> None:
    """128 + N, and the signal's name in the message; a SIGKILL that is not ours has a reason of its own."""
    agent.run(argv=[sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"])
    state = agent.wait()
    assert state["exit_code"] == 128 + number
    assert state["reason"] == ("killed" if number == signal.SIGKILL else "exited")
    assert number.name in state["message"]


def test_argv_is_run_as_it_is(agent: RealAgent) -> None:
    """No shell touches it."""
    agent.run(argv=["printf", "%s|", "a b", "$HOME", "*", ""])
    assert agent.output() == b"a b|$HOME|*||"


def test_shell_is_bash_where_there_is_one(agent: RealAgent) -> None:
    """Scripts may use what bash can do."""
    if not Path("/bin/bash").exists():
        pytest.skip("needs /bin/bash")
    agent.run('[[ "x" == x ]] && a=(1 2) && echo ${#a[@]}')
    assert agent.output() == b"2\n"


def test_environment_and_folder(start_agent: StartAgent, tmp_path: Path) -> None:
    """The job has the machine's environment and its own on top, and starts in a fresh folder."""
    agent = start_agent(env={"FROM_MACHINE": "m", "BOTH": "m", "HOME": str(tmp_path)})
    agent.run("echo $FROM_MACHINE $BOTH $OWN $HOME; pwd; ls -A", env={"BOTH": "j", "OWN": "a b"})
    assert agent.output().decode().splitlines() == [f"m j a b {tmp_path}", str(agent.directory / "job")]


def test_term_can_be_set(agent: RealAgent) -> None:
    """Who asks for colours gets them."""
    agent.run("echo $TERM", env={"TERM": "xterm-256color"})
    assert agent.output() == b"xterm-256color\n"


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_working_dir(agent: RealAgent, tmp_path: Path, kind: str) -> None:
    """A relative one is made below the fresh folder; an absolute one is used as it is."""
    agent.run("pwd", working_dir="a/b" if kind == "relative" else str(tmp_path))
    expected = agent.directory / "job/a/b" if kind == "relative" else tmp_path
    assert agent.output().decode().strip() == str(expected)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"argv": ["/no/such/program"]}, ["/no/such/program does not exist"]),
        ({"argv": ["no-such-program"]}, ["no-such-program cannot be run", "PATH"]),
        ({"argv": ["true"], "working_dir": "/no/such/folder"}, ["/no/such/folder does not exist", "working_dir"]),
        ({"argv": ["/etc/passwd"]}, ["/etc/passwd cannot be run", "ermission"]),
        ({"argv": ["true", "a\0b"]}, ["true cannot be run", "Invalid argument"]),
        ({"argv": ["true"], "env": {"A=B": "c"}}, ["true cannot be run", "Invalid argument"]),
    ],
)
def test_a_job_that_cannot_start_says_why(agent: RealAgent, spec: dict[str, object], words: list[str]) -> None:
    """Reason `start_failed`, and a message that names the thing and the cure."""
    agent.run(None, **spec)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("start_failed", None)
    for word in words:
        assert word in state["message"]
    assert agent.output() == b""


def test_stop_is_polite_first(agent: RealAgent) -> None:
    """SIGTERM reaches the job, which may take its time within the grace, and its own exit code counts."""
    agent.run("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    agent.wait_for_output(b"ready\n")
    agent.stop(LONG)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", 7)
    assert agent.output().endswith(b"bye\n")


def test_grace_is_also_for_what_the_shell_leaves_behind(agent: RealAgent, tmp_path: Path) -> None:
    """The shell dies of SIGTERM at once; the program that it started still writes its checkpoint."""
    checkpoint = tmp_path / "checkpoint"
    program = tmp_path / "train.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(0.5); pathlib.Path({str(checkpoint)!r}).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready')\nwhile True: time.sleep(60)\n"
    )
    agent.run(f"{sys.executable} {program} & wait")
    agent.wait_for_output(b"ready\n")
    agent.stop(LONG)
    state = agent.wait()
    assert state["reason"] == "stopped"
    assert checkpoint.read_text() == "saved"


def test_stop_kills_after_the_grace(agent: RealAgent) -> None:
    """A job that ignores SIGTERM is killed, and that is still `stopped`."""
    agent.run(argv=[sys.executable, "-c", STUBBORN])
    agent.wait_for_output(b"ready\n")
    agent.stop(0.3)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", 137)


def test_a_later_stop_with_less_grace_wins(agent: RealAgent) -> None:
    """And one with more does not give it back."""
    agent.run(argv=[sys.executable, "-c", STUBBORN])
    agent.wait_for_output(b"ready\n")
    agent.stop(3600)
    agent.stop(0)
    agent.stop(3600)
    assert agent.wait()["reason"] == "stopped"
    assert agent.stop(1)["status"] == "exited"


def test_stop_reaches_a_suspended_job(agent: RealAgent) -> None:
    """A job that was stopped with SIGSTOP gets its SIGTERM."""
    agent.run("trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")
    agent.wait_for_output(b"ready\n")
    for pid in agent.job_processes():
        os.kill(pid, signal.SIGSTOP)
    agent.stop(LONG)
    assert agent.wait()["exit_code"] == 3


def test_max_duration(agent: RealAgent) -> None:
    """Enforced by the agent alone, with the job's own grace."""
    agent.run(argv=[sys.executable, "-c", STUBBORN], max_duration=0.5, stop_grace=0.2)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("max_duration", 137)


@pytest.mark.parametrize("how", ["ends", "is stopped"])
def test_a_daemon_does_not_outlive_its_job(agent: RealAgent, tmp_path: Path, how: str) -> None:
    """Forked twice, with a session of its own and no terminal: it is gone when the job has exited."""
    note = tmp_path / "pid"
    program = DAEMON + ("" if how == "ends" else "\nprint('ready')\ntime.sleep(600)")
    agent.run(argv=[sys.executable, "-c", program, str(note)])
    if how == "is stopped":
        agent.wait_for_output(b"ready\n")
        os.kill(int(note.read_text()), 0)
        agent.stop(1)
    agent.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert agent.job_processes() == set()


def test_background_processes_that_hold_the_terminal(agent: RealAgent) -> None:
    """The job ends with its main process, though a child still has the terminal open and writes."""
    agent.run("(while :; do echo noise; sleep 0.01; done) & echo main; exit 6")
    state = agent.wait()
    assert (state["exit_code"], state["reason"]) == (6, "exited")
    assert b"main\n" in agent.output()
    assert agent.job_processes() == set()


def test_last_words_of_a_helper_process(agent: RealAgent) -> None:
    """What a process substitution still prints after the main process has ended is kept."""
    if not Path("/bin/bash").exists():
        pytest.skip("needs /bin/bash")
    agent.run("exec > >(while read -r line; do sleep 0.05; echo late $line; done); echo x")
    assert agent.output() == b"late x\n"


def test_ports_of_a_process_are_its_own(agent: RealAgent) -> None:
    """A process listens on the machine itself, so each port maps to itself."""
    assert agent.run("sleep 60", ports=[8000, 9000])["ports"] == {"8000": 8000, "9000": 9000}


def test_many_processes_at_once(agent: RealAgent) -> None:
    """Two hundred children, gone in one go."""
    agent.run("for i in $(seq 200); do sleep 600 & done; echo ready; wait")
    agent.wait_for_output(b"ready\n")
    wait_until(lambda: len(agent.job_processes()) > 200, timeout=LONG, what="all of them to run")
    agent.stop(0)
    agent.wait()
    assert agent.job_processes() == set()


def test_a_job_that_forks_without_end(agent: RealAgent) -> None:
    """A chain of processes that each start the next and exit cannot run away."""
    program = "import os, time\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid(); time.sleep(0.005)"
    agent.run(argv=[sys.executable, "-c", program])
    state = agent.wait()
    assert state["exit_code"] == 0
    assert agent.job_processes() == set()


def test_a_job_for_another_instance_is_refused(start_agent: StartAgent, agent_archive: Path) -> None:
    """An address that was used again leads to another machine: its agent says whose it is, and takes nothing else."""
    agent = start_agent(command=agent_command(agent_archive, instance="mine"))
    with pytest.raises(Refused, match="this is instance mine, and the job is for yours") as refused:
        agent.call("PUT", "/v1/jobs/one", {"argv": ["true"], "instance": "yours"})
    assert refused.value.status == 421
    health = agent.call("GET", "/v1/health")
    assert (health["instance"], health["jobs"]) == ("mine", [])
    agent.call("PUT", "/v1/jobs/one", {"argv": ["true"], "instance": "mine"})
