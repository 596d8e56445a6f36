"""What the agent survives, what does not survive the agent, and that it runs only once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstack_core._transport import agent_command
from dstack_core.testing import wait_until
from tests.support.real_agents import LONG, RealAgent, StartAgent

TREE = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
print("ready")
time.sleep(600)
"""


def is_alive(directory: Path) -> bool:
    """As a backend asks: does anybody hold the agent's lock?"""
    with (directory / "agent.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_lock_says_that_it_lives(agent: RealAgent) -> None:
    """The lock is held from the start to the end, and the directory stays."""
    assert is_alive(agent.directory)
    agent.run("echo x")
    agent.wait()
    agent.shutdown()
    assert not is_alive(agent.directory)
    assert (agent.directory / "agent.started").exists()
    assert not (agent.directory / "agent.sock").exists()


def test_a_second_agent_in_the_directory_ends_at_once(agent: RealAgent, agent_archive: Path) -> None:
    """Exit code 75, and the first is unharmed."""
    second = subprocess.run(
        agent_command(agent_archive), cwd=agent.directory, timeout=LONG, check=False, capture_output=True
    )
    assert second.returncode == 75
    assert agent.get("/v1/health")["pid"] == agent.pid


def test_an_instance_starts_only_once(agent: RealAgent, agent_archive: Path) -> None:
    """Exit code 76 after the first has ended, whatever the reason."""
    agent.shutdown()
    second = subprocess.run(
        agent_command(agent_archive), cwd=agent.directory, timeout=LONG, check=False, capture_output=True
    )
    assert second.returncode == 76
    assert not is_alive(agent.directory)


@pytest.mark.parametrize("order", ["first", "later"])
def test_killing_the_agent_kills_all_of_its_job(agent: RealAgent, order: str) -> None:
    """Within moments no process is left, daemons included; only then is the lock free."""
    agent.run(argv=[sys.executable, "-c", TREE])
    agent.wait_for_output(b"ready\n")
    assert len(agent.job_processes()) == 2
    if order == "later":
        # A watchdog that happens to be stopped catches up.
        os.kill(agent.watchdog, signal.SIGSTOP)
    os.kill(agent.pid, signal.SIGKILL)
    if order == "later":
        assert is_alive(agent.directory)
        os.kill(agent.watchdog, signal.SIGCONT)
    agent.process.wait(LONG)
    assert not is_alive(agent.directory)
    assert agent.processes() == set()


def test_killing_the_watchdog_harms_nothing(agent: RealAgent) -> None:
    """The agent goes on, keeps the lock, and still leaves nothing behind."""
    agent.run(argv=[sys.executable, "-c", TREE])
    agent.wait_for_output(b"ready\n")
    os.kill(agent.watchdog, signal.SIGKILL)
    agent.process.wait(LONG)
    assert is_alive(agent.directory)
    assert agent.state()["status"] == "running"
    agent.stop(0)
    assert agent.wait()["reason"] == "stopped"
    assert agent.job_processes() == set()
    agent.call("POST", "/v1/shutdown")
    wait_until(lambda: not is_alive(agent.directory), timeout=LONG, what="the agent to end")


@pytest.mark.parametrize("whom", ["watchdog", "agent"])
def test_sigterm_is_a_polite_end(agent: RealAgent, whom: str) -> None:
    """The job gets its grace, then the agent ends with code 0."""
    agent.run("trap 'sleep 0.2; touch saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done", stop_grace=LONG)
    agent.wait_for_output(b"ready\n")
    os.kill(agent.watchdog if whom == "watchdog" else agent.pid, signal.SIGTERM)
    assert agent.process.wait(LONG) == 0
    assert (agent.directory / "job/saved").exists()
    assert agent.processes() == set()


def test_its_server_may_die(agent_archive: Path, start_agent: StartAgent) -> None:
    """Who started it is killed with its whole process group and session; agent and job go on."""
    program = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[2:], cwd=sys.argv[1], start_new_session=False)\n"
        "time.sleep(600)\n"
    )
    # The agent's own command, started by a server that is about to die.
    server = [sys.executable, "-c", program, ".", *agent_command(agent_archive)]
    agent = start_agent(command=server, start_new_session=True)
    agent.run("echo before; while ! test -e go; do sleep 0.02; done; echo after")
    agent.wait_for_output(b"before\n")
    os.killpg(agent.process.pid, signal.SIGHUP)
    os.killpg(agent.process.pid, signal.SIGKILL)
    agent.process.wait(LONG)
    (agent.directory / "job/go").touch()
    assert agent.output() == b"before\nafter\n"
    assert agent.wait()["exit_code"] == 0


