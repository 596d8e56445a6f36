"""What this EC2 sells: a few real instance types in three regions, with prices of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer

HOME = "us-east-1"
REGIONS = {"us-east-1": 1.0, "eu-west-1": 1.1, "us-west-2": 1.05}
"""Enabled regions, and how prices compare."""
ZONES = "abc"
DISK_PRICE = 0.08
ADDRESS = 0.005
DISK_GIB = 100


@dataclass(frozen=True)
class Ware:
    """One instance type, as the contract describes it.

    Attributes:
        price: USD per hour on demand, in the first region.
        machine: what it has.
        zones: where it is sold.
        quota: code of the quotas, on demand and spot.
    """

    price: float
    machine: tuple[int, int, str]
    gpus: tuple[Gpu, ...] = ()
    zones: str = ZONES
    quota: tuple[str, str] = ("L-1216C47A", "L-34B43A08")


_G = ("L-DB2E81BA", "L-3819A6DF")
WARES = {
    "t3.micro": Ware(0.0104, (2, 1, "x86")),
    "t3.medium": Ware(0.0416, (2, 4, "x86")),
    "m5.large": Ware(0.096, (2, 8, "x86")),
    "m7g.large": Ware(0.0816, (2, 8, "arm")),
    "c5.xlarge": Ware(0.17, (4, 8, "x86"), zones="ab"),
    "r5.2xlarge": Ware(0.504, (8, 64, "x86")),
    "g4dn.xlarge": Ware(0.526, (4, 16, "x86"), (Gpu("T4", 16384, "nvidia", (7, 5)),), quota=_G),
    "g5.12xlarge": Ware(5.672, (48, 192, "x86"), (Gpu("A10G", 22888, "nvidia", (8, 6)),) * 4, zones="bc", quota=_G),
    "g6.xlarge": Ware(0.8048, (4, 16, "x86"), (Gpu("L4", 22888, "nvidia", (8, 9)),), quota=_G),
    "p4d.24xlarge": Ware(
        21.9576,
        (96, 1152, "x86"),
        (Gpu("A100", 40960, "nvidia", (8, 0)),) * 8,
        zones="a",
        quota=("L-417A185B", "L-7212CCBC"),
    ),
}
QUOTAS = {
    "L-1216C47A": 1920.0,
    "L-34B43A08": 1920.0,
    "L-DB2E81BA": 1920.0,
    "L-3819A6DF": 1920.0,
    # As for most accounts: none of the large ones before one has asked.
    "L-417A185B": 0.0,
    "L-7212CCBC": 0.0,
}
"""Virtual CPUs."""


def on_demand(name: str, region: str) -> float:
    """USD per hour."""
    return round(WARES[name].price * REGIONS[region], 6)


def spot(name: str, region: str, zone: str) -> float:
    """USD per hour; each zone has its own price."""
    return round(on_demand(name, region) * (0.3 + 0.02 * ZONES.index(zone[-1])), 6)


def places(region: str) -> Iterator[tuple[str, str]]:
    """Types and zones."""
    for name, ware in WARES.items():
        for letter in ware.zones:
            yield name, region + letter


def offers(region: str, *, public: bool = True) -> Iterator[Offer]:
    """What a backend has to offer, in the contract's units and all in, with a disk of the usual size."""
    extra = DISK_GIB * DISK_PRICE * REGIONS[region] / 730 + (ADDRESS if public else 0)
    for name, zone in places(region):
        ware = WARES[name]
        cpus, gib, arch = ware.machine
        resources = MachineResources(float(cpus), gib * 1024, DISK_GIB * 1024, ware.gpus, arch)
        for is_spot in (False, True):
            price = spot(name, region, zone) if is_spot else on_demand(name, region)
            short = QUOTAS[ware.quota[is_spot]] < cpus
            yield Offer(
                backend="aws",
                instance_type=name,
                region=region,
                resources=resources,
                price=round(price + extra, 6),
                zone=zone,
                spot=is_spot,
                availability=Availability.NO_QUOTA if short else Availability.UNKNOWN,
                reason="quota" if short else None,
            )


def price_list(wanted: dict[str, str]) -> list[str]:
    """The documents of the price list that match, each as text, as the real one has them."""
    products = [*_machines(), *_disks()]
    return [
        json.dumps(product)
        for product in products
        if all(_field(product, name) == value for name, value in wanted.items())
    ]


def _field(product: dict[str, dict[str, dict[str, str]]], name: str) -> object:
    return product["product"].get(name) or product["product"]["attributes"].get(name)


def _machines() -> Iterator[dict[str, dict[str, dict[str, str]]]]:
    for region in REGIONS:
        for name in WARES:
            attributes = {
                "instanceType": name,
                "regionCode": region,
                "operatingSystem": "Linux",
                "tenancy": "Shared",
                "preInstalledSw": "NA",
                "capacitystatus": "Used",
            }
            yield _product("Compute Instance", attributes, on_demand(name, region))
            # What must not be taken for it.
            yield _product("Compute Instance", {**attributes, "operatingSystem": "Windows"}, 99.0)
            yield _product("Compute Instance", {**attributes, "capacitystatus": "UnusedCapacityReservation"}, 98.0)
            yield _product("Compute Instance", attributes, 0.0)


def _disks() -> Iterator[dict[str, dict[str, dict[str, str]]]]:
    for region, factor in REGIONS.items():
        for kind, price in (("gp2", 0.1), ("gp3", DISK_PRICE)):
            yield _product("Storage", {"volumeApiName": kind, "regionCode": region}, price * factor)


def _product(family: str, attributes: dict[str, str], price: float) -> dict[str, dict[str, dict[str, str]]]:
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{price:.10f}"}}
    terms = {"OnDemand": {"SKU.JRTCKXETXF": {"priceDimensions": {"SKU.JRTCKXETXF.6YS6EN2CT7": dimension}}}}
    product = {"productFamily": family, "attributes": attributes, "sku": "SKU"}
    return {"product": product, "terms": terms}  # type: ignore[dict-item]  # a document, deeper than its type says
