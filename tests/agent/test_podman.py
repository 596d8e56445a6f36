"""Podman does what docker does."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.docker import Docker
from tests.support.real_agents import LONG, RealAgent, StartAgent

pytestmark = [pytest.mark.docker, pytest.mark.root]


@pytest.fixture
def agent(podman: Docker, start_agent: StartAgent) -> RealAgent:
    """An agent that finds podman alone."""
    return start_agent()


def test_script_ports_and_exit_code(agent: RealAgent, podman: Docker) -> None:
    """On a terminal, with published ports; the container is gone afterwards."""
    agent.run(
        "test -t 1 && echo terminal; echo $A; sleep 1; exit 4", image=podman.image(), ports=[80], env={"A": "a b"}
    )
    assert "80" in agent.wait("running")["ports"]
    assert agent.output() == b"terminal\na b\n"
    assert agent.wait()["exit_code"] == 4
    assert podman.containers(f"dstack.instance={agent.directory.name}") == []


def test_the_images_own_program(agent: RealAgent, podman: Docker) -> None:
    """Entrypoint and arguments of the image."""
    agent.run(None, image=podman.image({}, changes=['ENTRYPOINT ["/bin/echo", "hello"]', 'CMD ["c"]']))
    assert agent.output() == b"hello c\n"


def test_stop(agent: RealAgent, podman: Docker) -> None:
    """SIGTERM first."""
    agent.run("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done", image=podman.image())
    agent.wait_for_output(b"ready\n")
    agent.stop(LONG)
    assert agent.wait()["exit_code"] == 7


def test_killing_the_agent_removes_the_container(agent: RealAgent, podman: Docker) -> None:
    """No process and no container is left."""
    agent.run("sleep 600", image=podman.image())
    agent.wait("running")
    os.kill(agent.pid, signal.SIGKILL)
    agent.process.wait(LONG)
    assert agent.processes() == set()
    assert podman.containers(f"dstack.instance={agent.directory.name}") == []


def test_gpus_that_the_engine_cannot_grant(agent: RealAgent, podman: Docker) -> None:
    """The engine's words, and what to install."""
    agent.run("true", image=podman.image(), gpus="all")
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert "NVIDIA Container Toolkit" in state["message"]
