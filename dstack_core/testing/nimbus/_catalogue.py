"""What Nimbus sells: a few machine types in three regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer

REGIONS = {"north": ("north-a", "north-b"), "south": ("south-a",), "west": ("west-a", "west-b")}
ZONES = {zone: region for region, zones in REGIONS.items() for zone in zones}
_DEARER = {"north": 1.0, "south": 1.1, "west": 0.95}
_SPOT = 0.35


@dataclass(frozen=True)
class MachineType:
    """One machine type.

    Attributes:
        price: USD per hour on demand in the region `north`.
        gpus: how many; each is a `gpu` of `gpu_memory_gib`.
        sold_out: zones where there is none now.
        spot: whether it can be had as spot, too.
    """

    name: str
    vcpus: int
    memory_gib: int
    disk_gib: int
    price: float
    arch: str = "x86"
    gpus: int = 0
    gpu: str = ""
    gpu_memory_gib: int = 0
    capability: tuple[int, int] | None = None
    sold_out: tuple[str, ...] = ()
    spot: bool = True

    def described(self) -> dict[str, Any]:
        """As the API shows it."""
        gpu = {
            "model": f"NVIDIA {self.gpu} {self.gpu_memory_gib}GB",
            "count": self.gpus,
            "memory_gib": self.gpu_memory_gib,
            "compute_capability": list(self.capability or ()),
        }
        return {
            "name": self.name,
            "vcpus": self.vcpus,
            "memory_gib": self.memory_gib,
            "disk_gib": self.disk_gib,
            "arch": {"x86": "x86_64", "arm": "aarch64"}[self.arch],
            "gpu": gpu if self.gpus else None,
            "prices": list(self.prices()),
        }

    def prices(self) -> Iterator[dict[str, Any]]:
        """One for each zone and way of buying."""
        for zone, region in ZONES.items():
            for spot in (False, True) if self.spot else (False,):
                full = self.price * _DEARER[region] * (_SPOT if spot else 1)
                here = zone not in self.sold_out
                yield {
                    "region": region,
                    "zone": zone,
                    "spot": spot,
                    "usd_per_hour": round(full, 5),
                    "available": here,
                    "message": None if here else f"{self.name} is sold out in {zone}",
                }

    def offers(self) -> Iterator[Offer]:
        """As a backend has to offer it."""
        gpu = Gpu(self.gpu, self.gpu_memory_gib * 1024, "nvidia", self.capability)
        resources = MachineResources(
            float(self.vcpus), self.memory_gib * 1024, self.disk_gib * 1024, (gpu,) * self.gpus, self.arch
        )
        for price in self.prices():
            yield Offer(
                backend="nimbus",
                instance_type=self.name,
                region=price["region"],
                resources=resources,
                price=price["usd_per_hour"],
                zone=price["zone"],
                spot=price["spot"],
                availability=Availability.AVAILABLE if price["available"] else Availability.NO_CAPACITY,
                reason=price["message"],
            )


TYPES = {
    machine.name: machine
    for machine in (
        MachineType("small", 2, 8, 100, 0.04),
        MachineType("medium", 8, 32, 200, 0.16, sold_out=("north-b",)),
        MachineType("large", 32, 128, 400, 0.64),
        MachineType("arm", 4, 16, 100, 0.05, arch="arm", spot=False),
        MachineType("t4", 4, 16, 200, 0.45, gpus=1, gpu="T4", gpu_memory_gib=16, capability=(7, 5)),
        MachineType(
            "a100", 12, 96, 800, 1.9, gpus=1, gpu="A100", gpu_memory_gib=80, capability=(8, 0), sold_out=("south-a",)
        ),
        MachineType("a100x8", 96, 768, 6400, 15.0, gpus=8, gpu="A100", gpu_memory_gib=80, capability=(8, 0)),
    )
}
