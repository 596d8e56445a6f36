"""How the server reaches the agents on its instances.

agent_protocol   what is said, and the errors
agent_client     the exchange: HTTP/1.1 over any stream socket
local            agents on this computer
archive          the agent as one file to start
"""

from __future__ import annotations

from dstack_core._transport.agent_protocol import (
    AgentCode,
    AgentConnection,
    AgentHealth,
    AgentJobSpec,
    AgentReason,
    AgentRefused,
    AgentRepo,
    AgentState,
    AgentStatus,
    AgentUnreachable,
    GpuMetrics,
    JobMetrics,
    LogChunk,
    Transport,
)
from dstack_core._transport.archive import agent_command, build_agent
from dstack_core._transport.local import LocalTransport

__all__ = [
    "AgentCode",
    "AgentConnection",
    "AgentHealth",
    "AgentJobSpec",
    "AgentReason",
    "AgentRefused",
    "AgentRepo",
    "AgentState",
    "AgentStatus",
    "AgentUnreachable",
    "GpuMetrics",
    "JobMetrics",
    "LocalTransport",
    "LogChunk",
    "Transport",
    "agent_command",
    "build_agent",
]
