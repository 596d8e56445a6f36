"""Every call that this package makes, with the permissions it needs: the role is made of this table."""

from __future__ import annotations

CALLS: dict[tuple[str, str], tuple[str, ...]] = {
    ("projects", "get"): ("compute.projects.get",),
    ("regions", "list"): ("compute.regions.list",),
    ("machine_types", "list"): ("compute.machineTypes.list",),
    ("accelerator_types", "list"): ("compute.acceleratorTypes.list",),
    ("networks", "get"): ("compute.networks.get",),
    ("subnetworks", "get"): ("compute.subnetworks.get",),
    ("firewalls", "get"): ("compute.firewalls.get",),
    ("firewalls", "insert"): ("compute.firewalls.create", "compute.networks.updatePolicy"),
    ("images", "get"): ("compute.images.get",),
    ("images", "get_from_family"): ("compute.images.getFromFamily",),
    ("instances", "insert_unary"): (
        "compute.instances.create",
        "compute.disks.create",
        "compute.disks.setLabels",
        "compute.instances.setLabels",
        "compute.instances.setMetadata",
        "compute.instances.setTags",
        "compute.subnetworks.use",
        "compute.subnetworks.useExternalIp",
    ),
    ("instances", "get"): ("compute.instances.get",),
    ("instances", "aggregated_list"): ("compute.instances.list",),
    ("instances", "delete_unary"): ("compute.instances.delete", "compute.disks.delete"),
    ("instances", "get_serial_port_output"): ("compute.instances.getSerialPortOutput",),
    ("zone_operations", "list"): ("compute.zoneOperations.list",),
    ("zone_operations", "get"): ("compute.zoneOperations.get",),
    ("billing", "list_skus"): (),
    ("resource_manager", "test_iam_permissions"): (),
}
"""By client and method of the SDK: the permissions that it needs, the one that names it first."""

FOR_SERVICE_ACCOUNTS = ("iam.serviceAccounts.actAs", "compute.instances.setServiceAccount")
"""With `vm_service_account`."""


def permissions_of(client: str, method: str) -> tuple[str, ...]:
    """What a call needs."""
    if (client, method) not in CALLS:
        raise LookupError(f"{client}.{method} is not in CALLS: the role would lack it")
    return CALLS[client, method]


def action_of(client: str, method: str) -> str:
    """A call as it is named in messages: by its permission, or else by itself."""
    return next(iter(permissions_of(client, method)), f"{client}.{method}")


def permissions(*, service_account: bool = False) -> list[str]:
    """All that must be allowed.

    Args:
        service_account: the instances have a service account.
    """
    wanted = {one for needed in CALLS.values() for one in needed}
    return sorted(wanted | set(FOR_SERVICE_ACCOUNTS if service_account else ()))


def role_text() -> str:
    """The least role, as `gcloud iam roles create dstack --file=` takes it."""
    lines = ["title: dstack", "stage: GA", "includedPermissions:", *(f"- {one}" for one in permissions())]
    return "\n".join(lines) + "\n"
