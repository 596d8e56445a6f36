"""Jobs for people: what counts as somebody at work, and the end when nobody is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack_core.testing import wait_until
from tests.support.docker import Docker
from tests.support.real_agents import LONG, RealAgent, StartAgent

LIMIT = 2.5
"""Seconds without anybody after which the jobs of these tests end."""
STAY = "exec sleep 2147483647"


@contextmanager
def terminal(folder: Path) -> Iterator[None]:
    """A shell of this user in a folder, as an editor opens one."""
    with subprocess.Popen(["/bin/sh", "-c", "echo; read line"], cwd=folder, stdin=-1, stdout=-1) as shell:
        assert shell.stdout
        shell.stdout.readline()
        yield
        shell.communicate(b"\n")


def outlives(agent: RealAgent, seconds: float) -> None:
    """The job runs for that long from now on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = agent.get(f"/v1/jobs/1?after={agent.state()['seq']}&wait=0.2")
        assert state["status"] == "running", state


def ends_by_itself(agent: RealAgent) -> None:
    """For want of anybody at work."""
    assert agent.wait()["reason"] == "inactive"


def test_nobody_at_work(agent: RealAgent) -> None:
    """The job ends after that time and not before, politely, with a reason of its own."""
    agent.run(f"trap 'echo bye' TERM; sh -c '{STAY}'", inactivity=LIMIT, stop_grace=LONG)
    agent.wait("running")
    began = time.monotonic()
    ends_by_itself(agent)
    assert time.monotonic() - began > LIMIT / 2
    assert agent.output().endswith(b"bye\n")


def test_a_busy_processor_is_nobody(agent: RealAgent) -> None:
    """What the job computes, and what it prints, does not keep it."""
    agent.run(f"(while :; do echo x; done) & {STAY}", inactivity=LIMIT)
    ends_by_itself(agent)


def test_what_comes_before_the_wait_is_work(agent: RealAgent) -> None:
    """A job that still prepares is not idle, however long that takes."""
    agent.run(f"echo ready; while [ ! -e {agent.directory}/go ]; do sleep 0.05; done; {STAY}", inactivity=LIMIT)
    agent.wait_for_output(b"ready")
    outlives(agent, 2 * LIMIT)
    (agent.directory / "go").touch()
    ends_by_itself(agent)


def test_a_terminal_in_the_folder(agent: RealAgent) -> None:
    """Somebody is at work as long as it is open, also in a folder below."""
    agent.run(f"mkdir -p below; echo ready; {STAY}", inactivity=LIMIT)
    agent.wait_for_output(b"ready")
    with terminal(agent.directory / "job" / "below"):
        outlives(agent, 3 * LIMIT)
    ends_by_itself(agent)


def test_a_terminal_in_a_folder_of_the_users_own(agent: RealAgent, tmp_path: Path) -> None:
    """An absolute working directory is one to work in, too; a process elsewhere is none of ours."""
    project = tmp_path / "project"
    project.mkdir()
    agent.run(f"echo ready; {STAY}", inactivity=LIMIT, working_dir=str(project))
    agent.wait_for_output(b"ready")
    with terminal(project):
        outlives(agent, 3 * LIMIT)
    with terminal(tmp_path):
        ends_by_itself(agent)


def test_files_that_change(agent: RealAgent) -> None:
    """Whoever writes them is at work."""
    agent.run(f"mkdir -p a/b; echo ready; {STAY}", inactivity=LIMIT)
    agent.wait_for_output(b"ready")
    until = time.monotonic() + 3 * LIMIT
    while time.monotonic() < until:
        (agent.directory / "job" / "a" / "b" / "file").write_text("x")
        outlives(agent, LIMIT / 8)
    ends_by_itself(agent)


def test_a_change_among_many_files_is_not_overlooked(agent: RealAgent) -> None:
    """More files than one look takes: the one that changes keeps the job, and it ends when none does."""
    make = "import os; [(os.mkdir(f'd{n}'), [open(f'd{n}/{m}', 'w') for m in range(100)]) for n in range(130)]"
    agent.run(f'{sys.executable} -c "{make}"; echo ready; {STAY}', inactivity=LIMIT)
    agent.wait_for_output(b"ready")
    until = time.monotonic() + 3 * LIMIT
    while time.monotonic() < until:
        (agent.directory / "job" / "d77" / "50").write_text("x")
        outlives(agent, LIMIT / 8)
    ends_by_itself(agent)


