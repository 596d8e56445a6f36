"""What the proxy needs of the engine (`_engine/replicas.py`)."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID


class Replica(Protocol):
    """One process that answers for a service."""

    @property
    def key(self) -> UUID:
        """The attempt of the job: a replica that is started again has another key."""

    async def connect(self) -> socket.socket:
        """A connected, non-blocking stream socket to the replica's port. Raises `AgentUnreachable` or `OSError`."""


class ServiceView(Protocol):
    """A service as it is now."""

    @property
    def run_id(self) -> UUID:
        """The run."""

    @property
    def project(self) -> str:
        """Its project."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def auth(self) -> bool:
        """Whether it asks for the server's token."""

    @property
    def strip_prefix(self) -> bool:
        """Whether the replicas see paths without `/services/PROJECT/RUN`."""

    @property
    def model(self) -> str | None:
        """The model that it offers in OpenAI's protocol."""

    @property
    def model_prefix(self) -> str:
        """Under which path it speaks that protocol, as `/v1`."""

    @property
    def ready(self) -> Sequence[Replica]:
        """The replicas whose probes succeed."""

    @property
    def problem(self) -> str | None:
        """Why the others are not ready, for people: what was probed, what came of it, the last lines of the log."""


class Directory(Protocol):
    """Which services there are. One per server process."""

    async def find(self, project: str, run_name: str) -> ServiceView:
        """The service of that name. Raises `NotFoundError`."""

    async def models(self, project: str) -> Sequence[ServiceView]:
        """The services with a model."""

    async def wait_for_ready(self, run_id: UUID, seconds: float) -> ServiceView:
        """As soon as one replica is ready, or after that time. Raises `NotFoundError` if the run has ended."""

    def suspect(self, run_id: UUID, key: UUID) -> None:
        """A connection to that replica failed: it is left out until a probe says otherwise."""
