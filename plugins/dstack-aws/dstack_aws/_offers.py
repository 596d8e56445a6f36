"""From what a region sells to offers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from dstack_aws._gpus import gpu
from dstack_aws._market import HOURS_PER_MONTH, Machine, Mood, Shelf
from dstack_aws._quotas import quota_of
from dstack_core.plugin import Availability, MachineResources, Offer, Requirements, SpotPolicy

DISK_MIB = 100 * 1024
"""The disk of an instance that nobody asked a size for."""
LEAST_DISK_MIB = 8 * 1024
ADDRESS_PRICE = 0.005
"""USD per hour of a public IPv4 address, in every region (Amazon VPC pricing)."""


def offers_of(region: str, shelf: Shelf, mood: Mood, wanted: Requirements, *, public: bool) -> Iterator[Offer]:
    """The offers of one region, priced all in: machine, disk, and public address.

    A disk is made to order, as large as asked for. Machines that certainly do not fit are left out, which is what makes
    a listing of all regions quick.
    """
    disk = disk_for(wanted)
    extra = disk / 1024 * shelf.disk_price / HOURS_PER_MONTH + (ADDRESS_PRICE if public else 0.0)
    ways = [way for way in (False, True) if _sold_as(wanted.spot_policy, spot=way)]
    for name, machine in shelf.machines.items():
        if not _may_fit(name, machine, wanted):
            continue
        resources = _resources(machine, disk)
        for spot in ways:
            yield from _of_type(region, name, machine, resources, shelf, mood, extra, spot=spot)


def _of_type(
    region: str,
    name: str,
    machine: Machine,
    resources: MachineResources,
    shelf: Shelf,
    mood: Mood,
    extra: float,
    *,
    spot: bool,
) -> Iterator[Offer]:
    """One offer for each zone that has the type, at the price that is known for it."""
    if spot and not machine.spot:
        return
    code = quota_of(name, spot=spot)
    limit = mood.quotas.get(code) if code else None
    short = limit is not None and machine.cpus > limit
    availability = Availability.NO_QUOTA if short else Availability.UNKNOWN
    reason = (
        f"needs {machine.cpus} vCPUs, and the account may have {limit:g} (quota {code} in {region})" if short else None
    )
    for zone in shelf.zones.get(name, ()):
        price = mood.spot_prices.get(f"{name}/{zone}") if spot else shelf.prices.get(name)
        if price:
            yield Offer("aws", name, region, resources, round(price + extra, 6), zone, spot, availability, reason)


def disk_for(wanted: Requirements) -> int:
    """The size of the disk, in MiB."""
    least = int(wanted.disk_mib.min or 0) or DISK_MIB
    most = wanted.disk_mib.max
    size = max(least, LEAST_DISK_MIB)
    # In whole GiB, as disks are sold.
    size = -(-size // 1024) * 1024
    return min(size, int(most) // 1024 * 1024) if most is not None and most >= LEAST_DISK_MIB else size


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
def _resources(machine: Machine, disk_mib: int) -> MachineResources:
    """One object for all offers of a type."""
    gpus = tuple(one for name, memory, maker, count in machine.gpus for one in (gpu(name, memory, maker),) * count)
    return MachineResources(float(machine.cpus), machine.memory_mib, disk_mib, gpus, machine.arch)
