"""Which permissions a call needs, as Google's documentation of each method has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_PLAIN = {
    "compute.projects.get": "compute.projects.get",
    "compute.regions.list": "compute.regions.list",
    "compute.machineTypes.list": "compute.machineTypes.list",
    "compute.acceleratorTypes.list": "compute.acceleratorTypes.list",
    "compute.networks.get": "compute.networks.get",
    "compute.subnetworks.get": "compute.subnetworks.get",
    "compute.firewalls.get": "compute.firewalls.get",
    "compute.images.get": "compute.images.get",
    "compute.images.getFromFamily": "compute.images.getFromFamily",
    "compute.instances.get": "compute.instances.get",
    "compute.instances.aggregatedList": "compute.instances.list",
    "compute.instances.list": "compute.instances.list",
    "compute.instances.getSerialPortOutput": "compute.instances.getSerialPortOutput",
    "compute.zoneOperations.get": "compute.zoneOperations.get",
    "compute.zoneOperations.list": "compute.zoneOperations.list",
}
_FREE = {"cloudbilling.services.skus.list", "cloudresourcemanager.projects.testIamPermissions"}


def permissions_for(method: str, body: Any) -> Iterator[str]:
    """What is needed, the most telling first."""
    if method == "compute.instances.insert":
        yield from _for_instance(body or {})
    elif method == "compute.instances.delete":
        yield from ("compute.instances.delete", "compute.disks.delete")
    elif method == "compute.firewalls.insert":
        yield from ("compute.firewalls.create", "compute.networks.updatePolicy")
    elif method not in _FREE:
        yield _PLAIN[method]


def _for_instance(body: dict[str, Any]) -> Iterator[str]:
    """It depends on what is asked for."""
    yield "compute.instances.create"
    made = [disk["initializeParams"] for disk in body.get("disks", ()) if "initializeParams" in disk]
    interfaces = body.get("networkInterfaces", ())
    if made:
        yield "compute.disks.create"
    if any(one.get("labels") for one in made):
        yield "compute.disks.setLabels"
    if body.get("labels"):
        yield "compute.instances.setLabels"
    if body.get("metadata", {}).get("items"):
        yield "compute.instances.setMetadata"
    if body.get("tags", {}).get("items"):
        yield "compute.instances.setTags"
    if interfaces:
        yield "compute.subnetworks.use"
    if any(one.get("accessConfigs") for one in interfaces):
        yield "compute.subnetworks.useExternalIp"
    if body.get("serviceAccounts"):
        yield from ("compute.instances.setServiceAccount", "iam.serviceAccounts.actAs")
