"""From what a region sells to offers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from dstack_core.plugin import Availability, MachineResources, Offer, Requirements, SpotPolicy
from dstack_gcp._gpus import gpu
from dstack_gcp._market import ALL, Machine, Mood, Shelf
from dstack_gcp._prices import Prices, extra_price, machine_price
from dstack_gcp._quotas import for_project, quotas_of

DISK_MIB = 100 * 1024
"""The disk of an instance that nobody asked a size for."""
LEAST_DISK_MIB = 10 * 1024


Table = dict[str, float]
"""USD per hour of each machine, without disk and address."""


def table_of(region: str, shelf: Shelf, prices: Prices, *, spot: bool) -> Table:
    """Prices of machines; those are left out of which a part has no price, or whose GPUs nobody knows."""
    found = {}
    for name, machine in shelf.machines.items():
        gib = machine.memory_mib / 1024
        price = machine_price(
            prices, region, machine.family, machine.paid_cpus, gib, machine.gpus, machine.scratch_gib, spot=spot
        )
        if price is not None and all(gpu(accelerator) for accelerator, _ in machine.gpus):
            found[name] = price
    return found


def offers_of(
    region: str,
    shelf: Shelf,
    tables: tuple[Table, Table],
    prices: Prices,
    mood: Mood,
    wanted: Requirements,
    public: bool,
) -> Iterator[Offer]:
    """The offers of one region, priced all in: cores, memory, GPUs, local disks, boot disk, and public address.

    A disk is made to order, as large as asked for. Machines that certainly do not fit are left out, which is what makes
    a listing of all regions quick.

    Args:
        region: its name.
        shelf: its machines.
        tables: their prices, on demand and spot.
        prices: of disks and addresses.
        mood: quotas.
        wanted: what is asked for.
        public: whether instances have a public address.
    """
    disk = disk_for(wanted)
    for spot in (way for way in (False, True) if _sold_as(wanted.spot_policy, spot=way)):
        extra = extra_price(prices, region, disk / 1024, public=public, spot=spot)
        for name, price in tables[spot].items():
            machine = shelf.machines[name]
            if _may_fit(name, machine, wanted):
                yield from _of_machine(region, name, machine, mood, disk, round(price + extra, 6), spot=spot)


def _of_machine(
    region: str, name: str, machine: Machine, mood: Mood, disk: int, price: float, *, spot: bool
) -> Iterator[Offer]:
    """One offer for each zone that has the machine."""
    resources = _resources(machine.cpus, machine.memory_mib, disk, machine.gpus, machine.arch)
    reason = _short_of(region, machine, mood, spot=spot)
    availability = Availability.NO_QUOTA if reason else Availability.UNKNOWN
    for zone in machine.zones:
        yield Offer("gcp", name, region, resources, price, zone, spot, availability, reason)


def _short_of(region: str, machine: Machine, mood: Mood, *, spot: bool) -> str | None:
    """The quota that is too small for the machine, in words."""
    limits, project = mood.limits.get(region, {}), mood.limits.get(ALL, {})
    for metric, amount in quotas_of(machine.family, machine.cpus, machine.gpus, limits, spot=spot):
        if metric in limits and limits[metric] < amount:
            return f"needs {amount:g}, and the project may have {limits[metric]:g} (quota {metric} in {region})"
    for metric, amount in for_project(machine.cpus, machine.gpus):
        if metric in project and project[metric] < amount:
            return f"needs {amount:g}, and the project may have {project[metric]:g} (quota {metric})"
    return None


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
def _resources(
    cpus: int, memory_mib: int, disk_mib: int, gpus: tuple[tuple[str, int], ...], arch: str
) -> MachineResources:
    """One object for all offers of a type."""
    known = tuple(one for name, count in gpus if (one := gpu(name)) is not None for _ in range(count))
    return MachineResources(float(cpus), memory_mib, disk_mib, known, arch)
