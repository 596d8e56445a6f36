"""What a discovery document does not say: which fields need, forbid or limit one another. Written by hand.

Each rule looks at a request that is right field by field, and says what is wrong with the whole.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tests.support.gcp import _wares
from tests.support.gcp._wire import EMAIL

Rule = Callable[["Order"], Iterator[str]]
INSTANCE_RULES: list[Rule] = []
FIREWALL_RULES: list[Rule] = []
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_KEY, _LABEL_VALUE = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
_METADATA_KEY = re.compile(r"[a-zA-Z0-9_-]{1,128}")


@dataclass(frozen=True)
class Order:
    """A request to make something.

    Attributes:
        body: of the request.
        zone: where; empty for what is of no zone.
        request_id: as it came, if it did.
        networks: those that there are.
    """

    body: dict[str, Any]
    zone: str = ""
    request_id: str | None = None
    networks: tuple[str, ...] = ()

    @property
    def region(self) -> str:
        """Of the zone."""
        return self.zone.rpartition("-")[0]

    @property
    def machine(self) -> str:
        """The machine type's name."""
        return str(self.body.get("machineType", "")).rpartition("/")[2]

    @property
    def ware(self) -> _wares.Ware | None:
        """What it is, if it is sold in this zone."""
        ware = _wares.WARES.get(self.machine)
        return ware if ware is not None and self.zone[-1:] in ware.zones else None

    @property
    def disks(self) -> list[dict[str, Any]]:
        """Its disks."""
        return list(self.body.get("disks", ()))

    @property
    def scheduling(self) -> dict[str, Any]:
        """How it is to be run."""
        return dict(self.body.get("scheduling", {}))

    @property
    def spot(self) -> bool:
        """Whether it may be taken away."""
        return self.scheduling.get("provisioningModel") == "SPOT"

    @property
    def cards(self) -> tuple[tuple[str, int], ...]:
        """The GPUs to attach."""
        wanted = self.body.get("guestAccelerators", ())
        return tuple((one["acceleratorType"].rpartition("/")[2], int(one["acceleratorCount"])) for one in wanted)

    @property
    def limited(self) -> bool:
        """Whether it has a time limit."""
        return bool({"terminationTime", "maxRunDuration"} & self.scheduling.keys())


def instance_rule(rule: Rule) -> Rule:
    """One more rule for instances."""
    INSTANCE_RULES.append(rule)
    return rule


def firewall_rule(rule: Rule) -> Rule:
    """One more rule for the rules of firewalls."""
    FIREWALL_RULES.append(rule)
    return rule


def problems(rules: list[Rule], order: Order) -> Iterator[str]:
    """What is wrong with an order."""
    for rule in rules:
        yield from rule(order)


def _invalid(field: str, value: object, why: str) -> str:
    return f"Invalid value for field 'resource.{field}': '{value}'. {why}"


@instance_rule
def the_name_is_a_label_of_dns(order: Order) -> Iterator[str]:
    if not _NAME.fullmatch(order.body.get("name", "")):
        yield _invalid(
            "name", order.body.get("name"), "Must be a match of regex '(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)'"
        )


@instance_rule
def the_machine_type_is_sold_in_the_zone(order: Order) -> Iterator[str]:
    if order.ware is None:
        yield _invalid("machineType", order.body.get("machineType"), "The referenced resource cannot be found.")


@instance_rule
def everything_of_a_zone_is_of_this_zone(order: Order) -> Iterator[str]:
    made = [disk.get("initializeParams", {}).get("diskType") for disk in order.disks]
    cards = [one.get("acceleratorType") for one in order.body.get("guestAccelerators", ())]
    for path in (order.body.get("machineType"), *made, *cards):
        if path is not None and f"zones/{order.zone}/" not in path:
            yield _invalid("zone", path, f"It is not in zone {order.zone}.")


@instance_rule
def one_disk_boots_and_it_is_the_first(order: Order) -> Iterator[str]:
    boots = [bool(disk.get("boot")) for disk in order.disks]
    if boots.count(True) != 1 or not boots[0]:
        yield _invalid("disks", "", "Exactly one disk, the first, must be a boot disk.")


@instance_rule
def a_disk_is_made_or_taken(order: Order) -> Iterator[str]:
    for disk in order.disks:
        if ("source" in disk) == ("initializeParams" in disk):
            yield _invalid("disks[0]", "", "Exactly one of 'source' and 'initializeParams' must be given.")


@instance_rule
def the_image_is_there(order: Order) -> Iterator[str]:
    for disk in order.disks:
        path = disk.get("initializeParams", {}).get("sourceImage")
        if path is not None and image_at(path) is None:
            yield _invalid(
                "disks[0].initializeParams.sourceImage", path, "The referenced image resource cannot be found."
            )


