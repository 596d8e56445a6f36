"""From the contract's request to Azure's, and from Azure's description of a machine back."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from dstack_azure._config import AzureConfig
from dstack_azure._errors import SHORTAGES
from dstack_azure._images import image_of
from dstack_core.plugin import (
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    StateReason,
)

_REQUEST_TAG = "request"
NAME_TAG = "name"
_ADMIN = "dstack"
_POWER = {
    "starting": InstanceState.PENDING,
    "creating": InstanceState.PENDING,
    "running": InstanceState.RUNNING,
    # All of these are billed on, the machine or at least its disk, and can be started again.
    "stopping": InstanceState.STOPPING,
    "stopped": InstanceState.STOPPING,
    "deallocating": InstanceState.STOPPING,
    "deallocated": InstanceState.STOPPING,
    "hibernating": InstanceState.STOPPING,
    "hibernated": InstanceState.STOPPING,
}
_SHORT = frozenset(code.lower() for code in SHORTAGES)


def request_digest(request: InstanceRequest) -> str:
    """Tells whether two requests are the same, byte for byte."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:32]


def zone_of(region: str, number: str) -> str:
    """A zone's name, which is of this subscription alone: `eastus-1`."""
    return f"{region}-{number}"


def launch(config: AzureConfig, request: InstanceRequest, subnet: str) -> dict[str, Any]:
    """The body of the one call that makes the machine, its disk, its interface and its address.

    Raises:
        InvalidRequestError: there is no key to let in.
    """
    if not request.ssh_public_keys:
        raise InvalidRequestError("Azure starts no machine without an SSH key, and the request has none.")
    offer = request.offer
    tags = {**config.tags, **request.tags, NAME_TAG: request.name, _REQUEST_TAG: request_digest(request)}
    properties: dict[str, Any] = {
        "hardwareProfile": {"vmSize": offer.instance_type},
        "storageProfile": {
            "imageReference": image_of(config, offer.resources, 1 if offer.data == "V1" else 2),
            "osDisk": _disk(request),
        },
        "osProfile": _system(request),
        "networkProfile": {
            "networkApiVersion": "2022-11-01",
            "networkInterfaceConfigurations": [_interface(config, request, subnet, tags)],
        },
        "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
    }
    if offer.spot:
        # Whoever is taken away stays to be seen, and is ended by the engine. Up to the price on demand.
        properties |= {"priority": "Spot", "evictionPolicy": "Deallocate", "billingProfile": {"maxPrice": -1}}
    body: dict[str, Any] = {"location": offer.region, "tags": tags, "properties": properties}
    if offer.zone is not None:
        body["zones"] = [offer.zone.rpartition("-")[2]]
    return body


def _disk(request: InstanceRequest) -> dict[str, Any]:
    return {
        "name": f"{request.name}-disk",
        "createOption": "FromImage",
        "deleteOption": "Delete",
        "diskSizeGB": request.offer.resources.disk_mib // 1024,
        "managedDisk": {"storageAccountType": "StandardSSD_LRS"},
    }


def _system(request: InstanceRequest) -> dict[str, Any]:
    path = f"/home/{_ADMIN}/.ssh/authorized_keys"
    keys = [{"path": path, "keyData": key} for key in request.ssh_public_keys]
    return {
        "computerName": request.name,
        "adminUsername": _ADMIN,
        "customData": base64.b64encode(request.user_data.encode()).decode(),
        "linuxConfiguration": {"disablePasswordAuthentication": True, "ssh": {"publicKeys": keys}},
    }


def _interface(config: AzureConfig, request: InstanceRequest, subnet: str, tags: dict[str, str]) -> dict[str, Any]:
    address: dict[str, Any] = {"primary": True, "subnet": {"id": subnet}}
    if config.public_ips:
        address["publicIPAddressConfiguration"] = {
            "name": f"{request.name}-ip",
            "tags": tags,
            "sku": {"name": "Standard", "tier": "Regional"},
            "properties": {"deleteOption": "Delete", "publicIPAllocationMethod": "Static"},
        }
    return {
        "name": f"{request.name}-nic",
        "tags": tags,
        "properties": {
            "primary": True,
            "deleteOption": "Delete",
            "ipConfigurations": [{"name": "main", "properties": address}],
        },
    }


# -- back -------------------------------------------------------------------------------------------------------------


def group_of(resource: dict[str, Any]) -> str:
    """The resource group of a resource, from its id."""
    parts = str(resource["id"]).split("/")
    return parts[4] if len(parts) > 4 else ""


