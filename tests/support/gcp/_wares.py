"""What this Google sells: a few real machine types in three regions, and the price list of their parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer

REGIONS = {"us-central1": 1.0, "europe-west4": 1.1, "us-west1": 1.05}
"""Regions, and how prices compare."""
PLACES = {"us-central1": "Americas", "europe-west4": "Netherlands", "us-west1": "Oregon"}
ZONES = "abc"
DISK_GIB = 100
SCRATCH_GIB = 375


@dataclass(frozen=True)
class Ware:
    """One machine type.

    Attributes:
        cpus: virtual CPUs.
        memory_mib: memory.
        gpus: accelerator and count.
        zones: where it is sold.
        paid: the CPUs that are paid for, where that is less.
        scratch: local disks that it comes with.
        arch: `X86_64` or `ARM64`.
        sold: whether a backend can offer it: it has a price.
    """

    cpus: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...] = ()
    zones: str = ZONES
    paid: float | None = None
    scratch: int = 0
    arch: str = "X86_64"
    sold: bool = True

    @property
    def shared(self) -> bool:
        """Whether it has a part of its CPUs."""
        return self.paid is not None


WARES = {
    "e2-micro": Ware(2, 1024, paid=0.25),
    "e2-medium": Ware(2, 4096, paid=1.0),
    "e2-standard-4": Ware(4, 16384),
    "f1-micro": Ware(1, 614, paid=0.2, sold=False),
    "n1-standard-4": Ware(4, 15360),
    "n1-standard-16": Ware(16, 61440),
    "n2-standard-8": Ware(8, 32768),
    "t2d-standard-4": Ware(4, 16384, zones="ab"),
    "t2a-standard-4": Ware(4, 16384, zones="a", arch="ARM64"),
    "c2-standard-4": Ware(4, 16384),
    "m1-ultramem-40": Ware(40, 984064, zones="b", sold=False),
    "g2-standard-4": Ware(4, 16384, (("nvidia-l4", 1),), zones="bc"),
    "g2-standard-24": Ware(24, 98304, (("nvidia-l4", 2),), zones="b"),
    "a2-highgpu-1g": Ware(12, 87040, (("nvidia-tesla-a100", 1),), zones="ac"),
    "a2-ultragpu-1g": Ware(12, 174080, (("nvidia-a100-80gb", 1),), zones="a", scratch=1),
    "a3-highgpu-8g": Ware(208, 1916928, (("nvidia-h100-80gb", 8),), zones="a", scratch=16),
}
CARDS = {"nvidia-tesla-t4": ("ab", 4), "nvidia-tesla-v100": ("a", 8)}
"""GPUs that an N1 machine may have: zones, and how many at most."""
MOST = {
    "nvidia-tesla-t4": {1: (48, 312), 2: (48, 312), 4: (96, 624)},
    "nvidia-tesla-v100": {1: (12, 78), 2: (24, 156), 4: (48, 312), 8: (96, 624)},
}
"""By their number: CPUs, and GiB of memory."""
GPUS = {
    "nvidia-l4": Gpu("L4", 24576, "nvidia", (8, 9)),
    "nvidia-tesla-a100": Gpu("A100", 40960, "nvidia", (8, 0)),
    "nvidia-a100-80gb": Gpu("A100", 81920, "nvidia", (8, 0)),
    "nvidia-h100-80gb": Gpu("H100", 81920, "nvidia", (9, 0)),
    "nvidia-tesla-t4": Gpu("T4", 16384, "nvidia", (7, 5)),
    "nvidia-tesla-v100": Gpu("V100", 16384, "nvidia", (7, 0)),
}
PARTS = {
    "e2": (0.02181159, 0.00292353, "E2 Instance"),
    "n1": (0.031611, 0.004237, "N1 Predefined Instance"),
    "n2": (0.031611, 0.004237, "N2 Instance"),
    "t2d": (0.027502, 0.003686, "T2D AMD Instance"),
    "t2a": (0.024840, 0.003330, "T2A Arm Instance"),
    "c2": (0.03398, 0.00455, "Compute optimized"),
    "g2": (0.024988, 0.002927, "G2 Instance"),
    "a2": (0.031611, 0.004237, "A2 Instance"),
    "a3": (0.029317, 0.002551, "A3 Instance"),
}
"""USD per hour of a core and of a GiB, and how the price list calls the family."""
GPU_PARTS = {
    "nvidia-l4": (0.560004, "Nvidia L4 GPU"),
    "nvidia-tesla-a100": (2.933908, "Nvidia Tesla A100 GPU"),
    "nvidia-a100-80gb": (3.92833, "Nvidia Tesla A100 80GB GPU"),
    "nvidia-h100-80gb": (9.79655057, "Nvidia H100 80GB GPU"),
    "nvidia-tesla-t4": (0.35, "Nvidia Tesla T4 GPU"),
    "nvidia-tesla-v100": (2.48, "Nvidia Tesla V100 GPU"),
}
SPOT = 0.4
DISK, SCRATCH, ADDRESS = 0.1, 0.08, 0.005

QUOTAS = {
    "CPUS": 2400.0,
    "N2_CPUS": 500.0,
    "C2_CPUS": 500.0,
    "A2_CPUS": 96.0,
    "T2D_CPUS": 500.0,
    "T2A_CPUS": 500.0,
    "PREEMPTIBLE_CPUS": 0.0,
    "NVIDIA_T4_GPUS": 4.0,
    "NVIDIA_V100_GPUS": 8.0,
    "NVIDIA_L4_GPUS": 1.0,
    "NVIDIA_A100_GPUS": 8.0,
    # As for most projects: none of the large ones before one has asked.
    "NVIDIA_A100_80GB_GPUS": 0.0,
    "PREEMPTIBLE_NVIDIA_T4_GPUS": 4.0,
    "PREEMPTIBLE_NVIDIA_V100_GPUS": 0.0,
    "PREEMPTIBLE_NVIDIA_L4_GPUS": 8.0,
    "PREEMPTIBLE_NVIDIA_A100_GPUS": 8.0,
    "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS": 8.0,
    "INSTANCES": 6000.0,
    "IN_USE_ADDRESSES": 2300.0,
    "SSD_TOTAL_GB": 500000.0,
}
"""Of each region."""
PROJECT_QUOTAS = {"CPUS_ALL_REGIONS": 3000.0, "GPUS_ALL_REGIONS": 4.0}

IMAGES = {
    ("ubuntu-os-cloud", "ubuntu-2404-lts-amd64"): ("ubuntu-2404-noble-amd64-v20261101", 10, "X86_64"),
    ("ubuntu-os-cloud", "ubuntu-2404-lts-arm64"): ("ubuntu-2404-noble-arm64-v20261101", 10, "ARM64"),
    ("deeplearning-platform-release", "common-cu129-ubuntu-2204-nvidia-580"): (
        "common-cu129-ubuntu-2204-nvidia-580-v20261015",
        50,
        "X86_64",
    ),
}
"""By project and family: name, GiB and architecture."""


def family_of(machine: str) -> str:
    """`n1` of `n1-standard-4`."""
    return machine.partition("-")[0]


def needs(machine: str, cards: tuple[tuple[str, int], ...], *, spot: bool) -> dict[str, float]:
    """What a machine counts as, by the name of the quota of its region; those of the project have no region."""
    ware, family = WARES[machine], family_of(machine)
    gpus = (*ware.gpus, *cards)
    own = f"{family.upper()}_CPUS"
    counted = {"INSTANCES": 1.0, "CPUS_ALL_REGIONS": float(ware.cpus)}
    if family != "a3":
        counted[own if own in QUOTAS else "CPUS"] = float(ware.cpus)
    for name, count in gpus:
        short = name.removeprefix("nvidia-").removeprefix("tesla-").upper().replace("-", "_")
        metric = f"{'PREEMPTIBLE_' if spot else ''}NVIDIA_{short}_GPUS"
        if metric in QUOTAS:
            counted[metric] = float(count)
        counted["GPUS_ALL_REGIONS"] = float(count)
    return counted


def sold() -> Iterator[tuple[str, str, tuple[tuple[str, int], ...], str]]:
    """What can be bought: the name of the offer, machine type, attached GPUs, zones."""
    for machine, ware in WARES.items():
        if ware.sold:
            yield machine, machine, (), ware.zones
        if family_of(machine) == "n1":
            for card, (zones, most) in CARDS.items():
                for count, (cpus, gib) in MOST[card].items():
                    if count <= most and ware.cpus <= cpus and ware.memory_mib <= gib * 1024:
                        short = card.removeprefix("nvidia-tesla-")
                        yield f"{machine}+{count}x{short}", machine, ((card, count),), zones


def price(machine: str, cards: tuple[tuple[str, int], ...], region: str, *, spot: bool, public: bool = True) -> float:
    """USD per hour all in, with a disk of the usual size."""
    ware, (core, gib, _) = WARES[machine], PARTS[family_of(machine)]
    paid = ware.cpus if ware.paid is None else ware.paid
    amount = core * paid + gib * ware.memory_mib / 1024
    amount += sum(GPU_PARTS[name][0] * count for name, count in (*ware.gpus, *cards))
    amount += SCRATCH * ware.scratch * SCRATCH_GIB / 730
    amount *= SPOT if spot else 1
    amount += DISK * DISK_GIB / 730
    amount *= REGIONS[region]
    return amount + (ADDRESS * (0.5 if spot else 1) if public else 0)


def offers(region: str) -> Iterator[Offer]:
    """What a backend has to offer, in the contract's units and all in."""
    for name, machine, cards, zones in sold():
        ware = WARES[machine]
        gpus = tuple(GPUS[card] for card, count in (*ware.gpus, *cards) for _ in range(count))
        arch = "arm" if ware.arch == "ARM64" else "x86"
        resources = MachineResources(float(ware.cpus), ware.memory_mib, DISK_GIB * 1024, gpus, arch)
        for spot in (False, True):
            limits = {**QUOTAS, **PROJECT_QUOTAS}
            short = any(limits[metric] < amount for metric, amount in needs(machine, cards, spot=spot).items())
            for zone in zones:
                yield Offer(
                    backend="gcp",
                    instance_type=name,
                    region=region,
                    resources=resources,
                    price=round(price(machine, cards, region, spot=spot), 6),
                    zone=f"{region}-{zone}",
                    spot=spot,
                    availability=Availability.NO_QUOTA if short else Availability.UNKNOWN,
                    reason="quota" if short else None,
                )