@instance_rule
def a_disk_has_room_for_its_image(order: Order) -> Iterator[str]:
    for disk in order.disks:
        made = disk.get("initializeParams", {})
        image, size = image_at(made.get("sourceImage", "")), int(made.get("diskSizeGb", 10))
        if image is not None and size < image[1]:
            yield _invalid(
                "disks[0].initializeParams.diskSizeGb", size, f"It is smaller than the image, {image[1]} GB."
            )


@instance_rule
def a_disk_is_of_a_size_that_is_sold(order: Order) -> Iterator[str]:
    for disk in order.disks:
        size = int(disk.get("initializeParams", {}).get("diskSizeGb", 10))
        if not 10 <= size <= 65536:
            yield _invalid("disks[0].initializeParams.diskSizeGb", size, "Disks have 10 to 65536 GB.")


@instance_rule
def a_disk_is_of_a_kind_that_is_sold(order: Order) -> Iterator[str]:
    for disk in order.disks:
        kind = disk.get("initializeParams", {}).get("diskType", "pd-standard").rpartition("/")[2]
        if kind not in ("pd-standard", "pd-balanced", "pd-ssd") or (kind == "pd-standard" and _family(order) == "a3"):
            yield _invalid("disks[0].initializeParams.diskType", kind, "The machine type cannot have it.")


@instance_rule
def image_and_machine_are_of_one_architecture(order: Order) -> Iterator[str]:
    for disk in order.disks:
        image = image_at(disk.get("initializeParams", {}).get("sourceImage", ""))
        if image is not None and order.ware is not None and image[2] != order.ware.arch:
            yield _invalid("machineType", order.machine, f"The image is for {image[2]}.")


@instance_rule
def gpus_do_not_move(order: Order) -> Iterator[str]:
    gpus = order.cards or (order.ware is not None and order.ware.gpus)
    if gpus and order.scheduling.get("onHostMaintenance") != "TERMINATE":
        yield "Instances with guest accelerators do not support live migration: set onHostMaintenance to TERMINATE."


@instance_rule
def gpus_are_attached_to_n1_alone(order: Order) -> Iterator[str]:
    if order.cards and _family(order) != "n1":
        yield _invalid("guestAccelerators", order.cards, f"{order.machine} cannot have them.")


@instance_rule
def gpus_fit_the_machine(order: Order) -> Iterator[str]:
    for name, count in order.cards:
        zones, most = _wares.CARDS.get(name, ("", 0))
        if order.zone[-1:] not in zones:
            yield _invalid("guestAccelerators[0].acceleratorType", name, "The referenced resource cannot be found.")
            continue
        limits = _wares.MOST[name].get(count)
        ware = order.ware
        if (
            limits is None
            or count > most
            or ware is None
            or ware.cpus > limits[0]
            or ware.memory_mib > limits[1] * 1024
        ):
            yield f"The number of GPU cores per machine is not supported: {count} of {name} with {order.machine}."


@instance_rule
def spot_does_not_move(order: Order) -> Iterator[str]:
    if order.spot and order.scheduling.get("onHostMaintenance", "TERMINATE") != "TERMINATE":
        yield "Scheduling option onHostMaintenance must be TERMINATE for spot instances."


@instance_rule
def spot_does_not_start_again(order: Order) -> Iterator[str]:
    if order.spot and order.scheduling.get("automaticRestart", True):
        yield "Scheduling option automaticRestart must be false for spot instances."


@instance_rule
def preemptible_means_spot(order: Order) -> Iterator[str]:
    if order.scheduling.get("preemptible") and order.scheduling.get("provisioningModel", "SPOT") != "SPOT":
        yield "Preemptible instances cannot have the standard provisioning model."


@instance_rule
def an_action_needs_an_occasion(order: Order) -> Iterator[str]:
    if "instanceTerminationAction" in order.scheduling and not (order.spot or order.limited):
        yield "instanceTerminationAction is for spot instances and those with a time limit alone."


@instance_rule
def a_time_limit_needs_an_action(order: Order) -> Iterator[str]:
    if order.limited and "instanceTerminationAction" not in order.scheduling:
        yield "An instance with a time limit must have an instanceTerminationAction."


@instance_rule
def there_is_one_time_limit(order: Order) -> Iterator[str]:
    if {"terminationTime", "maxRunDuration"} <= order.scheduling.keys():
        yield "At most one of terminationTime and maxRunDuration can be given."


@instance_rule
def a_time_limit_is_ahead(order: Order) -> Iterator[str]:
    if "terminationTime" in order.scheduling:
        ahead = datetime.fromisoformat(order.scheduling["terminationTime"]) - datetime.now(UTC)
        if not timedelta(seconds=30) <= ahead <= timedelta(days=120):
            yield _invalid("scheduling.terminationTime", ahead, "It must be 30 seconds to 120 days ahead.")


@instance_rule
def labels_have_their_alphabet(order: Order) -> Iterator[str]:
    made = [disk.get("initializeParams", {}).get("labels", {}) for disk in order.disks]
    for labels in (order.body.get("labels", {}), *made):
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield _invalid("labels", f"{key}={value}", "Keys begin with a-z; both have up to 63 of [a-z0-9_-].")
        if len(labels) > 64:
            yield _invalid("labels", len(labels), "There may be up to 64.")


