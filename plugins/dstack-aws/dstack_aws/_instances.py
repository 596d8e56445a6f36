"""From the contract's request to EC2's, and from EC2's description of an instance back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from dstack_aws._config import AwsConfig
from dstack_aws._images import Image
from dstack_core.plugin import Endpoint, Instance, InstanceRef, InstanceRequest, InstanceState, StateReason

_STATES = {
    "pending": InstanceState.PENDING,
    "running": InstanceState.RUNNING,
    # Stopped is billed on: its disk, and whoever starts it again.
    "stopping": InstanceState.STOPPING,
    "stopped": InstanceState.STOPPING,
    "shutting-down": InstanceState.STOPPING,
    "terminated": InstanceState.TERMINATED,
}
_REASONS = {
    "Client.UserInitiatedShutdown": StateReason.REQUESTED,
    "Client.InstanceInitiatedShutdown": StateReason.SHUTDOWN_FROM_INSIDE,
    "Server.SpotInstanceTermination": StateReason.SPOT_INTERRUPTION,
    "Server.SpotInstanceShutdown": StateReason.SPOT_INTERRUPTION,
    "Server.InsufficientInstanceCapacity": StateReason.FAILURE,
    "Server.InternalError": StateReason.FAILURE,
    "Server.ScheduledStop": StateReason.FAILURE,
    "Client.InternalError": StateReason.FAILURE,
    "Client.InvalidSnapshot.NotFound": StateReason.FAILURE,
    "Client.VolumeLimitExceeded": StateReason.FAILURE,
}
_REQUEST_TAG = "request"


def request_digest(request: InstanceRequest) -> str:
    """Tells whether two requests are the same, byte for byte."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:32]


def launch(config: AwsConfig, request: InstanceRequest, image: Image, subnet: str, group: str) -> dict[str, Any]:
    """The arguments of RunInstances."""
    offer = request.offer
    tags = _tags({**config.tags, **request.tags, "Name": request.name, _REQUEST_TAG: request_digest(request)})
    kinds = ["instance", "volume", "network-interface", *(["spot-instances-request"] if offer.spot else [])]
    disk = {
        "VolumeType": "gp3",
        "VolumeSize": max(image.disk_gib, offer.resources.disk_mib // 1024),
        "DeleteOnTermination": True,
    }
    params: dict[str, Any] = {
        "ClientToken": request.token,
        "ImageId": image.id,
        "InstanceType": offer.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": request.user_data,
        "BlockDeviceMappings": [{"DeviceName": image.root_device, "Ebs": disk}],
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "SubnetId": subnet,
                "Groups": [group],
                "AssociatePublicIpAddress": config.public_ips,
                "DeleteOnTermination": True,
            }
        ],
        # A machine that shuts down is gone, and costs nothing from then on.
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in kinds],
    }
    if config.instance_profile is not None:
        params["IamInstanceProfile"] = {"Name": config.instance_profile}
    if offer.spot:
        spot = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        params["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": spot}
    return params


def is_of(described: dict[str, Any], request: InstanceRequest) -> bool:
    """Whether an instance was started by exactly this request."""
    return tags_of(described).get(_REQUEST_TAG) == request_digest(request)


def instances_in(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The instances of an answer of DescribeInstances."""
    for reservation in answer["Reservations"]:
        yield from reservation["Instances"]


def tags_of(described: dict[str, Any]) -> dict[str, str]:
    """Its tags."""
    return {tag["Key"]: tag["Value"] for tag in described.get("Tags", ())}


def instance(described: dict[str, Any], region: str) -> Instance | None:
    """An instance, from EC2's description; `None` for one that is not ours."""
    tags = tags_of(described)
    try:
        intent, owner = UUID(tags["intent"]), UUID(tags["owner"])
    except (KeyError, ValueError):
        return None
    address = described.get("PublicIpAddress") or described.get("PrivateIpAddress")
    state = _STATES[described["State"]["Name"]]
    return Instance(
        ref=InstanceRef(
            backend="aws", id=described["InstanceId"], region=region, zone=described["Placement"]["AvailabilityZone"]
        ),
        intent=intent,
        owner=owner,
        state=state,
        reason=_REASONS.get(described.get("StateReason", {}).get("Code", "")) if _is_ending(state) else None,
        created_at=described["LaunchTime"],
        endpoint=Endpoint(ssh_host=address) if address and not _is_ending(state) else None,
    )


def _is_ending(state: InstanceState) -> bool:
    return state in (InstanceState.STOPPING, InstanceState.TERMINATED)


def _tags(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(values.items())]