def price_list() -> Iterator[dict[str, Any]]:
    """The catalogue's documents, with what must not be taken for them."""
    for region, factor in REGIONS.items():
        place = PLACES[region]
        for core, gib, words in PARTS.values():
            for part, amount, unit in (("Core", core, "h"), ("Ram", gib, "GiBy.h")):
                said = f"{words} {part} running in {place}"
                yield _sku(said, "Compute", "CPU", region, amount * factor, unit)
                yield _sku(
                    f"Spot Preemptible {said}", "Compute", "CPU", region, amount * factor * SPOT, unit, spot=True
                )
                yield _sku(f"Commitment v1: {said}", "Compute", "CPU", region, amount / 9, unit, usage="Commit1Yr")
                yield _sku(said, "Compute", "CPU", region, amount / 9, unit, usage="Commit3Yr")
                custom = f"Custom {said}"
                yield _sku(custom, "Compute", "CPU", region, amount * 9, unit)
                yield _sku(f"{words} Sole Tenancy {part} running in {place}", "Compute", "CPU", region, 99, unit)
                yield _sku(said, "Compute", "CPU", region, 0.0, unit)
        for amount, words in GPU_PARTS.values():
            said = f"{words} attached to Spot Preemptible VMs running in {place}"
            yield _sku(f"{words} running in {place}", "Compute", "GPU", region, amount * factor, "h")
            yield _sku(said, "Compute", "GPU", region, amount * factor * SPOT, "h", spot=True)
            yield _sku(f"{words} reserved running in {place}", "Compute", "GPU", region, 98, "h")
        yield from _storage(region, factor)
    everywhere = "global"
    yield _sku("External IP Charge on a Standard VM", "Network", "IpAddress", everywhere, ADDRESS, "h")
    said = "External IP Charge on a Spot Preemptible VM"
    yield _sku(said, "Network", "IpAddress", everywhere, ADDRESS / 2, "h", spot=True)
    yield _sku("Static Ip Charge", "Network", "IpAddress", everywhere, 0.01, "h")


