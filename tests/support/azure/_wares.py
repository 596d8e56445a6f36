"""What this Azure sells: a few real sizes in three regions, with prices of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer

REGIONS = {"eastus": 1.0, "westeurope": 1.1, "westus": 1.05}
"""Enabled regions, and how prices compare."""
ZONED = {"eastus": "123", "westeurope": "123", "westus": ""}
"""The last one has no zones, as at Azure."""
ADDRESS = 0.005
DISK_GIB, DISK_CLASS, DISK_PRICE = 128, "E10", 9.6
DISKS = {"E4": (32, 2.4), "E6": (64, 4.8), "E10": (128, DISK_PRICE), "E15": (256, 19.2), "E30": (1024, 76.8)}


@dataclass(frozen=True)
class Ware:
    """One size, as the contract describes it.

    Attributes:
        price: USD per hour on demand, in the first region.
        machine: CPUs, memory in GiB, architecture.
        family: name of its quota.
        gpus: what it has.
        zones: where it is sold.
        spot: whether it is sold so.
        generations: of firmware.
        closed: regions in which this subscription may not have it.
    """

    price: float
    machine: tuple[int, float, str]
    family: str
    gpus: tuple[Gpu, ...] = ()
    zones: str = "123"
    spot: bool = True
    generations: str = "V1,V2"
    closed: tuple[str, ...] = ()


WARES = {
    "Standard_B1s": Ware(0.0104, (1, 1, "x86"), "standardBSFamily", spot=False),
    "Standard_D2s_v5": Ware(0.096, (2, 8, "x86"), "standardDSv5Family"),
    "Standard_D2ps_v5": Ware(0.077, (2, 8, "arm"), "standardDPSv5Family", generations="V2"),
    "Standard_F4s_v2": Ware(0.169, (4, 8, "x86"), "standardFSv2Family", zones="12"),
    "Standard_E8s_v5": Ware(0.504, (8, 64, "x86"), "standardESv5Family"),
    "Standard_A1_v2": Ware(0.043, (1, 2, "x86"), "standardAv2Family", generations="V1"),
    "Standard_NC4as_T4_v3": Ware(
        0.526, (4, 28, "x86"), "Standard NCASv3_T4 Family", (Gpu("T4", 16384, "nvidia", (7, 5)),)
    ),
    "Standard_NV36ads_A10_v5": Ware(
        1.6, (36, 440, "x86"), "StandardNVADSA10v5Family", (Gpu("A10", 24576, "nvidia", (8, 6)),), generations="V2"
    ),
    "Standard_NC24ads_A100_v4": Ware(
        3.673,
        (24, 220, "x86"),
        "StandardNCADSA100v4Family",
        (Gpu("A100", 81920, "nvidia", (8, 0)),),
        zones="2",
        generations="V2",
        closed=("westeurope",),
    ),
    "Standard_ND96isr_H100_v5": Ware(
        98.32,
        (96, 1900, "x86"),
        "standardNDSH100v5Family",
        (Gpu("H100", 81920, "nvidia", (9, 0)),) * 8,
        zones="3",
        generations="V2",
    ),
}
CONFIDENTIAL = "Standard_DC2as_v5"
QUOTAS: dict[str, float] = {
    "cores": 2000.0,
    "lowPriorityCores": 2000.0,
    **{ware.family: 1000.0 for ware in WARES.values()},
    # As for most subscriptions: none of the large ones before one has asked.
    "standardNDSH100v5Family": 0.0,
}
"""Virtual CPUs."""
MOST_AT_ONCE = {"lowPriorityCores", "cores"}


def on_demand(name: str, region: str) -> float:
    """USD per hour."""
    return round(WARES[name].price * REGIONS[region], 6)


def spot(name: str, region: str) -> float:
    """USD per hour."""
    return round(on_demand(name, region) * 0.2, 6)


def zones_of(name: str, region: str) -> list[str]:
    """The zones that have a size."""
    return [zone for zone in WARES[name].zones if zone in ZONED[region]]


def quotas_of(name: str, *, is_spot: bool) -> tuple[str, ...]:
    """Under which quotas a machine counts."""
    return ("lowPriorityCores",) if is_spot else (WARES[name].family, "cores")


def offers(region: str, *, public: bool = True) -> Iterator[Offer]:
    """What a backend has to offer, in the contract's units and all in, with a disk of the usual size."""
    extra = DISK_PRICE * REGIONS[region] / 730 + (ADDRESS if public else 0)
    for name, ware in WARES.items():
        cpus, gib, arch = ware.machine
        resources = MachineResources(float(cpus), int(gib * 1024), DISK_GIB * 1024, ware.gpus, arch)
        for number in zones_of(name, region) or (None,):
            for is_spot in (False, True) if ware.spot else (False,):
                price = spot(name, region) if is_spot else on_demand(name, region)
                short = any(QUOTAS[quota] < cpus for quota in quotas_of(name, is_spot=is_spot))
                shut = short or region in ware.closed
                yield Offer(
                    backend="azure",
                    instance_type=name,
                    region=region,
                    resources=resources,
                    price=round(price + extra, 6),
                    zone=f"{region}-{number}" if number else None,
                    spot=is_spot,
                    availability=Availability.NO_QUOTA if shut else Availability.UNKNOWN,
                    reason="not for this subscription" if shut else None,
                    data="V2" if "V2" in ware.generations else "V1",
                )


