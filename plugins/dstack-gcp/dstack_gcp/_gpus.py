"""GPUs as users write them, from the names that Compute Engine has for them."""

from __future__ import annotations

import re

from dstack_core.plugin import Gpu

_GPUS: dict[str, tuple[str, int, tuple[int, int]]] = {
    "nvidia-tesla-k80": ("K80", 12, (3, 7)),
    "nvidia-tesla-p4": ("P4", 8, (6, 1)),
    "nvidia-tesla-p100": ("P100", 16, (6, 0)),
    "nvidia-tesla-v100": ("V100", 16, (7, 0)),
    "nvidia-tesla-t4": ("T4", 16, (7, 5)),
    "nvidia-tesla-a100": ("A100", 40, (8, 0)),
    "nvidia-a100-80gb": ("A100", 80, (8, 0)),
    "nvidia-l4": ("L4", 24, (8, 9)),
    "nvidia-h100-80gb": ("H100", 80, (9, 0)),
    "nvidia-h100-mega-80gb": ("H100", 80, (9, 0)),
    "nvidia-h200-141gb": ("H200", 141, (9, 0)),
    "nvidia-b200": ("B200", 180, (10, 0)),
    "nvidia-gb200": ("GB200", 186, (10, 0)),
    "nvidia-rtx-pro-6000": ("RTXPRO6000", 96, (12, 0)),
}
"""Name, memory in GiB, compute capability (NVIDIA, "CUDA GPUs")."""

ATTACHABLE: dict[str, dict[int, tuple[int, int]]] = {
    "nvidia-tesla-t4": {1: (48, 312), 2: (48, 312), 4: (96, 624)},
    "nvidia-tesla-v100": {1: (12, 78), 2: (24, 156), 4: (48, 312), 8: (96, 624)},
    "nvidia-tesla-p100": {1: (16, 104), 2: (32, 208), 4: (64, 208)},
    "nvidia-tesla-p4": {1: (24, 156), 2: (48, 312), 4: (96, 624)},
}
"""What an N1 machine may have: by number of GPUs, the most CPUs and GiB of memory ("GPU machine types")."""


def gpu(accelerator: str) -> Gpu | None:
    """One GPU; `None` for one that is not known, as the virtual workstations' and TPUs are not."""
    found = _GPUS.get(accelerator)
    return Gpu(found[0], found[1] * 1024, "nvidia", found[2]) if found else None


def quota_metric(accelerator: str) -> str:
    """The quota of a region under which it counts."""
    short = re.sub(r"^nvidia-(tesla-)?", "", accelerator).upper().replace("-", "_")
    return f"NVIDIA_{short}_GPUS"