def _storage(region: str, factor: float) -> Iterator[dict[str, Any]]:
    scratch = "SSD backed Local Storage"
    yield _sku("Storage PD Capacity", "Storage", "PDStandard", region, 0.04 * factor, "GiBy.mo")
    yield _sku("Balanced PD Capacity", "Storage", "SSD", region, DISK * factor, "GiBy.mo")
    yield _sku("SSD backed PD Capacity", "Storage", "SSD", region, 0.17 * factor, "GiBy.mo")
    yield _sku(scratch, "Storage", "LocalSSD", region, SCRATCH * factor, "GiBy.mo")
    said = f"{scratch} attached to Spot Preemptible VMs"
    yield _sku(said, "Storage", "LocalSSD", region, SCRATCH * factor * SPOT, "GiBy.mo", spot=True)


def _sku(
    description: str,
    family: str,
    group: str,
    region: str,
    amount: float,
    unit: str,
    *,
    spot: bool = False,
    usage: str = "",
) -> dict[str, Any]:
    units = int(amount)
    rate = {"startUsageAmount": 0, "unitPrice": {"currencyCode": "USD", "units": str(units)}}
    rate["unitPrice"]["nanos"] = round((amount - units) * 1e9)  # type: ignore[index]  # a document
    expression = {"usageUnit": unit, "displayQuantity": 1, "tieredRates": [rate]}
    return {
        "name": "services/6F81-5844-456A/skus/0000-0000-0000",
        "skuId": "0000-0000-0000",
        "description": description,
        "category": {
            "serviceDisplayName": "Compute Engine",
            "resourceFamily": family,
            "resourceGroup": group,
            "usageType": usage or ("Preemptible" if spot else "OnDemand"),
        },
        "serviceRegions": [region],
        "pricingInfo": [{"summary": "", "pricingExpression": expression, "currencyConversionRate": 1}],
        "serviceProviderName": "Google",
    }
