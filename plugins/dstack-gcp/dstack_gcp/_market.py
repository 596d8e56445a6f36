"""What Google sells: read from its catalogues, and kept as plain values that fit into a JSON file.

Three parts of different age: machines of a region, the price list of all, and the quotas of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dstack_core.plugin import BackendError
from dstack_gcp._account import Account
from dstack_gcp._gpus import ATTACHABLE
from dstack_gcp._prices import COMPUTE, FAMILIES, Prices, prices_of

ALL = "all"
"""The place of what is of no region."""
_SHARED_CORES = {"e2-micro": 0.25, "e2-small": 0.5, "e2-medium": 1.0}
"""Machines that pay for a part of their cores ("VM instance pricing", shared-core)."""
_ARMS = frozenset({"t2a", "c4a", "n4a"})
_SCRATCH_GIB = 375
_SOLD_OTHERWISE = re.compile(r"-metal$|^n1-(mega|ultra)mem-|^a3-(?!highgpu-)")
"""Machines that have other prices than their family, or another kind of disk."""


@dataclass(frozen=True)
class Machine:
    """One machine type.

    Attributes:
        family: `n1`.
        cpus: virtual CPUs.
        paid_cpus: those that are paid for.
        memory_mib: memory.
        arch: `x86` or `arm`.
        gpus: accelerator and count that it comes with, or that may be attached.
        scratch_gib: local disks that it comes with.
        zones: where it is sold.
        base: the machine type to ask for; another one than the key where GPUs are attached.
    """

    family: str
    cpus: int
    paid_cpus: float
    memory_mib: int
    arch: str
    zones: tuple[str, ...]
    base: str
    gpus: tuple[tuple[str, int], ...] = ()
    scratch_gib: int = 0

    @property
    def attached(self) -> bool:
        """Whether its GPUs have to be asked for."""
        return bool(self.gpus) and self.family == "n1"


@dataclass(frozen=True)
class Shelf:
    """What a region has.

    Attributes:
        machines: by the name of the offer.
    """

    machines: dict[str, Machine]


@dataclass(frozen=True)
class Mood:
    """What changes by the hour.

    Attributes:
        zones: of each region that is up.
        limits: of each region, by the name of the quota; those of the project under `all`.
    """

    zones: dict[str, tuple[str, ...]]
    limits: dict[str, dict[str, float]] = field(default_factory=dict)


def read_mood(account: Account) -> Mood:
    """Reads regions and quotas: two calls."""
    zones, limits = {}, {}
    for page in account.pages("regions", "list"):
        for region in page.items:
            if region.status == "UP":
                zones[region.name] = tuple(sorted(url.rpartition("/")[2] for url in region.zones))
                limits[region.name] = {quota.metric: quota.limit for quota in region.quotas}
    limits[ALL] = _of_project(account)
    return Mood(zones, limits)


def _of_project(account: Account) -> dict[str, float]:
    """Limits that nobody may read are found out when they are met."""
    try:
        return {quota.metric: quota.limit for quota in account.call("projects", "get").quotas}
    except BackendError:
        return {}


def read_prices(account: Account) -> Prices:
    """Reads the price list of Compute Engine: about ten pages."""
    pages = account.pages("billing", "list_skus", parent=COMPUTE, currency_code="USD", page_size=5000)
    return prices_of(sku for page in pages for sku in page.skus)


def read_shelf(account: Account, zones: tuple[str, ...]) -> Shelf:
    """Reads the machines of a region: two calls for each of its zones."""
    machines: dict[str, Machine] = {}
    for zone in zones:
        cards = _cards(account, zone)
        for page in account.pages("machine_types", "list", zone, zone=zone, max_results=500):
            for entry in page.items:
                for name, machine in _machines(entry, zone, cards):
                    known = machines.get(name)
                    places = (*known.zones, zone) if known else (zone,)
                    machines[name] = Machine(**{**_fields(machine), "zones": places})
    return Shelf(machines)


def _cards(account: Account, zone: str) -> dict[str, int]:
    """The GPUs that may be attached in a zone, and how many to one machine."""
    pages = account.pages("accelerator_types", "list", zone, zone=zone, max_results=500)
    return {one.name: one.maximum_cards_per_instance for page in pages for one in page.items if one.name in ATTACHABLE}


def _machines(entry: Any, zone: str, cards: dict[str, int]) -> Iterator[tuple[str, Machine]]:
    """A machine type, as it is and with the GPUs that may be attached."""
    family = entry.name.partition("-")[0]
    if family not in FAMILIES or _SOLD_OTHERWISE.search(entry.name) or entry.deprecated.state not in ("", "ACTIVE"):
        return
    shared = _SHARED_CORES.get(entry.name)
    if entry.is_shared_cpu and shared is None:
        return
    gpus = tuple((one.guest_accelerator_type, one.guest_accelerator_count) for one in entry.accelerators)
    scratch = entry.bundled_local_ssds.partition_count * _SCRATCH_GIB
    plain = Machine(
        family=family,
        cpus=entry.guest_cpus,
        paid_cpus=shared or float(entry.guest_cpus),
        memory_mib=entry.memory_mb,
        arch="arm" if family in _ARMS or entry.architecture == "ARM64" else "x86",
        zones=(zone,),
        base=entry.name,
        gpus=gpus,
        scratch_gib=scratch,
    )
    yield entry.name, plain
    if family == "n1":
        yield from _with_cards(plain, cards)


def _with_cards(plain: Machine, cards: dict[str, int]) -> Iterator[tuple[str, Machine]]:
    for accelerator, most in cards.items():
        for count, (cpus, gib) in ATTACHABLE[accelerator].items():
            if count <= most and plain.cpus <= cpus and plain.memory_mib <= gib * 1024:
                name = f"{plain.base}+{count}x{accelerator.removeprefix('nvidia-tesla-')}"
                yield name, Machine(**{**_fields(plain), "gpus": ((accelerator, count),)})


def _fields(machine: Machine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in Machine.__dataclass_fields__}


def to_json(part: Shelf | Mood | Prices) -> dict[str, Any]:
    """A part as plain values."""
    return asdict(part)


def shelf_from(values: dict[str, Any]) -> Shelf:
    """Back from plain values."""
    return Shelf(
        {
            name: Machine(
                **{**entry, "gpus": tuple(tuple(gpu) for gpu in entry["gpus"]), "zones": tuple(entry["zones"])}
            )
            for name, entry in values["machines"].items()
        }
    )


def mood_from(values: dict[str, Any]) -> Mood:
    """Back from plain values."""
    return Mood({name: tuple(zones) for name, zones in values["zones"].items()}, values["limits"])


def prices_from(values: dict[str, Any]) -> Prices:
    """Back from plain values."""
    return Prices(values["by_region"])


def attached_to(name: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The machine type of an offer, and the GPUs to attach to it: `n1-standard-4+1xt4`."""
    base, _, cards = name.partition("+")
    count, _, short = cards.partition("x")
    if not cards or not count.isdecimal():
        return name, ()
    return base, ((f"nvidia-tesla-{short}", int(count)),)
