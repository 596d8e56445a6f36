"""Which quotas of a region, and of the project, a machine counts under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dstack_gcp._gpus import quota_metric

_OF_THEIR_OWN = frozenset({"a2", "a3", "c2", "c2d", "c3", "c4", "g2", "m1", "m2", "m3", "n2", "n2d", "t2a", "t2d"})
"""Families with a quota of CPUs by their name; all others count under `CPUS`."""
_NO_CPUS = frozenset({"a3"})
"""Families that count by their GPUs alone, where the quota of CPUs is not shown."""


def quotas_of(
    family: str, cpus: int, gpus: tuple[tuple[str, int], ...], limits: Mapping[str, float], *, spot: bool
) -> Iterator[tuple[str, float]]:
    """Names of quotas, and how much of each the machine takes.

    Args:
        family: `n1`.
        cpus: virtual CPUs.
        gpus: accelerator and count.
        limits: the limits of the region. A spot machine counts as one on demand where there are no spot CPUs at all.
        spot: how it is bought.
    """
    own = f"{family.upper()}_CPUS"
    metric = own if family in _OF_THEIR_OWN and own in limits else "CPUS"
    if spot and limits.get("PREEMPTIBLE_CPUS"):
        metric = "PREEMPTIBLE_CPUS"
    if family not in _NO_CPUS:
        yield metric, float(cpus)
    for accelerator, count in gpus:
        yield ("PREEMPTIBLE_" if spot else "") + quota_metric(accelerator), float(count)


def for_project(cpus: int, gpus: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, float]]:
    """The same of the whole project."""
    yield "CPUS_ALL_REGIONS", float(cpus)
    if gpus:
        yield "GPUS_ALL_REGIONS", float(sum(count for _, count in gpus))
