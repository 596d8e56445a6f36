"""Fixtures of this room: real agents, and a container engine."""

from __future__ import annotations

import pytest

from tests.support.docker import docker, docker_engine, podman
from tests.support.git_hosts import git_server, ssh_server
from tests.support.real_agents import RealAgent, StartAgent, agent_archive, start_agent

__all__ = ["agent", "agent_archive", "docker", "docker_engine", "git_server", "podman", "ssh_server", "start_agent"]


@pytest.fixture
def agent(start_agent: StartAgent) -> RealAgent:
    """One running agent."""
    return start_agent()
