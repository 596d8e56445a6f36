"""Intents: the wish for exactly one instance, rendered once and written down before any cloud is asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from dstack_core._engine.keyring import Keyring
from dstack_core._engine.naming import idempotency_token, instance_name, request_uuid, tag_value
from dstack_core._engine.seams import Seams
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import InstanceRequest
from dstack_core._models.offers import Offer
from dstack_core._models.runs import JobSpec
from dstack_core._transport import agent_command
from dstack_core._transport.cloud_init import Boot, user_data

SLACK = timedelta(hours=1)
"""How much longer than its job's `max_duration` a machine may exist at the very most: start, images, last output."""


ORPHAN_GRACE = 600.0
"""Seconds for which an agent without a running job stays when no server renews its lease."""


@dataclass(frozen=True, slots=True)
class IntentFor:
    """Whom an intent is for.

    Attributes:
        image: the job runs in a container.
        gpus: the job uses GPUs.
        ssh_key_pub: who else may log in to its machine.
    """

    job_id: UUID
    run_id: UUID
    run_name: str
    project_name: str
    max_duration: int | None
    image: bool = False
    gpus: bool = False
    ssh_key_pub: str | None = None

    @classmethod
    def of(cls, job_id: UUID, run_id: UUID, run_name: str, project_name: str, spec: JobSpec) -> IntentFor:
        """For an attempt of this job."""
        return cls(
            job_id=job_id,
            run_id=run_id,
            run_name=run_name,
            project_name=project_name,
            max_duration=spec.max_duration,
            image=spec.image_name is not None,
            gpus=spec.requirements.gpu is not None,
            ssh_key_pub=spec.ssh_key_pub,
        )


@dataclass(frozen=True, slots=True)
class NewIntent:
    """An intent that is not written down yet."""

    id: UUID
    whom: IntentFor
    request: InstanceRequest

    def values(self, now: datetime) -> dict[str, Any]:
        """The columns of the row that makes it binding."""
        offer = self.request.offer
        rendered = self.request.model_dump_json()
        return {
            "id": self.id,
            "job_id": self.whom.job_id,
            "run_id": self.whom.run_id,
            "backend": offer.backend,
            "region": offer.region,
            "zone": offer.zone,
            "status": InstanceStatus.INTENT.value,
            "request": rendered,
            "request_hash": hashlib.sha256(rendered.encode()).hexdigest(),
            "name": self.request.name,
            "price": offer.price,
            "created_at": now,
            "due_at": now,
        }


def render_intent(
    seams: Seams,
    owner: UUID,
    whom: IntentFor,
    offer: Offer,
    agent_pyz: Path,
    orphan_grace: float = ORPHAN_GRACE,
    keyring: Keyring | None = None,
) -> NewIntent:
    """Makes the intent to buy an offer for a job. Everything that depends on time or chance is drawn here, once.

    `keyring`: given for a machine that boots, which then gets user-data.

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
        **({} if keyring is None else _for_boot(keyring, intent, whom, offer, orphan_grace, expires_at)),
    )
    return NewIntent(intent, whom, request)


def _for_boot(
    keyring: Keyring, intent: UUID, whom: IntentFor, offer: Offer, grace: float, expires_at: datetime | None
) -> dict[str, Any]:
    """What a machine is given so that it can be reached."""
    key, gpus = keyring.server_key(), offer.resources.gpus
    users = (whom.ssh_key_pub,) if whom.ssh_key_pub else ()
    boot = Boot(
        instance=str(intent),
        server_key=key,
        public_keys=users,
        host_key=keyring.new_host_key(),
        grace=grace,
        expires_at=expires_at,
        container_engine=whom.image,
        gpus=gpus[0].vendor if whom.gpus and gpus else None,
    )
    return {"ssh_public_keys": (key, *users), "user_data": user_data(boot)}


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
