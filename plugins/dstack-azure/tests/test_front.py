"""The Azure of tests refuses what Azure refuses: otherwise what passes it would prove nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from azure.mgmt.compute import types
from dstack_azure import AzureConfig
from dstack_azure._instances import launch

from tests.support import azure as front
from tests.support.azure import Azure
from tests.support.azure._rules import (
    GROUP_RULES,
    MACHINE_RULES,
    NETWORK_RULES,
    Wrong,
    check_machine,
    check_network,
    check_rules,
)
from tests.support.azure._schema import check
from tests.support.azure._wares import offers
from tests.support.azure._wire import Refused
from tests.support.ec2.requests import request_for

Body = dict[str, Any]
SUBNET = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/n/subnets/default"
NETWORK = {"location": "eastus", "properties": {"provisioningState": "Succeeded", "subnets": [{"name": "default"}]}}


def body_of(size: str, *, spot: bool = False) -> Body:
    """What the backend sends for a size."""
    values = {"type": "azure", **Azure().config(), "base_url": "https://x", "authority": "https://x"}
    config = AzureConfig.model_validate({**values, "prices_url": "https://x"})
    offer = next(one for one in offers("eastus") if (one.instance_type, one.spot) == (size, spot))
    return launch(config, request_for(offer, uuid4()), SUBNET)


def find(id: str) -> Body | None:
    """The one network that there is."""
    return NETWORK if SUBNET.startswith(id) else None


def put(*path: str | int, value: Any = None) -> Callable[[Body], None]:
    """A change of one field; None removes it."""

    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        if value is None:
            del body[path[-1]]
        else:
            body[path[-1]] = value

    return change


_P, _S = "properties", "storageProfile"
_LINUX = (_P, "osProfile", "linuxConfiguration")
_CARD = (_P, "networkProfile", "networkInterfaceConfigurations", 0)
_ADDRESS = (*_CARD, _P, "ipConfigurations", 0, _P)
_IP = (*_ADDRESS, "publicIPAddressConfiguration")
MACHINES = {
    "_place": put("location", value="middleearth"),
    "_tags": put("tags", value={"a/b": "c"}),
    "_known_size": put(_P, "hardwareProfile", "vmSize", value="Standard_Z1"),
    "_zones": put("zones", value=["1", "2"]),
    "_size_in_zone": put(_P, "hardwareProfile", "vmSize", value="Standard_NC24ads_A100_v4"),
    "_image": put(_P, _S, "imageReference", "sku"),
    "_architecture": put(_P, _S, "imageReference", "sku", value="server-arm64"),
    "_generation": put(_P, "hardwareProfile", "vmSize", value="Standard_A1_v2"),
    "_disk_size": put(_P, _S, "osDisk", "diskSizeGB", value=8),
    "_system": put(_P, "osProfile", "adminUsername", value="root"),
    "_host_name": put(_P, "osProfile", "computerName", value="a_b"),
    "_keys": put(*_LINUX, "ssh"),
    "_key_places": put(*_LINUX, "ssh", "publicKeys", 0, "path", value="/root/.ssh/authorized_keys"),
    "_custom_data": put(_P, "osProfile", "customData", value="#cloud-config"),
    "_one_way_to_the_network": put(_P, "networkProfile", "networkApiVersion"),
    "_subnet": put(*_ADDRESS, "subnet", "id", value="/subscriptions/s/elsewhere"),
    "_addresses_are_standard": put(*_IP, _P, "publicIPAllocationMethod", value="Dynamic"),
    "_spot": put(_P, "evictionPolicy", value="Delete"),
}


def refused(do: Callable[[], object]) -> Refused | None:
    """What is said, if anything."""
    try:
        do()
    except Refused as error:
        return error
    return None


@pytest.mark.parametrize("size", ["Standard_D2s_v5", "Standard_D2ps_v5", "Standard_A1_v2", "Standard_NC4as_T4_v3"])
@pytest.mark.parametrize("spot", [False, True])
def test_what_the_backend_sends_is_accepted(size: str, spot: bool) -> None:
    """For each kind of machine, as it is."""
    body = body_of(size, spot=spot)
    check(types.VirtualMachine, body)
    check_machine("name", body, find)


@pytest.mark.parametrize("rule", MACHINES)
def test_a_rule_of_machines(rule: str) -> None:
    """One change for each rule is refused, and by no rule before it."""
    body = body_of("Standard_D2s_v5")
    MACHINES[rule](body)
    assert refused(lambda: check_machine("name", body, find)) is not None
    stopped = next(one for one in MACHINE_RULES if _refuses(one, body))
    assert stopped.__name__ == rule


def _refuses(rule: Callable[[str, Body, Any], None], body: Body) -> bool:
    try:
        rule("name", body, find)
    except (Refused, Wrong):
        return True
    return False


def test_the_other_rules_of_machines() -> None:
    """A name; and two interfaces of which none is the first."""
    assert refused(lambda: check_machine("-x", body_of("Standard_D2s_v5"), find)) is not None
    body = body_of("Standard_D2s_v5")
    cards = body[_P]["networkProfile"]["networkInterfaceConfigurations"]
    cards.append({**cards[0], "name": "second"})
    assert refused(lambda: check_machine("name", body, find)) is not None
    assert {*MACHINES, "_name", "_primary"} == {rule.__name__ for rule in MACHINE_RULES}


@pytest.mark.parametrize(
    "properties",
    [
        {"addressSpace": {"addressPrefixes": []}},
        {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [{"name": "x", "properties": {"addressPrefix": "10.1.0.0/24"}}],
        },
        {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [
                {"name": "x", "properties": {"addressPrefix": "10.0.0.0/24", "networkSecurityGroup": {"id": "/none"}}}
            ],
        },
    ],
)
def test_the_rules_of_networks(properties: Body) -> None:
    """A range, subnets inside it, and groups that are there."""
    body = {"location": "eastus", "properties": properties}
    assert refused(lambda: check_network("name", body, find)) is not None


@pytest.mark.parametrize("rules", [[{"priority": 10}], [{"priority": 200, "sourceAddressPrefix": "*"}]])
def test_the_rules_of_security_groups(rules: list[Body]) -> None:
    """Priorities, and both ends."""
    body = {"location": "eastus", "properties": {"securityRules": [{"name": "x", "properties": one} for one in rules]}}
    assert refused(lambda: check_rules("name", body, find)) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(_P, "hardwareProfile", "vm_size", value="x"), "could not find member 'vm_size'"),
        (put(_P, _S, "osDisk", "diskSizeGB", value="128"), "diskSizeGB is str"),
        (put(_P, _S, "osDisk", "createOption"), "'createOption' is missing"),
        (put(_P, _S, "osDisk", "deleteOption", value="Remove"), "deleteOption is 'Remove', and may be delete"),
        (put(_P, "osProfile", "linuxConfiguration", "ssh", "publicKeys", value={}), "publicKeys has to be a list"),
        (put("tags", "x", value=1), "tags.x is int"),
        (put("location"), "'location' is missing"),
    ],
)
def test_the_sdks_own_description(change: Callable[[Body], None], said: str) -> None:
    """Names, types, what is required, and lists of values."""
    body = body_of("Standard_D2s_v5")
    change(body)
    error = refused(lambda: check(types.VirtualMachine, body))
    assert error is not None
    assert said in error.words


def test_the_readme_counts_the_rules() -> None:
    """So that nobody has to."""
    readme = (Path(str(front.__file__)).parent / "README.md").read_text()
    counted = re.search(r"(\d+) rules across fields: (\d+) of machines", readme)
    assert counted is not None
    every = {*MACHINE_RULES, *NETWORK_RULES, *GROUP_RULES}
    assert (int(counted[1]), int(counted[2])) == (len(every), len(MACHINE_RULES))
