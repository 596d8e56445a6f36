"""How the server reaches the agents on its instances.

agent_protocol   what is said, and the errors
agent_client     the exchange: HTTP/1.1 over any stream socket
local            agents on this computer
ssh              agents on machines; imported when there is the first of them
ways             which of the two it is
keys             with which server and machines know each other
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
    HostKeyRefused,
    JobMetrics,
    LogChunk,
    Said,
    Transport,
)
from dstack_core._transport.archive import agent_command, build_agent
from dstack_core._transport.local import LocalTransport
from dstack_core._transport.ways import Ways

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
    "HostKeyRefused",
    "JobMetrics",
    "LocalTransport",
    "LogChunk",
    "Said",
    "Transport",
    "Ways",
    "agent_command",
    "build_agent",
]
