"""Sizes, ranges and parts of a machine."""

from typing import Literal, assert_type

from dstack.api import CPU, GPU, Disk, Memory, Range, Resources


def short_forms() -> None:
    """Each field in each of its forms."""
    Resources(cpu=4, memory="16GB", gpu=1, shm_size="1GB", disk="100GB")
    Resources(cpu="2..8", memory="16GB..64GB", gpu="A100:2", disk="50GB..200GB")
    Resources(cpu="arm:8", gpu="24GB..")
    Resources(cpu=CPU(count=4, arch="x86"), gpu=GPU(name="A100", count=2), disk=Disk(size="1TB"))
    Resources(cpu=Range(min=2, max=8), gpu=Range(min=1), memory=Range(min="1GB", max="2GB"))
    Resources(cpu=None, memory=None, gpu=None, disk=None)


def read_back() -> None:
    """What a reader of a `Resources` gets, whichever way it was written."""
    resources = Resources(cpu=4, memory="16GB", gpu="A100:2", shm_size="1GB", disk="100GB")
    assert_type(resources.cpu, CPU | None)
    assert_type(resources.memory, Range[Memory] | None)
    assert_type(resources.gpu, GPU | None)
    assert_type(resources.shm_size, Memory | None)
    assert_type(resources.disk, Disk | None)
    if resources.gpu is not None:
        assert_type(resources.gpu.name, tuple[str, ...] | None)
        assert_type(resources.gpu.count, Range[int])
        assert_type(resources.gpu.memory, Range[Memory] | None)
        assert_type(resources.gpu.compute_capability, tuple[int, int] | None)
        assert_type(resources.gpu.vendor, Literal["nvidia", "amd", "google", "intel", "tenstorrent"] | None)


def gpus() -> None:
    """A GPU, field by field."""
    GPU(vendor="nvidia", name="A100", count=2, memory="80GB", total_memory="160GB", compute_capability=8.0)
    GPU(vendor="tpu", name=["V5LITEPOD-8"], count="1..4", compute_capability="7.5")
    GPU(compute_capability=(7, 5))
    assert_type(GPU.parse("A100:80GB:2"), GPU)
    assert_type(CPU.parse(4), CPU)


def sizes() -> None:
    """A size is a number of MiB."""
    size = Memory("24GB")
    assert_type(size, Memory)
    assert_type(size + 1, int)
    assert_type(Memory.from_mib(512), Memory)
    low_to_high = Range(min=1, max=4)
    assert_type(low_to_high, Range[int])
    assert_type(low_to_high.max, int | None)
    assert_type(2 in low_to_high, bool)
