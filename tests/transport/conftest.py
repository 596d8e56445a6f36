"""Fixtures of this room: real agents, and real machines."""

from __future__ import annotations

from tests.support.machines import fleet, machine_key
from tests.support.real_agents import agent_archive, start_agent
from tests.support.ssh_machines import boot, key_file, transport

__all__ = ["agent_archive", "boot", "fleet", "key_file", "machine_key", "start_agent", "transport"]