def test_files_from_the_future_and_folders_that_cannot_be_read(agent: RealAgent) -> None:
    """They say nothing, and do no harm."""
    agent.run(f"touch -d 2099-01-01 late; mkdir -m 0 shut; ln -s /nowhere gone; {STAY}", inactivity=LIMIT)
    ends_by_itself(agent)


def test_somebody_says_so(agent: RealAgent) -> None:
    """`POST activity`, as the client of whoever is attached does it."""
    agent.run(STAY, inactivity=LIMIT)
    agent.wait("running")
    until = time.monotonic() + 3 * LIMIT
    while time.monotonic() < until:
        assert agent.call("POST", "/v1/jobs/1/activity", {}) == {}
        outlives(agent, LIMIT / 8)
    ends_by_itself(agent)


def test_activity_of_a_job_that_does_not_mind(agent: RealAgent) -> None:
    """Accepted for any job; one that is not there is refused."""
    agent.run("sleep 600")
    assert agent.call("POST", "/v1/jobs/1/activity", {}) == {}
    assert agent.request("POST", "/v1/jobs/2/activity", {}).status == 404


@pytest.mark.root
def test_the_terminals_of_others_do_not_count(agent: RealAgent, tmp_path: Path) -> None:
    """Root sees into everybody's processes; only its own count for its jobs."""
    project = tmp_path / "project"
    project.mkdir()
    agent.run(f"echo ready; {STAY}", inactivity=LIMIT, working_dir=str(project))
    agent.wait_for_output(b"ready")
    with subprocess.Popen(["sleep", "600"], cwd=project, user=65534) as other:
        ends_by_itself(agent)
        other.kill()


@pytest.mark.docker
@pytest.mark.parametrize("program", ["docker", "podman"])
def test_a_session_in_the_container(
    request: pytest.FixtureRequest, start_agent: StartAgent, tmp_path: Path, program: str
) -> None:
    """Somebody is at work as long as it is open; the health checks of the image are nobody."""
    engine: Docker = request.getfixturevalue(program)
    agent = start_agent()
    health = ["HEALTHCHECK --interval=1s CMD /bin/sleep 1"] if program == "docker" else []
    agent.run(f"echo $DSTACK_CONTAINER; {STAY}", image=engine.image(changes=health), inactivity=2 * LIMIT)
    agent.wait("running")
    agent.wait_for_output(b"\n")
    name = agent.log()[0].decode().strip()
    session = [engine.program, "exec", "-i", name, "/bin/cat"]
    with subprocess.Popen(session, env=engine.env, stdin=-1, stdout=-1) as shell:
        assert shell.stdin
        assert shell.stdout
        shell.stdin.write(b"x\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == b"x\n"
        outlives(agent, 5 * LIMIT)
        shell.communicate()
    ends_by_itself(agent)


@pytest.mark.docker
def test_the_preparation_in_a_container_is_work(docker: Docker, start_agent: StartAgent) -> None:
    """As for a process: what comes before the wait does not count as idle."""
    agent = start_agent()
    script = f"echo ready; while [ ! -e /go ]; do sleep 0.1; done; {STAY}"
    agent.run(script, image=docker.image(), inactivity=LIMIT)
    agent.wait("running")
    agent.wait_for_output(b"ready")
    outlives(agent, 2 * LIMIT)
    (container,) = docker.containers(f"dstack.instance={agent.directory.name}")
    docker("exec", container, "/bin/touch", "/go")
    ends_by_itself(agent)


def test_no_limit(agent: RealAgent) -> None:
    """Without one, the job stays."""
    agent.run(STAY)
    agent.wait("running")
    wait_until(lambda: agent.get("/v1/jobs/1/metrics")["processes"] == 1, timeout=LONG, what="the job to wait")
    outlives(agent, 1.0)