def skus(region: str) -> Iterator[dict[str, Any]]:
    """The catalogue of sizes, with what is no machine among them."""
    yield {"resourceType": "disks", "name": "StandardSSD_LRS", "locations": [region], "locationInfo": []}
    yield _confidential(region)
    for name, ware in WARES.items():
        cpus, gib, arch = ware.machine
        capabilities = {
            "vCPUs": str(cpus),
            "MemoryGB": f"{gib:g}",
            "CpuArchitectureType": {"x86": "x64", "arm": "Arm64"}[arch],
            "LowPriorityCapable": str(ware.spot),
            "HyperVGenerations": ware.generations,
            **({"GPUs": str(len(ware.gpus))} if ware.gpus else {}),
        }
        closed = {
            "type": "Location",
            "values": [region],
            "restrictionInfo": {"locations": [region]},
            "reasonCode": "NotAvailableForSubscription",
        }
        yield {
            "resourceType": "virtualMachines",
            "name": name,
            "family": ware.family,
            "locations": [region],
            "locationInfo": [{"location": region, "zones": zones_of(name, region)}],
            "capabilities": [{"name": key, "value": value} for key, value in capabilities.items()],
            "restrictions": [closed] if region in ware.closed else [],
        }


def _confidential(region: str) -> dict[str, Any]:
    """A machine that starts only with an image and a disk of its own."""
    can = {"vCPUs": "2", "MemoryGB": "8", "LowPriorityCapable": "False", "ConfidentialComputingType": "SNP"}
    return {
        "resourceType": "virtualMachines",
        "name": CONFIDENTIAL,
        "family": "standardDCASv5Family",
        "locationInfo": [{"location": region, "zones": []}],
        "capabilities": [{"name": key, "value": value} for key, value in can.items()],
    }


def price_list() -> Iterator[dict[str, Any]]:
    """The documents of the list of prices, with what must not be taken for the price."""
    for region, factor in REGIONS.items():
        for name, ware in WARES.items():
            product, short = f"Virtual Machines {name[9:]} Series", name[9:].replace("_", " ")
            yield _price(region, name, product, short, on_demand(name, region))
            yield _price(region, name, f"{product} Windows", short, on_demand(name, region) * 2)
            yield _price(region, name, product, f"{short} Low Priority", 0.001)
            yield _price(region, name, f"{product} Cloud Services", short, 99.0)
            yield _price(region, name, product, short, on_demand(name, region) * 4000, type="Reservation")
            if ware.spot:
                yield _price(region, name, product, f"{short} Spot", spot(name, region))
        yield _price(region, CONFIDENTIAL, "Virtual Machines DCasv5 Series", "DC2as v5", 0.0001)
        for kind, (_, price) in DISKS.items():
            yield _disk(region, kind, f"{kind} LRS Disk", price * factor)
            yield _disk(region, kind, f"{kind} LRS Disk Mount", 0.01)


def _price(region: str, size: str, product: str, sku: str, price: float, **more: Any) -> dict[str, Any]:
    return {
        "currencyCode": "USD",
        "retailPrice": price,
        "unitPrice": price,
        "armRegionName": region,
        "armSkuName": size,
        "productName": product,
        "skuName": sku,
        "meterName": sku,
        "serviceName": "Virtual Machines",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
        **more,
    }


def _disk(region: str, kind: str, meter: str, price: float) -> dict[str, Any]:
    return {
        **_price(region, "", "Standard SSD Managed Disks", f"{kind} LRS", price),
        "meterName": meter,
        "serviceName": "Storage",
        "unitOfMeasure": "1/Month",
    }
