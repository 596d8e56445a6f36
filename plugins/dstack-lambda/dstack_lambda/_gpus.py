"""GPUs as users write them, from the words that Lambda has for them."""

from __future__ import annotations

import re

from dstack_core.plugin import Gpu

# NVIDIA, "CUDA GPUs: compute capability".
_CAPABILITIES = {
    "V100": (7, 0),
    "RTX6000": (7, 5),
    "A100": (8, 0),
    "A10": (8, 6),
    "A6000": (8, 6),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
}
_SAID = re.compile(r"(?:NVIDIA |Tesla |Quadro )*(?P<name>.+?) \((?P<gib>\d+) ?GB\b.*\)")
_WITH_ARM = ("GH200", "GB200", "GB300")


def gpu(description: str) -> Gpu | None:
    """One GPU; `None` if the words say no memory.

    Args:
        description: `A100 (40 GB SXM4)`, `Quadro RTX 6000 (24 GB)`.
    """
    said = _SAID.fullmatch(description.strip())
    if said is None:
        return None
    name = said["name"].upper().replace(" ", "")
    return Gpu(name, int(said["gib"]) * 1024, "nvidia", _CAPABILITIES.get(name))


def arch(one: Gpu | None) -> str:
    """The processors that go with it."""
    return "arm" if one is not None and one.name in _WITH_ARM else "x86"


def known(description: str) -> bool:
    """Whether the compute capability of a GPU with these words is known."""
    one = gpu(description)
    return one is not None and one.compute_capability is not None