@instance_rule
def metadata_are_named_once_and_fit(order: Order) -> Iterator[str]:
    items = order.body.get("metadata", {}).get("items", [])
    keys, sizes = [one["key"] for one in items], [len(one.get("value", "").encode()) for one in items]
    if len(set(keys)) != len(keys) or not all(_METADATA_KEY.fullmatch(key) for key in keys):
        yield _invalid("metadata.items", keys, "Keys are unique, and up to 128 of [a-zA-Z0-9-_].")
    if any(size > 262144 for size in sizes) or sum(sizes) > 524288:
        yield _invalid("metadata.items", sizes, "A value has up to 262144 bytes, all together 524288.")


@instance_rule
def it_is_in_a_network_that_is_there(order: Order) -> Iterator[str]:
    interfaces = order.body.get("networkInterfaces", [])
    if not interfaces:
        yield "At least one network interface is required."
    for one in interfaces:
        name = str(one.get("network", "default")).rpartition("/")[2]
        if name not in order.networks:
            yield _invalid(
                "networkInterfaces[0].network", one.get("network"), "The referenced network cannot be found."
            )


@instance_rule
def a_subnetwork_is_of_the_region(order: Order) -> Iterator[str]:
    for one in order.body.get("networkInterfaces", ()):
        if "subnetwork" in one and f"regions/{order.region}/" not in one["subnetwork"]:
            yield _invalid("networkInterfaces[0].subnetwork", one["subnetwork"], f"It is not in {order.region}.")


@instance_rule
def an_interface_has_one_way_out(order: Order) -> Iterator[str]:
    for one in order.body.get("networkInterfaces", ()):
        outside = one.get("accessConfigs", [])
        if len(outside) > 1 or any(each.get("type", "ONE_TO_ONE_NAT") != "ONE_TO_ONE_NAT" for each in outside):
            yield _invalid("networkInterfaces[0].accessConfigs", outside, "At most one, of type ONE_TO_ONE_NAT.")


@instance_rule
def network_tags_are_names(order: Order) -> Iterator[str]:
    items = order.body.get("tags", {}).get("items", [])
    if len(items) > 64 or len(set(items)) != len(items) or not all(_NAME.fullmatch(one) for one in items):
        yield _invalid("tags.items", items, "Up to 64 different names.")


@instance_rule
def there_is_one_service_account_with_scopes(order: Order) -> Iterator[str]:
    accounts = order.body.get("serviceAccounts", [])
    if len(accounts) > 1 or any(not one.get("scopes") for one in accounts):
        yield _invalid("serviceAccounts", accounts, "At most one, with at least one scope.")
    for one in accounts:
        if one.get("email") not in ("default", EMAIL):
            yield f"The resource '{one.get('email')}' of type 'serviceAccount' was not found."


@instance_rule
def a_request_id_is_a_uuid(order: Order) -> Iterator[str]:
    if order.request_id is not None:
        try:
            zero = UUID(order.request_id).int == 0
        except ValueError:
            zero = True
        if zero:
            yield f"Invalid value for field 'requestId': '{order.request_id}'. Must be a UUID, and not zero."


@firewall_rule
def a_rule_allows_or_denies(order: Order) -> Iterator[str]:
    if ("allowed" in order.body) == ("denied" in order.body):
        yield "Exactly one of 'allowed' and 'denied' must be given."


@firewall_rule
def ports_are_of_protocols_that_have_them(order: Order) -> Iterator[str]:
    for one in order.body.get("allowed", ()):
        if one.get("ports") and one.get("IPProtocol") not in ("tcp", "udp", "sctp"):
            yield _invalid("allowed[0].ports", one, "Only TCP, UDP and SCTP have ports.")


@firewall_rule
def sources_are_networks_and_of_what_comes_in(order: Order) -> Iterator[str]:
    sources = order.body.get("sourceRanges", [])
    if sources and order.body.get("direction", "INGRESS") != "INGRESS":
        yield _invalid("sourceRanges", sources, "Only for INGRESS.")
    for one in sources:
        try:
            ipaddress.ip_network(one)
        except ValueError:
            yield _invalid("sourceRanges", one, "Must be a CIDR range.")


@firewall_rule
def the_network_of_a_rule_is_there(order: Order) -> Iterator[str]:
    if str(order.body.get("network", "default")).rpartition("/")[2] not in order.networks:
        yield f"The resource '{order.body.get('network')}' was not found"


def image_at(path: str) -> tuple[str, int, str] | None:
    """The image of a path, by its name or its family."""
    parts = path.split("/")
    for (project, family), image in _wares.IMAGES.items():
        if project in parts and (parts[-1] == image[0] or parts[-2:] == ["family", family]):
            return image
    return None


def _family(order: Order) -> str:
    return _wares.family_of(order.machine)
