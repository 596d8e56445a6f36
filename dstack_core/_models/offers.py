"""What a job needs (`Requirements`) and what a backend sells (`Offer`).

Units are the same everywhere: sizes in MiB, prices in USD per hour, times as aware UTC datetimes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pydantic import BaseModel, ConfigDict

from dstack_core._models.profiles import SpotPolicy
from dstack_core._models.resources import Range


class Availability(str, Enum):
    """Whether an offer can be had now, as far as the backend knows without trying.

    Attributes:
        AVAILABLE: the cloud says that it has some.
        UNKNOWN: the cloud does not say; worth trying.
        NO_CAPACITY: the cloud has none now.
        NO_QUOTA: the account may not have more of these.
    """

    AVAILABLE = "available"
    UNKNOWN = "unknown"
    NO_CAPACITY = "no_capacity"
    NO_QUOTA = "no_quota"

    @property
    def worth_trying(self) -> bool:
        """True unless the backend already knows that creating would be refused."""
        return self in (Availability.AVAILABLE, Availability.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a machine.

    Attributes:
        name: upper-case, without vendor and memory (`A100`, `L4`, `RTX4090`).
        memory_mib: memory of this GPU, in MiB.
        vendor: `"nvidia"`, `"amd"`, `"google"`, `"intel"` or `"tenstorrent"`.
        compute_capability: `(major, minor)` for NVIDIA, else `None`.
    """

    name: str
    memory_mib: int
    vendor: str = "nvidia"
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class MachineResources:
    """What a machine has. Share one object among the offers of one instance type: it is hashable and immutable.

    Attributes:
        cpus: CPUs; may be a fraction.
        memory_mib: memory, in MiB.
        disk_mib: disk, in MiB.
        gpus: one entry for each GPU.
        arch: `"x86"` or `"arm"`.
    """

    cpus: float
    memory_mib: int
    disk_mib: int = 0
    gpus: tuple[Gpu, ...] = ()
    arch: str = "x86"


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that can be bought: an instance type in a place, at a price.

    Offers come by the ten thousand, so this is a plain object with slots, without validation.

    Attributes:
        backend: name of the backend; equals the registered name.
        instance_type: the cloud's own name of the type, for example `"g5.xlarge"`.
        region: the cloud's own region name.
        resources: what the machine has.
        price: USD per hour, all in; `0.0` is free.
        zone: the zone, or `None` when the backend chooses one or has none.
        spot: may be interrupted by the cloud.
        availability: what is known without trying.
        reason: for an offer that is not available, why, in words for a person; else `None`.
        data: opaque text that only this backend reads when it creates the instance.
    """

    backend: str
    instance_type: str
    region: str
    resources: MachineResources
    price: float
    zone: str | None = None
    spot: bool = False
    availability: Availability = Availability.UNKNOWN
    reason: str | None = None
    data: str = field(default="", compare=False)


class GpuRequirements(BaseModel):
    """The GPUs a job needs. Every field narrows; `None` and empty mean any.

    Attributes:
        vendor: as `Gpu.vendor`.
        names: acceptable names, as `Gpu.name`.
        count: how many.
        memory_mib: memory of each, in MiB.
        total_memory_mib: memory of all together, in MiB.
        compute_capability: the least one, as `(major, minor)`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    vendor: str | None = None
    names: tuple[str, ...] = ()
    count: Range[int] = Range(min=1, max=None)
    memory_mib: Range[int] | None = None
    total_memory_mib: Range[int] | None = None
    compute_capability: tuple[int, int] | None = None


class Requirements(BaseModel):
    """What a job needs from a machine.

    Attributes:
        cpus: how many CPUs.
        arch: `"x86"`, `"arm"`, or `None` for any.
        memory_mib: memory in MiB.
        disk_mib: disk in MiB.
        shm_mib: shared memory of the container in MiB; `None` for the engine's default.
        gpu: GPUs, or `None` when the job asks for none (a machine that has some still fits).
        spot_policy: spot, on-demand, or auto (either).
        max_price: USD per hour, inclusive; `None` for no limit.
        regions: acceptable regions; empty means all the configured ones.
        zones: acceptable zones; empty means all.
        instance_types: acceptable instance types; empty means all.
        container: the job runs a container image, so the machine needs a container engine.
        unset: names of the size fields (`"cpus"`, `"memory_mib"`, `"disk_mib"`) that hold a default
            rather than a person's wish. They size machines that are made to order; a backend that
            offers a machine which already exists gets them as "any".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    cpus: Range[int] = Range(min=0, max=None)
    arch: str | None = None
    memory_mib: Range[int] = Range(min=0, max=None)
    disk_mib: Range[int] = Range(min=0, max=None)
    shm_mib: int | None = None
    gpu: GpuRequirements | None = None
    spot_policy: SpotPolicy = SpotPolicy.AUTO
    max_price: float | None = None
    regions: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()
    instance_types: tuple[str, ...] = ()
    container: bool = False
    unset: frozenset[str] = frozenset()

    def for_existing_machine(self) -> Requirements:
        """The same requirements with every size the person did not set widened to "any"."""
        anything: Range[int] = Range(min=0, max=None)
        return self.model_copy(update={**dict.fromkeys(self.unset, anything), "unset": frozenset()})
