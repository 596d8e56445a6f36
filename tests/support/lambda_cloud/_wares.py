"""What is sold here: types, prices and descriptions as Lambda had them in autumn 2026, some of them sold out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer

REGIONS = {
    "us-east-1": "Virginia, USA",
    "us-west-1": "California, USA",
    "us-south-1": "Texas, USA",
    "europe-central-1": "Germany",
    "asia-south-1": "India",
}
FAMILIES = ("lambda-stack-22-04", "ubuntu-24-04-lts")


@dataclass(frozen=True)
class Ware:
    """One type.

    Attributes:
        cents: an hour, in US cents.
        specs: CPUs, memory in GiB, disk in GiB, GPUs.
        said: Lambda's words for the GPU.
        gpu: what they mean.
        regions: where it is to be had at first.
        arch: of its processor.
    """

    cents: int
    specs: tuple[int, int, int, int]
    said: str
    gpu: Gpu | None
    regions: tuple[str, ...]
    arch: str = "x86"

    @property
    def image_arch(self) -> str:
        """As images name it."""
        return "arm64" if self.arch == "arm" else "x86_64"

    def described(self, name: str) -> dict[str, Any]:
        """As Lambda describes it."""
        cpus, memory, disk, gpus = self.specs
        return {
            "name": name,
            "description": f"{gpus}x {self.said}" if gpus else "General purpose",
            "gpu_description": self.said,
            "price_cents_per_hour": self.cents,
            "specs": {"vcpus": cpus, "memory_gib": memory, "storage_gib": disk, "gpus": gpus},
        }


def _gpu(name: str, gib: int, capability: tuple[int, int]) -> Gpu:
    return Gpu(name, gib * 1024, "nvidia", capability)


WARES = {
    "cpu_4x_general": Ware(12, (4, 16, 512, 0), "N/A", None, ("us-east-1", "us-south-1", "us-west-1")),
    "gpu_1x_a10": Ware(75, (30, 200, 1400, 1), "A10 (24 GB PCIe)", _gpu("A10", 24, (8, 6)), ("us-east-1", "us-west-1")),
    "gpu_1x_rtx6000": Ware(50, (14, 46, 512, 1), "RTX 6000 (24 GB)", _gpu("RTX6000", 24, (7, 5)), ("us-south-1",)),
    "gpu_1x_gh200": Ware(
        149, (64, 432, 4096, 1), "GH200 (96 GB)", _gpu("GH200", 96, (9, 0)), ("us-east-1",), arch="arm"
    ),
    "gpu_8x_v100_n": Ware(440, (88, 448, 5939, 8), "Tesla V100 (16 GB)", _gpu("V100", 16, (7, 0)), ()),
    "gpu_8x_a100_80gb_sxm4": Ware(
        1432, (240, 1800, 20480, 8), "A100 (80 GB SXM4)", _gpu("A100", 80, (8, 0)), ("us-east-1",)
    ),
    "gpu_8x_h100_sxm5": Ware(2392, (208, 1800, 22528, 8), "H100 (80 GB SXM5)", _gpu("H100", 80, (9, 0)), ()),
    "gpu_8x_b200_sxm6": Ware(
        3992, (208, 2900, 22528, 8), "B200 (180 GB SXM6)", _gpu("B200", 180, (10, 0)), ("asia-south-1",)
    ),
}


def region(name: str) -> dict[str, str]:
    """As Lambda describes it."""
    return {"name": name, "description": REGIONS[name]}


def images() -> Iterator[dict[str, Any]]:
    """Two families in each region, each for both processors."""
    for number, (family, arch, place) in enumerate(
        (family, arch, place) for family in FAMILIES for arch in ("x86_64", "arm64") for place in REGIONS
    ):
        yield {
            "id": f"{number:032x}",
            "created_time": "2026-10-01T08:00:00+00:00",
            "updated_time": "2026-10-01T08:00:00+00:00",
            "name": f"{family} ({arch})",
            "description": f"{family}, newest",
            "family": family,
            "version": "2026.10",
            "architecture": arch,
            "region": region(place),
        }


def offers(regions: tuple[str, ...]) -> Iterator[Offer]:
    """Everything that a backend has to offer."""
    spoken_of = sorted({place for ware in WARES.values() for place in ware.regions})
    for name, ware in WARES.items():
        cpus, memory, disk, gpus = ware.specs
        resources = MachineResources(
            float(cpus), memory * 1024, disk * 1024, (ware.gpu,) * gpus if ware.gpu else (), ware.arch
        )
        for place in regions or spoken_of:
            had = place in ware.regions
            availability = Availability.AVAILABLE if had else Availability.NO_CAPACITY
            reason = None if had else "sold out"
            yield Offer("lambda", name, place, resources, ware.cents / 100, availability=availability, reason=reason)