def test_no_descriptor_of_who_started_it(start_agent: StartAgent) -> None:
    """A pipe that leaks into the agent, or the job, would keep its reader waiting for ever."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    agent = start_agent(close_fds=False)
    agent.run("sleep 600")
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_suspending_everything(agent: RealAgent, tmp_path: Path) -> None:
    """A laptop that sleeps: all processes stop and go on, and nothing is lost."""
    agent.run("for i in $(seq 300); do echo $i; sleep 0.005; done")
    agent.wait_for_output(b"5\n")
    stopped = agent.processes()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    assert agent.output() == b"".join(b"%d\n" % number for number in range(1, 301))
    assert agent.wait()["exit_code"] == 0


def test_lease(agent: RealAgent) -> None:
    """Without renewal an agent whose job has ended ends itself; one that is renewed does not."""
    assert agent.health["lease_expires_at"]
    agent.run("true")
    agent.wait()
    first = agent.call("PUT", "/v1/lease", {"seconds": 3600})["lease_expires_at"]
    second = agent.call("PUT", "/v1/lease", {"seconds": 0.3})["lease_expires_at"]
    assert second < first
    assert agent.process.wait(LONG) == 0
    assert not is_alive(agent.directory)


def test_lease_spares_a_running_job(agent: RealAgent) -> None:
    """It waits for the job's end; only then does the expired lease count."""
    agent.run("while ! test -e go; do sleep 0.02; done; echo done > finished")
    agent.call("PUT", "/v1/lease", {"seconds": 0.1})
    expiry = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > expiry, what="the lease to expire")
    assert agent.state()["status"] == "running"
    (agent.directory / "job/go").touch()
    assert agent.process.wait(LONG) == 0
    assert (agent.directory / "job/finished").exists()


def test_an_agent_that_nobody_ever_speaks_to_ends_itself(start_agent: StartAgent, agent_archive: Path) -> None:
    """Whoever started it died before the first word: the first lease comes with the start."""
    agent = start_agent(command=agent_command(agent_archive, lease=0.5))
    assert agent.process.wait(LONG) == 0
    assert not is_alive(agent.directory)


def test_what_a_job_printed_last_waits_for_its_server(agent: RealAgent) -> None:
    """The lease ran out while the job ran: at its end another one begins, and a server that comes back finds it all."""
    agent.run("while ! test -e go; do sleep 0.02; done; echo last words")
    agent.call("PUT", "/v1/lease", {"seconds": 2})
    expiry = time.monotonic() + 2.2
    wait_until(lambda: time.monotonic() > expiry, what="the lease to expire")
    (agent.directory / "job/go").touch()
    agent.wait()
    assert agent.output() == b"last words\n"
    agent.call("PUT", "/v1/lease", {"seconds": 3600})
    expiry = time.monotonic() + 2.2
    wait_until(lambda: time.monotonic() > expiry, what="the second lease to have run out")
    assert agent.state()["status"] == "exited"


@pytest.mark.parametrize("given", [["0"], ["-1"], ["soon"], ["1", "2", "3"]])
def test_a_first_lease_that_is_none_is_refused(agent_archive: Path, tmp_path: Path, given: list[str]) -> None:
    """Usage, and nothing is started."""
    command = [*agent_command(agent_archive)[:-1], *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (64, [])
    assert b"usage" in done.stderr


def test_shutdown_kills_what_still_runs(agent: RealAgent) -> None:
    """No grace here: who wants one stops the job first."""
    agent.run(argv=[sys.executable, "-c", TREE])
    agent.wait_for_output(b"ready\n")
    agent.shutdown()
    assert agent.processes() == set()


def test_a_directory_with_a_very_long_path(start_agent: StartAgent, tmp_path: Path) -> None:
    """Longer than any socket address may be."""
    place = tmp_path / ("long" * 40)
    place.mkdir()
    agent = start_agent(directory=place)
    agent.run("echo x")
    assert agent.output() == b"x\n"


PYTHONS = ["3.8", "3.9", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize("version", PYTHONS)
def test_other_interpreters(version: str, start_agent: StartAgent, agent_archive: Path) -> None:
    """The same archive on Python 3.8 and later: a job, its output, its end."""
    python = _interpreter(version)
    agent = start_agent(command=[python, "-I", "-S", str(agent_archive), "serve"])
    agent.run(argv=[sys.executable, "-c", TREE + "# daemon"])
    agent.wait_for_output(b"ready\n")
    assert agent.get("/v1/jobs/1/metrics")["processes"] == 2
    agent.stop(0)
    assert agent.wait()["reason"] == "stopped"
    assert agent.job_processes() == set()
    assert agent.complaints() == ""


def _interpreter(version: str) -> str:
    for path in [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), Path(f"/usr/bin/python{version}")]:
        if path.exists():
            return str(path)
    pytest.skip(f"there is no Python {version} here")


def test_an_idle_agent_is_small_and_does_nothing(agent: RealAgent) -> None:
    """Both processes together hold less than 40 MB, and do not wake up."""
    agent.run("sleep 600")
    switches = _switches(agent.pid) + _switches(agent.watchdog)
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() > begun + 0.5, what="half a second")
    assert _switches(agent.pid) + _switches(agent.watchdog) - switches <= 3
    assert sum(_private(pid) for pid in (agent.pid, agent.watchdog)) < 40 << 10


def _switches(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def _private(pid: int) -> int:
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0])
