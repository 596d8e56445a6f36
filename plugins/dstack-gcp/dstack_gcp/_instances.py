"""From the contract's request to Compute Engine's, and from its description of an instance back."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from dstack_core.plugin import (
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    StateReason,
    UnknownOutcomeError,
)
from dstack_gcp._config import GcpConfig
from dstack_gcp._images import Image
from dstack_gcp._labels import labels_of, tags_of
from dstack_gcp._market import attached_to
from dstack_gcp._network import TAG

_STATES = {
    "PENDING": InstanceState.PENDING,
    "PROVISIONING": InstanceState.PENDING,
    "STAGING": InstanceState.PENDING,
    "RUNNING": InstanceState.RUNNING,
    "REPAIRING": InstanceState.RUNNING,
    # What Compute Engine calls terminated is only switched off: its disk is billed on, and anybody may start it again.
    "PENDING_STOP": InstanceState.STOPPING,
    "STOPPING": InstanceState.STOPPING,
    "DEPROVISIONING": InstanceState.STOPPING,
    "STOPPED": InstanceState.STOPPING,
    "SUSPENDING": InstanceState.STOPPING,
    "SUSPENDED": InstanceState.STOPPING,
    "TERMINATED": InstanceState.STOPPING,
}
_REQUEST_LABEL = "request"
_LONGEST = timedelta(days=120)
"""The farthest time limit that Compute Engine takes."""


def request_digest(request: InstanceRequest) -> str:
    """Tells whether two requests are the same, byte for byte."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:32]


def launch(
    config: GcpConfig, request: InstanceRequest, image: Image, interface: dict[str, object], now: datetime
) -> dict[str, Any]:
    """The instance to insert, in the SDK's terms."""
    offer = request.offer
    zone = f"zones/{offer.zone}"
    labels = labels_of({**config.labels, **request.tags, _REQUEST_LABEL: request_digest(request)})
    base, cards = attached_to(offer.instance_type)
    body: dict[str, Any] = {
        "name": request.name,
        "machine_type": f"{zone}/machineTypes/{base}",
        "labels": labels,
        "tags": {"items": [TAG]},
        "disks": [_disk(image, offer.resources.disk_mib, zone, labels)],
        "network_interfaces": [interface],
        "metadata": {
            "items": [
                {"key": "user-data", "value": request.user_data},
                # Nobody gets in whose key was not asked for.
                {"key": "block-project-ssh-keys", "value": "true"},
                {"key": "enable-oslogin", "value": "FALSE"},
            ]
        },
        "scheduling": _scheduling(request, now),
    }
    if cards:
        body["guest_accelerators"] = [
            {"accelerator_type": f"{zone}/acceleratorTypes/{name}", "accelerator_count": count} for name, count in cards
        ]
    if config.vm_service_account is not None:
        scope = "https://www.googleapis.com/auth/cloud-platform"
        body["service_accounts"] = [{"email": config.vm_service_account, "scopes": [scope]}]
    return body


def _disk(image: Image, disk_mib: int, zone: str, labels: dict[str, str]) -> dict[str, Any]:
    size = max(image.disk_gib, disk_mib // 1024)
    made_of = {
        "source_image": image.path,
        "disk_size_gb": size,
        "disk_type": f"{zone}/diskTypes/pd-balanced",
        "labels": labels,
    }
    return {"boot": True, "auto_delete": True, "initialize_params": made_of}


def _scheduling(request: InstanceRequest, now: datetime) -> dict[str, Any]:
    """Spot, GPUs and the time limit. A limit as a point in time, which is the same when the request is repeated."""
    spot, expires = request.offer.spot, request.expires_at
    how: dict[str, Any] = {"automatic_restart": False, "provisioning_model": "SPOT" if spot else "STANDARD"}
    if spot or request.offer.resources.gpus:
        how["on_host_maintenance"] = "TERMINATE"
    limited = expires is not None and timedelta(seconds=60) < expires - now < _LONGEST
    if limited and expires is not None:
        how["termination_time"] = expires.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if spot or limited:
        how["instance_termination_action"] = "DELETE"
    return how


def is_of(described: Any, request: InstanceRequest) -> bool:
    """Whether an instance was started by exactly this request."""
    return bool(described.labels.get(_REQUEST_LABEL) == request_digest(request))


def ref_of(owner: UUID, intent: UUID, name: str, zone: str) -> InstanceRef:
    """How an instance is found again. Whose it is goes along, since what is gone can no longer be asked."""
    return InstanceRef(backend="gcp", id=name, region=region_of(zone), zone=zone, data=f"{owner} {intent}")


def whose(ref: InstanceRef) -> tuple[UUID, UUID] | None:
    """Owner and intent of a reference."""
    try:
        owner, intent = ref.data.split(" ")
        return UUID(owner), UUID(intent)
    except ValueError:
        return None


def region_of(zone: str) -> str:
    """`us-central1` of `us-central1-a`."""
    return zone.rpartition("-")[0]


def instance(described: Any, reason: StateReason | None = None) -> Instance | None:
    """An instance, from Compute Engine's description; `None` for one that is not ours."""
    tags = tags_of(dict(described.labels))
    try:
        intent, owner = UUID(tags["intent"]), UUID(tags["owner"])
    except (KeyError, ValueError):
        return None
    state = _STATES.get(described.status)
    if state is None:
        raise UnknownOutcomeError(f"{described.name} is {described.status!r}, which is new: update dstack-gcp")
    address = _address(described)
    over = state is InstanceState.STOPPING
    return Instance(
        ref=ref_of(owner, intent, described.name, described.zone.rpartition("/")[2]),
        intent=intent,
        owner=owner,
        state=state,
        reason=reason if over else None,
        created_at=datetime.fromisoformat(described.creation_timestamp),
        endpoint=Endpoint(ssh_host=address) if address and not over else None,
    )


def _address(described: Any) -> str | None:
    """The public one, or else that in the network."""
    for interface in described.network_interfaces:
        for config in interface.access_configs:
            if config.nat_i_p:
                return str(config.nat_i_p)
        if not interface.access_configs and interface.network_i_p:
            return str(interface.network_i_p)
    return None
