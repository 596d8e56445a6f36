"""What Azure sells in one region: read from its catalogues, and kept as plain values that fit into a JSON file.

Two parts of different age: machines and prices change within days, what the subscription may have by the minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dstack_azure._account import Account, pages
from dstack_azure._config import AzureConfig
from dstack_azure._gpus import gpu_of
from dstack_core.plugin import AuthenticationError

_ARCHS = {"x64": "x86", "Arm64": "arm"}
_DISKS = "Standard SSD Managed Disks"
_NOT_A_MACHINE_OF_OURS = ("Windows", "Cloud Services", "CloudServices", "Dedicated Host")
"""Parts of names of products: what costs extra, or is something else of the same size."""


@dataclass(frozen=True)
class Machine:
    """One size of machines.

    Attributes:
        cpus: virtual CPUs.
        memory_mib: memory.
        arch: `x86` or `arm`.
        spot: whether it is sold as spot.
        family: the quota under which it counts.
        gpus: how many.
        generation: `V1` for a machine that boots images of the first generation only.
        zones: numbers of the zones that have it; none in a region without zones.
        closed: why it cannot be had at all.
        closed_zones: numbers of the zones in which it cannot be had.
    """

    cpus: int
    memory_mib: int
    arch: str
    spot: bool
    family: str
    gpus: int = 0
    generation: str = "V2"
    zones: tuple[str, ...] = ()
    closed: str | None = None
    closed_zones: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shelf:
    """What a region has.

    Attributes:
        machines: by size.
        prices: USD per hour on demand, by size.
        spot_prices: likewise.
        disk_prices: USD per month, by the disk's size in GiB.
    """

    machines: dict[str, Machine]
    prices: dict[str, float]
    spot_prices: dict[str, float]
    disk_prices: dict[int, float]


@dataclass(frozen=True)
class Mood:
    """What changes by the minute.

    Attributes:
        quotas: virtual CPUs, by the name of the quota; empty if it may not be read.
    """

    quotas: dict[str, float]


def read_shelf(account: Account, config: AzureConfig, region: str) -> Shelf:
    """Reads the catalogues of a region. About ten calls, a few seconds."""
    prices, spot_prices = _prices(account, config, region)
    return Shelf(
        machines=dict(_machines(account, region)),
        prices=prices,
        spot_prices=spot_prices,
        disk_prices=dict(_disk_prices(account, config, region)),
    )


def read_mood(account: Account, region: str) -> Mood:
    """Reads the quotas. Limits that nobody may read are found out when they are met."""
    try:
        usages = account.every("compute.usage.list", region, at=region)
    except AuthenticationError:
        return Mood({})
    return Mood({usage["name"]["value"].lower(): float(usage["limit"]) for usage in usages})


def _machines(account: Account, region: str) -> Iterator[tuple[str, Machine]]:
    for sku in account.every("compute.resource_skus.list", filter=f"location eq '{region}'", at=region):
        if sku.get("resourceType") != "virtualMachines":
            continue
        machine = _machine(sku, region)
        if machine is not None:
            yield sku["name"], machine


def _machine(sku: dict[str, Any], region: str) -> Machine | None:
    """A size; `None` for one that we can say nothing true of."""
    can = {one["name"]: one["value"] for one in sku.get("capabilities") or ()}
    arch = _ARCHS.get(can.get("CpuArchitectureType", "x64"))
    gpus = int(float(can.get("GPUs", 0)))
    if arch is None or "vCPUs" not in can or "MemoryGB" not in can or (gpus and gpu_of(sku["name"]) is None):
        return None
    if "ConfidentialComputingType" in can:
        # These start only with images and disks of their own.
        return None
    zones = {zone for place in sku.get("locationInfo") or () for zone in place.get("zones") or ()}
    closed, closed_zones = _closed(sku, region)
    return Machine(
        cpus=int(can.get("vCPUsAvailable", can["vCPUs"])),
        memory_mib=int(float(can["MemoryGB"]) * 1024),
        arch=arch,
        spot=can.get("LowPriorityCapable") == "True",
        family=str(sku.get("family", "")).lower(),
        gpus=gpus,
        generation="V2" if "V2" in can.get("HyperVGenerations", "V1,V2") else "V1",
        zones=tuple(sorted(zones)),
        closed=closed,
        closed_zones=closed_zones,
    )


def _closed(sku: dict[str, Any], region: str) -> tuple[str | None, tuple[str, ...]]:
    """What the subscription may not have, in the whole region or in some zones."""
    why, zones = None, set[str]()
    for one in sku.get("restrictions") or ():
        if one["type"] == "Location":
            why = f"{one.get('reasonCode')}: this subscription may not have it in {region}"
        else:
            zones |= set((one.get("restrictionInfo") or {}).get("zones") or ())
    return why, tuple(sorted(zones))


# -- prices -----------------------------------------------------------------------------------------------------------


def _retail(account: Account, config: AzureConfig, **wanted: str) -> Iterator[dict[str, Any]]:
    """The entries of the list of prices by use. Its filters tell capital letters from small ones."""
    filters = {**wanted, "priceType": "Consumption"}
    text = " and ".join(f"{name} eq '{value}'" for name, value in filters.items())
    yield from pages(account, f"{config.prices_url}/api/retail/prices", {"$filter": text, "currencyCode": "USD"})


def _prices(account: Account, config: AzureConfig, region: str) -> tuple[dict[str, float], dict[str, float]]:
    """Linux, by the hour, on demand and as spot. Of two prices for the same thing the dearer one."""
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for entry in _retail(account, config, serviceName="Virtual Machines", armRegionName=region):
        size, price = entry.get("armSkuName"), float(entry.get("retailPrice", 0))
        if not size or price <= 0 or entry.get("unitOfMeasure") != "1 Hour" or not _is_plain(entry):
            continue
        prices = found[entry["skuName"].endswith(" Spot")]
        prices[size] = max(price, prices.get(size, 0))
    return found


def some_price(account: Account, config: AzureConfig, region: str) -> None:
    """Whether prices can be read at all.

    Raises:
        BackendError: they cannot.
    """
    next(_retail(account, config, serviceName="Storage", armRegionName=region, productName=_DISKS), None)


def _is_plain(entry: dict[str, Any]) -> bool:
    product, sku = entry.get("productName", ""), entry.get("skuName", "")
    return "Low Priority" not in sku and not any(word in product for word in _NOT_A_MACHINE_OF_OURS)


def _disk_prices(account: Account, config: AzureConfig, region: str) -> Iterator[tuple[int, float]]:
    """Disks are paid for by classes of size."""
    for entry in _retail(account, config, serviceName="Storage", armRegionName=region, productName=_DISKS):
        name, _, kind = entry.get("skuName", "").partition(" ")
        if name in DISK_CLASSES and kind == "LRS" and entry.get("meterName") == f"{name} LRS Disk":
            yield DISK_CLASSES[name], float(entry["retailPrice"])


DISK_CLASSES = {
    "E1": 4,
    "E2": 8,
    "E3": 16,
    "E4": 32,
    "E6": 64,
    "E10": 128,
    "E15": 256,
    "E20": 512,
    "E30": 1024,
    "E40": 2048,
    "E50": 4096,
    "E60": 8192,
    "E70": 16384,
    "E80": 32767,
}
"""Of Standard SSDs: up to how many GiB."""


def to_json(part: Shelf | Mood) -> dict[str, Any]:
    """A part as plain values."""
    return asdict(part)


def shelf_from(values: dict[str, Any]) -> Shelf:
    """Back from plain values."""
    machines = {
        name: Machine(
            **{**entry, "zones": tuple(entry["zones"]), "closed_zones": tuple(entry["closed_zones"])},
        )
        for name, entry in values["machines"].items()
    }
    disks = {int(size): price for size, price in values["disk_prices"].items()}
    return Shelf(machines, values["prices"], values["spot_prices"], disks)


def mood_from(values: dict[str, Any]) -> Mood:
    """Back from plain values."""
    return Mood(**values)
