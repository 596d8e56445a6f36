"""Intents: the wish for exactly one instance, rendered once and written down before any cloud is asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

from dstack_core._engine.naming import idempotency_token, instance_name, request_uuid, tag_value
from dstack_core._engine.seams import Seams
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import InstanceRequest
from dstack_core._models.offers import Offer
from dstack_core._store.tables import InstanceRow
from dstack_core._transport import agent_command

SLACK = timedelta(hours=1)
"""How much longer than its job's `max_duration` a machine may exist at the very most: start, images, last output."""


ORPHAN_GRACE = 600.0
"""Seconds for which an agent without a running job stays when no server renews its lease."""


@dataclass(frozen=True, slots=True)
class IntentFor:
    """Whom an intent is for."""

    job_id: UUID
    run_id: UUID
    run_name: str
    project_name: str
    max_duration: int | None


@dataclass(frozen=True, slots=True)
class NewIntent:
    """An intent that is not written down yet."""

    id: UUID
    whom: IntentFor
    request: InstanceRequest

    def row(self, now: datetime) -> InstanceRow:
        """The row that makes it binding."""
        offer = self.request.offer
        rendered = self.request.model_dump_json()
        return InstanceRow(
            id=self.id,
            job_id=self.whom.job_id,
            run_id=self.whom.run_id,
            backend=offer.backend,
            region=offer.region,
            zone=offer.zone,
            status=InstanceStatus.INTENT.value,
            request=rendered,
            request_hash=hashlib.sha256(rendered.encode()).hexdigest(),
            name=self.request.name,
            price=offer.price,
            created_at=now,
            due_at=now,
        )


def render_intent(
    seams: Seams, owner: UUID, whom: IntentFor, offer: Offer, agent_pyz: Path, orphan_grace: float = ORPHAN_GRACE
) -> NewIntent:
    """Makes the intent to buy an offer for a job. Everything that depends on time or chance is drawn here, once.

    A job without `max_duration` has no time at which its machine must be gone: there the agent's lease is what ends it.
    """
    intent = seams.ids.uuid7()
    expires_at = None
    if whom.max_duration is not None:
        expires_at = seams.clock.now() + timedelta(seconds=whom.max_duration) + SLACK
    request = InstanceRequest(
        intent=intent,
        owner=owner,
        name=instance_name(owner, intent),
        token=idempotency_token(owner, intent),
        request_id=request_uuid(owner, intent),
        offer=offer,
        tags=_tags(owner, intent, whom, expires_at),
        expires_at=expires_at,
        agent_command=agent_command(agent_pyz, orphan_grace, str(intent)),
    )
    return NewIntent(intent, whom, request)


def _tags(owner: UUID, intent: UUID, whom: IntentFor, expires_at: datetime | None) -> dict[str, str]:
    tags = {
        "managed-by": "dstack",
        "owner": str(owner),
        "intent": str(intent),
        "run": tag_value(whom.run_name),
        "project": tag_value(whom.project_name),
    }
    if expires_at is not None:
        tags["expires-at"] = expires_at.strftime("%Y%m%d-%H%M%S-utc")
    return tags
