"""From what a region sells to offers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from dstack_azure._gpus import gpu_of
from dstack_azure._images import DRIVER_DISK_GIB, PLAIN_DISK_GIB
from dstack_azure._instances import zone_of
from dstack_azure._market import Machine, Mood, Shelf
from dstack_core.plugin import Availability, MachineResources, Offer, Requirements, SpotPolicy

DISK_GIB = 128
"""The disk of an instance that nobody asked a size for: a whole class of Azure's."""
MOST_DISK_GIB = 4095
"""The largest disk that a system boots from."""
HOURS_PER_MONTH = 730.0
ADDRESS_PRICE = 0.005
"""USD per hour of a static public IPv4 address, in every region (Azure, "IP Addresses pricing")."""
SPOT_QUOTA, ALL_QUOTA = "lowprioritycores", "cores"


def offers_of(region: str, shelf: Shelf, mood: Mood, wanted: Requirements, *, public: bool) -> Iterator[Offer]:
    """The offers of one region, priced all in: machine, disk, and public address.

    A disk is made to order, as large as asked for. Machines that certainly do not fit are left out.
    """
    ways = [way for way in (False, True) if _sold_as(wanted.spot_policy, spot=way)]
    for name, machine in shelf.machines.items():
        if not _may_fit(name, machine, wanted):
            continue
        disk = disk_for(wanted, DRIVER_DISK_GIB if machine.gpus else PLAIN_DISK_GIB)
        extra = disk_price(shelf, disk) + (ADDRESS_PRICE if public else 0.0)
        for spot in ways:
            price = (shelf.spot_prices if spot else shelf.prices).get(name)
            if price and (machine.spot or not spot):
                yield from _in_zones(region, name, machine, mood, disk, round(price + extra, 6), spot=spot)


def _in_zones(
    region: str, name: str, machine: Machine, mood: Mood, disk: int, price: float, *, spot: bool
) -> Iterator[Offer]:
    """One offer for each zone; one for the region where there are none."""
    resources = _resources(name, machine, disk)
    short = _short(machine, mood, region, spot=spot)
    for number in machine.zones or (None,):
        zone = zone_of(region, number) if number else None
        closed = machine.closed
        if closed is None and number in machine.closed_zones:
            closed = f"this subscription may not have it in {zone}"
        reason = closed or short
        availability = Availability.NO_QUOTA if reason else Availability.UNKNOWN
        yield Offer("azure", name, region, resources, price, zone, spot, availability, reason, machine.generation)


def _short(machine: Machine, mood: Mood, region: str, *, spot: bool) -> str | None:
    """Which quota is too small for one of these, in words."""
    for quota in (SPOT_QUOTA,) if spot else (machine.family, ALL_QUOTA):
        limit = mood.quotas.get(quota)
        if limit is not None and machine.cpus > limit:
            return f"needs {machine.cpus} vCPUs, and the subscription may have {limit:g} (quota {quota} in {region})"
    return None


def disk_for(wanted: Requirements, least: int) -> int:
    """The size of the disk, in GiB.

    Args:
        wanted: what is asked for.
        least: how large the image is, in GiB.
    """
    asked = -(-int(wanted.disk_mib.min or 0) // 1024) or DISK_GIB
    size = min(max(asked, least), MOST_DISK_GIB)
    most = int(wanted.disk_mib.max or 0) // 1024
    return min(size, most) if most >= least else size


def disk_price(shelf: Shelf, size: int) -> float:
    """USD per hour of a disk: that of the smallest class that holds it."""
    classes = sorted(one for one in shelf.disk_prices if one >= size)
    return shelf.disk_prices[classes[0]] / HOURS_PER_MONTH if classes else 0.0


def _sold_as(policy: SpotPolicy, *, spot: bool) -> bool:
    return policy is SpotPolicy.AUTO or spot == (policy is SpotPolicy.SPOT)


def _may_fit(name: str, machine: Machine, wanted: Requirements) -> bool:
    """False only for what cannot fit; the core looks again, and closer."""
    if wanted.instance_types and name not in wanted.instance_types:
        return False
    if wanted.arch is not None and machine.arch != wanted.arch:
        return False
    if machine.cpus not in wanted.cpus or machine.memory_mib not in wanted.memory_mib:
        return False
    return wanted.gpu is None or bool(machine.gpus) or not wanted.gpu.count.min


@lru_cache(maxsize=20_000)
def _resources(name: str, machine: Machine, disk_gib: int) -> MachineResources:
    """One object for all offers of a size."""
    gpu = gpu_of(name)
    gpus = (gpu,) * machine.gpus if gpu else ()
    return MachineResources(float(machine.cpus), machine.memory_mib, disk_gib * 1024, gpus, machine.arch)
