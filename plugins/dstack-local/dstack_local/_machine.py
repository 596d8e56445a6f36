"""What this computer has."""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dstack_core.plugin import Gpu

_SIZES_SOLD = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 141, 180, 192, 288)
_MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True, slots=True)
class Machine:
    """Amounts in the units of the contract; `gpus` by the id that CUDA and container engines take."""

    cpus: float
    memory_mib: int
    memory_available_mib: int
    disk_free_mib: int
    gpus: dict[str, Gpu]
    arch: str


def look(disk: Path, gpus: dict[str, Gpu]) -> Machine:
    """This computer now, as far as this process may use it (affinity and control groups count)."""
    groups = _control_groups()
    total, available = _memory(groups)
    return Machine(
        cpus=_cpus(groups),
        memory_mib=total,
        memory_available_mib=available,
        disk_free_mib=shutil.disk_usage(disk).free >> 20,
        gpus=gpus,
        arch="arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86",
    )


def nvidia_gpus() -> dict[str, Gpu]:
    """The GPUs that nvidia-smi reports; empty without it or when its driver does not answer."""
    # Old drivers do not know compute_cap and refuse the whole query.
    for fields in ("index,uuid,name,memory.total,compute_cap", "index,uuid,name,memory.total"):
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        rows = csv.reader(answer.splitlines(), skipinitialspace=True)
        return dict(_gpu(*row) for row in rows if len(row) == fields.count(",") + 1 and row[3].isdigit())
    return {}


def _gpu(index: str, uuid: str, name: str, memory: str, capability: str = "") -> tuple[str, Gpu]:
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return uuid if uuid.startswith("GPU-") else index, Gpu(
        name=gpu_name(name),
        memory_mib=size_sold(int(memory)),
        compute_capability=(int(version[1]), int(version[2])) if version else None,
    )


def gpu_name(product: str) -> str:
    """The product's name as users write it: `"NVIDIA A100-SXM4-80GB"` is `"A100"`."""
    words = re.split(r"[\s-]+", product.upper())
    noise = r"NVIDIA|TESLA|QUADRO|GEFORCE|GPU|LAPTOP|GENERATION|PCIE|NVL|SXM\d?|HBM\d\w?|\d+GB"
    kept = [word for word in words if not re.fullmatch(noise, word)]
    if len(kept) > 1 and kept[0] == "RTX" and re.fullmatch(r"A\d{3,4}", kept[1]):
        kept = kept[1:]
    return "".join(kept) or product.upper()


def size_sold(mib: int) -> int:
    """The size a GPU is sold with: drivers report up to 8 % less (ECC, reserved), 23034 MiB for 24 GB."""
    return next((gb * 1024 for gb in _SIZES_SOLD if 0.92 * gb * 1024 <= mib <= gb * 1024), mib)


def _cpus(groups: list[Path]) -> float:
    try:
        count = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS
        count = float(os.cpu_count() or 1)
    for group in groups:
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit():
            count = min(count, int(quota) / int(period))
        quota = _read(group / "cpu.cfs_quota_us")
        if quota.isdigit():
            count = min(count, int(quota) / int(_read(group / "cpu.cfs_period_us")))
    return round(count, 2)


def _memory(groups: list[Path]) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(found[1]) * 1024 if found else total
    for group in groups:
        for limit_file, used_file in _MEMORY_FILES:
            limit, used = _read(group / limit_file), _read(group / used_file)
            if limit.isdigit() and int(limit) < total:
                total = int(limit)
            if limit.isdigit() and used.isdigit():
                available = min(available, max(0, int(limit) - int(used) + _cache(group)))
    return total >> 20, available >> 20


def _cache(group: Path) -> int:
    """File cache counts as used, but makes way when memory is wanted."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _control_groups() -> list[Path]:
    """This process's control groups and those around them, as far as they can be seen."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and not {"cpu", "memory"} & set(controllers.split(",")):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        group = root / path.strip("/")
        found += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
