"""From what Lambda sells to offers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from dstack_core.plugin import Availability, MachineResources, Offer
from dstack_lambda._gpus import arch, gpu


def offers_of(types: dict[str, Any], regions: Collection[str]) -> Iterator[Offer]:
    """Every type in every region: those of the configuration, or all that Lambda speaks of.

    Lambda says only where a type is to be had now. Elsewhere it is shown as one that is not.

    Args:
        types: Lambda's answer.
        regions: those of the configuration; empty for all.
    """
    spoken_of = regions_of(types)
    for name, item in sorted(types.items()):
        resources = _resources(item["instance_type"])
        if resources is None:
            continue
        price = item["instance_type"]["price_cents_per_hour"] / 100
        there = _with_capacity(item)
        for region in sorted(set(regions) or spoken_of):
            had = region in there
            yield Offer(
                backend="lambda",
                instance_type=name,
                region=region,
                resources=resources,
                price=price,
                availability=Availability.AVAILABLE if had else Availability.NO_CAPACITY,
                reason=None if had else f"Lambda has no {name} in {region} now",
            )


def regions_of(types: dict[str, Any]) -> set[str]:
    """The regions in which anything is to be had now."""
    return {region for item in types.values() for region in _with_capacity(item)}


def _with_capacity(item: dict[str, Any]) -> set[str]:
    return {region["name"] for region in item["regions_with_capacity_available"]}


def _resources(described: dict[str, Any]) -> MachineResources | None:
    """What a machine has; `None` if it has GPUs that nobody can tell anything of."""
    specs = described["specs"]
    count = specs["gpus"]
    one = gpu(described["gpu_description"]) if count else None
    if count and one is None:
        return None
    return MachineResources(
        cpus=float(specs["vcpus"]),
        memory_mib=specs["memory_gib"] * 1024,
        disk_mib=specs["storage_gib"] * 1024,
        gpus=(one,) * count if one else (),
        arch=arch(one),
    )
