"""Requests as the engine renders them: names, tokens and tags are functions of owner and intent."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid5

from dstack_core.plugin import InstanceRequest, Offer

_NAMESPACE = UUID("6f0f1c1e-5b3c-5d0e-9a57-3d7d2a1d7e52")
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBfDSUHwfQHsJfL3qUS3XH6zmC1c0PIqdaTcKxXRoOSS suite@dstack"
_SOON = timedelta(hours=1)


def new_intent() -> UUID:
    """A UUID of version 7: it begins with the time."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76
    return UUID(int=value & ~(0b11 << 62) | 0b10 << 62)


def name_of(owner: UUID, intent: UUID) -> str:
    """The name on the cloud, 40 characters."""
    encoded = base64.b32encode(intent.bytes).decode().rstrip("=").lower()
    return f"dstack-{owner.hex[:8]}-{encoded[:8]}{encoded[-16:]}"


def render(owner: UUID, intent: UUID, offer: Offer, agent_command: tuple[str, ...]) -> InstanceRequest:
    """The request for one instance."""
    expires_at = datetime.now(UTC).replace(microsecond=0) + _SOON
    return InstanceRequest(
        intent=intent,
        owner=owner,
        name=name_of(owner, intent),
        token=hashlib.sha256(f"{owner}|{intent}".encode()).hexdigest(),
        request_id=uuid5(_NAMESPACE, f"{owner}|{intent}"),
        offer=offer,
        tags={
            "managed-by": "dstack",
            "owner": str(owner),
            "intent": str(intent),
            "run": "conformance",
            "project": "suite",
            "expires-at": expires_at.strftime("%Y%m%d-%H%M%S-utc"),
        },
        expires_at=expires_at,
        ssh_public_keys=(_KEY,),
        user_data="#cloud-config\n",
        agent_command=agent_command,
    )
