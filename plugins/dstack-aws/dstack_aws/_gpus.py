"""GPUs as users write them, from the names that EC2 has for them."""

from __future__ import annotations

from dstack_core.plugin import Gpu

# NVIDIA, "CUDA GPUs: compute capability".
_CAPABILITIES = {
    "K80": (3, 7),
    "M60": (5, 2),
    "P100": (6, 0),
    "V100": (7, 0),
    "T4": (7, 5),
    "T4G": (7, 5),
    "A100": (8, 0),
    "A10G": (8, 6),
    "L4": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
    "RTXPRO6000": (12, 0),
    "RTXPRO4500": (12, 0),
}
_NAMES = {"RTX PRO SERVER 6000": "RTXPRO6000"}
_VENDORS = {"NVIDIA": "nvidia", "AMD": "amd", "HABANA": "intel", "INTEL": "intel"}


def gpu(name: str, memory_mib: int, maker: str) -> Gpu:
    """One GPU.

    Args:
        name: `A100`, `RTX PRO Server 6000`.
        memory_mib: memory.
        maker: `NVIDIA`, `AMD`, `Habana`.
    """
    upper = name.upper()
    short = _NAMES.get(upper, upper.replace(" ", ""))
    return Gpu(short, memory_mib, _VENDORS.get(maker.upper(), maker.lower()), _CAPABILITIES.get(short))


def known(name: str) -> bool:
    """Whether the compute capability of a NVIDIA GPU with this name of EC2's is known."""
    return gpu(name, 0, "NVIDIA").compute_capability is not None
