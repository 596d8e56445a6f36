"""Fixtures of this room: real agents."""

from __future__ import annotations

from tests.support.real_agents import agent_archive, start_agent

__all__ = ["agent_archive", "start_agent"]
