"""Names and tokens of an instance: pure functions of its owner and intent, the same ones in every process."""

from __future__ import annotations

import base64
import hashlib
import re
from uuid import UUID, uuid5

_NAMESPACE = UUID("6f0f1c1e-5b3c-5d0e-9a57-3d7d2a1d7e52")
_PREFIX = "dstack"


def instance_name(owner: UUID, intent: UUID) -> str:
    """The name on the cloud: `dstack-OWNER-INTENT`, exactly 40 characters, an RFC 1035 label."""
    encoded = base64.b32encode(intent.bytes).decode().rstrip("=").lower()
    # The end of a version 7 UUID is chance, its beginning time: both ends together stay unique at 24 characters.
    return f"{_PREFIX}-{owner.hex[:8]}-{encoded[:8]}{encoded[-16:]}"


def idempotency_token(owner: UUID, intent: UUID) -> str:
    """64 hexadecimal characters: the longest that EC2 takes as `ClientToken`."""
    return hashlib.sha256(f"{owner}|{intent}".encode()).hexdigest()


def request_uuid(owner: UUID, intent: UUID) -> UUID:
    """For clouds that want a UUID, as Compute Engine's `requestId`."""
    return uuid5(_NAMESPACE, f"{owner}|{intent}")


def tag_value(text: str) -> str:
    """The text as a tag value that every cloud takes: `[a-z0-9_-]`, at most 63 characters."""
    return re.sub(r"[^a-z0-9_-]", "-", text.lower())[:63]
