"""Every call that this package makes, with the permissions it needs: the role is made of this table."""

from __future__ import annotations

import json
from typing import Any

_COMPUTE, _NETWORK, _RESOURCES = "Microsoft.Compute", "Microsoft.Network", "Microsoft.Resources"
ANY_SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
"""Stands where one's own has to be put."""

CALLS: dict[str, tuple[str, ...]] = {
    # What is sold, and what the account may have.
    "compute.resource_skus.list": (f"{_COMPUTE}/skus/read",),
    "compute.usage.list": (f"{_COMPUTE}/locations/usages/read",),
    # The place for it all.
    "resource.resource_groups.get": (f"{_RESOURCES}/subscriptions/resourceGroups/read",),
    "resource.resource_groups.create_or_update": (f"{_RESOURCES}/subscriptions/resourceGroups/write",),
    "network.virtual_networks.get": (f"{_NETWORK}/virtualNetworks/read",),
    "network.virtual_networks.begin_create_or_update": (
        f"{_NETWORK}/virtualNetworks/write",
        # The rules come with the subnet.
        f"{_NETWORK}/networkSecurityGroups/join/action",
    ),
    "network.network_security_groups.begin_create_or_update": (f"{_NETWORK}/networkSecurityGroups/write",),
    # Instances. Everything that belongs to one is made with it, and goes with it.
    "compute.virtual_machines.begin_create_or_update": (
        f"{_COMPUTE}/virtualMachines/write",
        f"{_COMPUTE}/disks/write",
        f"{_NETWORK}/networkInterfaces/write",
        f"{_NETWORK}/networkInterfaces/join/action",
        f"{_NETWORK}/publicIPAddresses/write",
        f"{_NETWORK}/publicIPAddresses/join/action",
        f"{_NETWORK}/virtualNetworks/subnets/join/action",
    ),
    "compute.virtual_machines.get": (f"{_COMPUTE}/virtualMachines/read",),
    "compute.virtual_machines.list_all": (f"{_COMPUTE}/virtualMachines/read",),
    "compute.virtual_machines.begin_delete": (f"{_COMPUTE}/virtualMachines/delete",),
    "compute.virtual_machines.retrieve_boot_diagnostics_data": (
        f"{_COMPUTE}/virtualMachines/retrieveBootDiagnosticsData/action",
    ),
    "network.network_interfaces.get": (
        f"{_NETWORK}/networkInterfaces/read",
        # The address comes with its interface.
        f"{_NETWORK}/publicIPAddresses/read",
    ),
    # What a creation that stopped half way left behind.
    "resource.resources.list": (f"{_RESOURCES}/subscriptions/resources/read",),
    "resource.resources.list_by_resource_group": (f"{_RESOURCES}/subscriptions/resourceGroups/resources/read",),
    "network.network_interfaces.begin_delete": (f"{_NETWORK}/networkInterfaces/delete",),
    "network.public_ip_addresses.begin_delete": (f"{_NETWORK}/publicIPAddresses/delete",),
    "compute.disks.begin_delete": (f"{_COMPUTE}/disks/delete",),
    # Which intents have ended.
    "resource.resources.get_by_id": (f"{_RESOURCES}/deployments/read",),
    "resource.resources.begin_create_or_update_by_id": (f"{_RESOURCES}/deployments/write",),
    # The configuration's check.
    "resource.providers.get": (f"{_RESOURCES}/subscriptions/providers/read",),
    "permissions": ("Microsoft.Authorization/permissions/read",),
}
"""By client, group and method of the SDK: what has to be allowed; first what the call itself is."""


def action_of(operation: str) -> str:
    """The action of a call: `Microsoft.Compute/virtualMachines/write`."""
    if operation not in CALLS:
        raise LookupError(f"{operation} is not in CALLS: the role would lack it")
    return CALLS[operation][0]


def actions() -> list[str]:
    """All that must be allowed."""
    return sorted({action for needed in CALLS.values() for action in needed})


def role(subscription: str) -> dict[str, Any]:
    """The least role, as `az role definition create` takes it.

    Args:
        subscription: where it is to be used.
    """
    return {
        "Name": "dstack",
        "Description": "Starts, looks at and ends virtual machines for dstack",
        "Actions": actions(),
        "NotActions": [],
        "AssignableScopes": [f"/subscriptions/{subscription}"],
    }


def role_text(subscription: str = ANY_SUBSCRIPTION) -> str:
    """The role as one pastes it."""
    return json.dumps(role(subscription), indent=2)