def statuses_of(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """What the instance view of a machine says."""
    view = resource.get("properties", {}).get("instanceView") or {}
    return list(view.get("statuses") or ())


def interface_of(resource: dict[str, Any]) -> str | None:
    """The id of a machine's first interface, once there is one."""
    profile = resource["properties"].get("networkProfile") or {}
    return next((str(one["id"]) for one in profile.get("networkInterfaces") or ()), None)


def address_in(interface: dict[str, Any], *, public: bool) -> str | None:
    """The address of an interface, once there is one."""
    for entry in interface["properties"].get("ipConfigurations") or ():
        inner = entry.get("properties") or {}
        if not public:
            return inner.get("privateIPAddress")
        shown = inner.get("publicIPAddress") or {}
        return (shown.get("properties") or {}).get("ipAddress")
    return None


def marked(resource: dict[str, Any]) -> tuple[UUID, UUID] | None:
    """The intent and owner that are written on a resource; `None` for one that is not ours."""
    tags = resource.get("tags") or {}
    try:
        return UUID(tags["intent"]), UUID(tags["owner"])
    except (KeyError, ValueError):
        return None


def is_of(tags: dict[str, str], request: InstanceRequest) -> bool:
    """Whether something was made by exactly this request."""
    return tags.get(_REQUEST_TAG) == request_digest(request)


def instance(
    machine: dict[str, Any], statuses: Iterable[dict[str, Any]] = (), address: str | None = None
) -> Instance | None:
    """An instance, from Azure's description of its machine; `None` for one that is not ours.

    Args:
        machine: the machine.
        statuses: of its instance view.
        address: where it is reached, if that is known.
    """
    ours = marked(machine)
    if ours is None:
        return None
    state, reason = _state(machine["properties"], list(statuses))
    region, zones = str(machine["location"]), machine.get("zones") or []
    return Instance(
        ref=InstanceRef(
            backend="azure",
            id=machine["name"],
            region=region,
            zone=zone_of(region, zones[0]) if zones else None,
            data=group_of(machine),
        ),
        intent=ours[0],
        owner=ours[1],
        state=state,
        reason=reason,
        created_at=_time(machine["properties"].get("timeCreated")),
        endpoint=Endpoint(ssh_host=address) if address and state is InstanceState.RUNNING else None,
    )


def half_made(part: dict[str, Any]) -> Instance | None:
    """What stands for an instance of which only parts are there: on its way to the end.

    Args:
        part: one of them, as the listing of resources has it.
    """
    ours = marked(part)
    name = (part.get("tags") or {}).get(NAME_TAG)
    if ours is None or name is None:
        return None
    return Instance(
        ref=InstanceRef(backend="azure", id=name, region=part["location"], data=group_of(part)),
        intent=ours[0],
        owner=ours[1],
        state=InstanceState.STOPPING,
        created_at=_time(part.get("createdTime")),
    )


def ended(request: InstanceRequest, group: str, at: str | None) -> Instance:
    """The instance of an intent that has ended, of which no more than a record is left."""
    offer = request.offer
    return Instance(
        ref=InstanceRef(backend="azure", id=request.name, region=offer.region, zone=offer.zone, data=group),
        intent=request.intent,
        owner=request.owner,
        state=InstanceState.TERMINATED,
        reason=StateReason.REQUESTED,
        created_at=_time(at),
    )


def _state(properties: dict[str, Any], statuses: list[dict[str, Any]]) -> tuple[InstanceState, StateReason | None]:
    codes = [str(status.get("code", "")).lower() for status in statuses]
    power = next((code.partition("/")[2] for code in codes if code.startswith("powerstate/")), None)
    provisioning = str(properties.get("provisioningState", "")).lower()
    if provisioning == "deleting":
        return InstanceState.STOPPING, StateReason.REQUESTED
    if provisioning == "failed" and power not in ("running", "deallocated", "stopped"):
        return InstanceState.STOPPING, _why_failed(codes)
    if power not in _POWER:
        # Not told yet, or not at the moment, as Azure says now and then.
        return (InstanceState.RUNNING if provisioning == "succeeded" else InstanceState.PENDING), None
    return _POWER[power], _reason(power, spot=properties.get("priority") == "Spot")


def _why_failed(codes: list[str]) -> StateReason:
    """Azure's code is the last part of a status: `provisioningstate/failed/allocationfailed`."""
    failed = (code.rpartition("/")[2] for code in codes if code.startswith("provisioningstate/failed/"))
    return StateReason.NO_CAPACITY if any(code in _SHORT for code in failed) else StateReason.FAILURE


def _reason(power: str, *, spot: bool) -> StateReason | None:
    """Nobody here switches machines off or deallocates them: the first they do themselves, the second Azure does."""
    if power in ("stopping", "stopped"):
        return StateReason.SHUTDOWN_FROM_INSIDE
    return StateReason.SPOT_INTERRUPTION if spot and power in ("deallocating", "deallocated") else None


def _time(text: str | None) -> datetime:
    """Azure's time, of which more digits than Python takes are cut off."""
    if text is None:
        return datetime.now(UTC)
    return datetime.fromisoformat(text).astimezone(UTC)
