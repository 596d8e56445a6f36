"""A backend for measuring: as many offers as one likes, and not one machine behind them."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from dstack_core.plugin import (
    Availability,
    BackendConfig,
    BackendInfo,
    Gpu,
    Instance,
    InstanceRef,
    InstanceRequest,
    MachineResources,
    NoCapacityError,
    Offer,
    Requirements,
    hookimpl,
)

GPUS = ("T4", "L4", "A10G", "V100", "L40S", "A100", "H100", "H200")


class BenchConfig(BackendConfig):
    """How many instance types there are, in how many regions."""

    type: Literal["bench"] = "bench"
    shapes: int = 1
    regions: int = 1


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """The one backend of this module; its listing stays good for the length of a measurement."""
    return [
        BackendInfo(
            name="bench", title="Benchmark", config=BenchConfig, factory="dstack_bench:BenchBackend", offers_ttl=3600
        )
    ]


class BenchBackend:
    """Lists everything, has nothing."""

    def __init__(self, config: BenchConfig) -> None:
        shapes = [(f"shape-{n}", _machine(n), 0.1 + n * 0.013) for n in range(config.shapes)]
        self._offers = [
            Offer(
                backend="bench",
                instance_type=name,
                region=f"region-{region}",
                resources=machine,
                price=round(price * (1 + region / 1000), 4),
                spot=(number + region) % 2 == 0,
                availability=Availability.AVAILABLE,
            )
            for region in range(config.regions)
            for number, (name, machine, price) in enumerate(shapes)
        ]

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:  # noqa: ARG002  # the core filters
        """All of them, every time."""
        return self._offers

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Never."""
        raise NoCapacityError(
            f"no {request.offer.instance_type} to be had: this backend only lists", scope="type", retry_after=0
        )

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:  # noqa: ARG002  # there is none
        """There is none."""
        return None

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:  # noqa: ARG002  # there is none
        """There is none."""
        return []

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """There is none."""


def _machine(number: int) -> MachineResources:
    """The machine of the shape with this number: from 2 CPUs without a GPU to 128 CPUs with eight."""
    gpus = (Gpu(GPUS[number % len(GPUS)], 16384 << (number % 3)),) * (number % 9)
    return MachineResources(cpus=2 << (number % 7), memory_mib=8192 << (number % 8), disk_mib=200 * 1024, gpus=gpus)
