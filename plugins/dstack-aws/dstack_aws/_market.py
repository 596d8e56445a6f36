"""What Amazon sells in one region: read from its catalogues, and kept as plain values that fit into a JSON file.

Two parts of different age: machines and prices on demand change once in weeks, spot prices and quotas by the minute.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from dstack_aws._account import Account
from dstack_core.plugin import AuthenticationError

PRICING_REGION = "us-east-1"
"""The price list has an endpoint in a few regions only; this one has all prices."""
HOURS_PER_MONTH = 730.0
_ARCHS = {"x86_64": "x86", "arm64": "arm"}


@dataclass(frozen=True)
class Machine:
    """One instance type.

    Attributes:
        cpus: virtual CPUs.
        memory_mib: memory.
        arch: `x86` or `arm`.
        spot: whether it is sold as spot.
        gpus: name, memory in MiB and count of each kind of GPU.
    """

    cpus: int
    memory_mib: int
    arch: str
    spot: bool
    gpus: tuple[tuple[str, int, str, int], ...] = ()


@dataclass(frozen=True)
class Shelf:
    """What a region has: machines by type, the zones of each type, prices on demand by type, and of the disk.

    Attributes:
        machines: by type.
        zones: by type.
        prices: USD per hour, by type.
        disk_price: USD per GiB and month, of gp3.
    """

    machines: dict[str, Machine]
    zones: dict[str, tuple[str, ...]]
    prices: dict[str, float]
    disk_price: float


@dataclass(frozen=True)
class Mood:
    """What changes by the minute.

    Attributes:
        spot_prices: USD per hour, by `type/zone`.
        quotas: virtual CPUs, by the code of the quota; empty if the account may not read them.
    """

    spot_prices: dict[str, float]
    quotas: dict[str, float] = field(default_factory=dict)


def read_shelf(account: Account, region: str) -> Shelf:
    """Reads the catalogues of a region. Some twenty calls, a few seconds."""
    return Shelf(
        machines=dict(_machines(account, region)),
        zones=_zones(account, region),
        prices=dict(_prices(account, region)),
        disk_price=_disk_price(account, region),
    )


def read_mood(account: Account, region: str, now: datetime) -> Mood:
    """Reads spot prices and quotas."""
    return Mood(_spot_prices(account, region, now), _quotas(account, region))


def _machines(account: Account, region: str) -> Iterator[tuple[str, Machine]]:
    for page in account.pages("ec2", "describe_instance_types", region, MaxResults=100):
        for entry in page["InstanceTypes"]:
            arch = next(
                (_ARCHS[one] for one in entry["ProcessorInfo"]["SupportedArchitectures"] if one in _ARCHS), None
            )
            # Macs, and what is sold in blocks alone, are no machines by the hour.
            if arch is None or "on-demand" not in entry["SupportedUsageClasses"] or entry.get("BareMetal", False):
                continue
            yield (
                entry["InstanceType"],
                Machine(
                    cpus=entry["VCpuInfo"]["DefaultVCpus"],
                    memory_mib=entry["MemoryInfo"]["SizeInMiB"],
                    arch=arch,
                    spot="spot" in entry["SupportedUsageClasses"],
                    gpus=tuple(_gpus(entry)),
                ),
            )


def _gpus(entry: dict[str, Any]) -> Iterator[tuple[str, int, str, int]]:
    for gpu in entry.get("GpuInfo", {}).get("Gpus", ()):
        # A part of a GPU is sold with a count of one, and its own share of the memory.
        yield gpu["Name"], gpu["MemoryInfo"]["SizeInMiB"], gpu["Manufacturer"], max(1, int(gpu["Count"]))


def _zones(account: Account, region: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    pages = account.pages("ec2", "describe_instance_type_offerings", region, LocationType="availability-zone")
    for page in pages:
        for entry in page["InstanceTypeOfferings"]:
            # Local zones and Wavelength zones, whose names are longer, have to be enabled one by one.
            if entry["Location"][:-1] == region:
                found[entry["InstanceType"]].append(entry["Location"])
    return {name: tuple(sorted(set(zones))) for name, zones in found.items()}


def _products(account: Account, **wanted: str) -> Iterator[dict[str, Any]]:
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
    pages = account.pages(
        "pricing",
        "get_products",
        PRICING_REGION,
        ServiceCode="AmazonEC2",
        FormatVersion="aws_v1",
        Filters=filters,
        MaxResults=100,
    )
    for page in pages:
        yield from map(json.loads, page["PriceList"])


def _prices(account: Account, region: str) -> Iterator[tuple[str, float]]:
    """Linux, on shared hardware, without software that costs extra, and not part of a reservation."""
    products = _products(
        account,
        regionCode=region,
        operatingSystem="Linux",
        tenancy="Shared",
        preInstalledSw="NA",
        capacitystatus="Used",
    )
    for product in products:
        # A price of nothing is a placeholder in the list, not a gift.
        if price := _on_demand(product):
            yield product["product"]["attributes"]["instanceType"], price


def _disk_price(account: Account, region: str) -> float:
    products = _products(account, regionCode=region, productFamily="Storage", volumeApiName="gp3")
    return max((price for product in products if (price := _on_demand(product))), default=0.0)


def _on_demand(product: dict[str, Any]) -> float:
    terms = product.get("terms", {}).get("OnDemand", {})
    for term in terms.values():
        for dimension in term["priceDimensions"].values():
            return float(dimension["pricePerUnit"].get("USD", 0))
    return 0.0


def _spot_prices(account: Account, region: str, now: datetime) -> dict[str, float]:
    """The price of now: the newest of each type and zone."""
    newest: dict[str, tuple[datetime, float]] = {}
    pages = account.pages(
        "ec2",
        "describe_spot_price_history",
        region,
        StartTime=now,
        ProductDescriptions=["Linux/UNIX"],
        MaxResults=1000,
    )
    for page in pages:
        for entry in page["SpotPriceHistory"]:
            key = f"{entry['InstanceType']}/{entry['AvailabilityZone']}"
            said = (entry["Timestamp"].astimezone(UTC), float(entry["SpotPrice"]))
            newest[key] = max(newest.get(key, said), said)
    return {key: price for key, (_, price) in newest.items()}


def _quotas(account: Account, region: str) -> dict[str, float]:
    """Limits that this account may not read are found out when they are met."""
    try:
        pages = list(account.pages("service-quotas", "list_service_quotas", region, ServiceCode="ec2", MaxResults=100))
    except AuthenticationError:
        return {}
    return {quota["QuotaCode"]: float(quota["Value"]) for page in pages for quota in page["Quotas"]}


def to_json(part: Shelf | Mood) -> dict[str, Any]:
    """A part as plain values."""
    return asdict(part)


def shelf_from(values: dict[str, Any]) -> Shelf:
    """Back from plain values."""
    machines = {
        name: Machine(**{**entry, "gpus": tuple(tuple(gpu) for gpu in entry["gpus"])})
        for name, entry in values["machines"].items()
    }
    zones = {name: tuple(zones) for name, zones in values["zones"].items()}
    return Shelf(machines, zones, values["prices"], values["disk_price"])


def mood_from(values: dict[str, Any]) -> Mood:
    """Back from plain values."""
    return Mood(**values)
