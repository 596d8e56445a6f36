"""How much of this computer a job asks for, and whether that much is free. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from dstack_core.plugin import Availability, Gpu, MachineResources, Offer, Range, Requirements, fitting_gpus
from dstack_local._machine import Machine


@dataclass(frozen=True, slots=True)
class Reservation:
    """A part of the computer. `gpus` are names and sizes, `gpu_ids` the devices that were assigned for them."""

    cpus: float = 0
    memory_mib: int = 0
    disk_mib: int = 0
    gpus: tuple[tuple[str, int], ...] = ()
    gpu_ids: tuple[str, ...] = ()
    container: bool = False

    @property
    def holds_something(self) -> bool:
        """False for a job that asked for nothing in particular."""
        return bool(self.cpus or self.memory_mib or self.disk_mib or self.gpus)

    @classmethod
    def read(cls, text: str) -> Reservation:
        """From JSON; nothing at all from an empty text."""
        values = json.loads(text or "{}")
        gpus = tuple((name, size) for name, size in values.pop("gpus", ()))
        return cls(gpus=gpus, gpu_ids=tuple(values.pop("gpu_ids", ())), **values)

    def as_json(self) -> dict[str, object]:
        """What `read` reads."""
        return asdict(self)

    def assigned(self, left: Machine) -> Reservation:
        """With a free device for each GPU. `refusal` said that there are enough."""
        devices = dict(left.gpus)
        chosen = []
        for wanted in self.gpus:
            device = next(key for key, gpu in devices.items() if (gpu.name, gpu.memory_mib) == wanted)
            del devices[device]
            chosen.append(device)
        return replace(self, gpu_ids=tuple(chosen))


def free(machine: Machine, reserved: Iterable[Reservation]) -> Machine:
    """What is left of the computer beside the reservations, and beside what other programs use now."""
    cpus, memory, disk, gpus = machine.cpus, machine.memory_mib, machine.disk_free_mib, dict(machine.gpus)
    for part in reserved:
        cpus -= part.cpus
        memory -= part.memory_mib
        disk -= part.disk_mib
        for device in part.gpu_ids:
            gpus.pop(device, None)
    return replace(
        machine,
        cpus=max(0.0, round(cpus, 2)),
        memory_mib=max(0, min(memory, machine.memory_available_mib)),
        disk_free_mib=max(0, disk),
        gpus=gpus,
    )


def refusal(wanted: Reservation, left: Machine) -> str | None:
    """What there is too little of, in words; `None` when the reservation fits."""
    lacking = [
        f"{asked:g} {unit} asked for, {there:g} free"
        for asked, there, unit in (
            (wanted.cpus, left.cpus, "CPUs"),
            (wanted.memory_mib, left.memory_mib, "MiB of memory"),
            (wanted.disk_mib, left.disk_free_mib, "MiB of disk"),
        )
        if asked > there
    ]
    there = [(gpu.name, gpu.memory_mib) for gpu in left.gpus.values()]
    lacking += [
        f"{wanted.gpus.count(gpu)} x {gpu[0]} asked for, {there.count(gpu)} free"
        for gpu in dict.fromkeys(wanted.gpus)
        if wanted.gpus.count(gpu) > there.count(gpu)
    ]
    return "; ".join(lacking) or None


def ask(requirements: Requirements, machine: Machine) -> Reservation:
    """The least that satisfies the requirements. GPUs that the machine does not have are left out."""
    return Reservation(
        cpus=requirements.cpus.min or 0,
        memory_mib=requirements.memory_mib.min or 0,
        disk_mib=requirements.disk_mib.min or 0,
        gpus=tuple((gpu.name, gpu.memory_mib) for gpu in _gpus(requirements, machine)),
        container=requirements.container,
    )


def render(
    wanted: Reservation, requirements: Requirements, machine: Machine, reserved: list[Reservation], problem: str | None
) -> Offer:
    """The offer: what is free, no more than the requirements accept; or all there is, marked, when it is in use."""
    shown = free(machine, reserved)
    lacking = refusal(wanted, shown)
    if lacking and refusal(wanted, machine) is None:
        shown = machine
        problem = problem or f"This computer is in use: {lacking}. Wait for another run to end, or stop one."
    return Offer(
        backend="local",
        instance_type="local",
        region="local",
        resources=_resources(requirements, shown),
        price=0.0,
        availability=Availability.NO_CAPACITY if problem else Availability.AVAILABLE,
        reason=problem,
        data=json.dumps(wanted.as_json()),
    )


def _resources(requirements: Requirements, shown: Machine) -> MachineResources:
    # All of them when they are not what is wanted, so that a refusal can say what there is.
    gpus = _gpus(requirements, shown) or list(shown.gpus.values()) if requirements.gpu is not None else []
    return MachineResources(
        cpus=_at_most(requirements.cpus, shown.cpus),
        memory_mib=int(_at_most(requirements.memory_mib, shown.memory_mib)),
        disk_mib=int(_at_most(requirements.disk_mib, shown.disk_free_mib)),
        gpus=tuple(gpus),
        arch=shown.arch,
    )


def _at_most(accepted: Range[int], there: float) -> float:
    return there if accepted.max is None else min(there, accepted.max)


def _gpus(requirements: Requirements, machine: Machine) -> list[Gpu]:
    """As few GPUs as the requirements accept, of one kind if one kind has enough, the smallest kind first."""
    if requirements.gpu is None:
        return []
    fitting = sorted(fitting_gpus(requirements.gpu, list(machine.gpus.values())), key=lambda gpu: gpu.memory_mib)
    kinds = [[gpu for gpu in fitting if gpu == kind] for kind in dict.fromkeys(fitting)]
    for pool in (*kinds, fitting):
        total = requirements.gpu.total_memory_mib
        for count in range(requirements.gpu.count.min or 0, len(pool) + 1):
            if total is None or sum(gpu.memory_mib for gpu in pool[:count]) >= (total.min or 0):
                return pool[:count]
    return []
