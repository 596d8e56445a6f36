"""GPUs by the name of the machine: Azure's catalogue tells how many there are, and not which.

Sources: "GPU accelerated compute" of Azure's list of sizes; NVIDIA, "CUDA GPUs: compute capability".
"""

from __future__ import annotations

import re

from dstack_core.plugin import Gpu

# The first that matches counts. Name, memory of each in MiB, vendor, compute capability.
_BY_SIZE: tuple[tuple[str, Gpu], ...] = (
    (r"Standard_NC\d+as_T4_v3", Gpu("T4", 16384, "nvidia", (7, 5))),
    (r"Standard_NC\d+ads_A100_v4", Gpu("A100", 81920, "nvidia", (8, 0))),
    (r"Standard_ND96amsr_A100_v4", Gpu("A100", 81920, "nvidia", (8, 0))),
    (r"Standard_ND96asr_(A100_)?v4", Gpu("A100", 40960, "nvidia", (8, 0))),
    (r"Standard_NCC?\d+adi?s_H100_v5", Gpu("H100", 96256, "nvidia", (9, 0))),
    (r"Standard_ND96is_(flex_)?H100_v5|Standard_ND96isrf?_H100_v5", Gpu("H100", 81920, "nvidia", (9, 0))),
    (r"Standard_ND96isrf?_H200_v5", Gpu("H200", 144384, "nvidia", (9, 0))),
    (r"Standard_ND\d+isr_(NDR_)?GB200_v6", Gpu("GB200", 190464, "nvidia", (10, 0))),
    (r"Standard_ND\d+isr_(NDR_)?GB300_v6", Gpu("GB300", 294912, "nvidia", (10, 3))),
    (r"Standard_ND96is(rf?)?_MI300X_v5", Gpu("MI300X", 196608, "amd")),
    (r"Standard_NC\d+r?s_v3", Gpu("V100", 16384, "nvidia", (7, 0))),
    (r"Standard_ND40rs_v2", Gpu("V100", 32768, "nvidia", (7, 0))),
    (r"Standard_NC\d+r?s_v2", Gpu("P100", 16384, "nvidia", (6, 0))),
    (r"Standard_NV\d+s_v3|Standard_NV(6|12|24)", Gpu("M60", 8192, "nvidia", (5, 2))),
    # Parts of an A10: six virtual CPUs go with a sixth of it.
    (r"Standard_NV6ads_A10_v5", Gpu("A10", 4096, "nvidia", (8, 6))),
    (r"Standard_NV12ads_A10_v5", Gpu("A10", 8192, "nvidia", (8, 6))),
    (r"Standard_NV18ads_A10_v5", Gpu("A10", 12288, "nvidia", (8, 6))),
    (r"Standard_NV\d+adm?s_A10_v5", Gpu("A10", 24576, "nvidia", (8, 6))),
)


def gpu_of(size: str) -> Gpu | None:
    """One GPU of a machine; `None` if it is not known, and then the machine is not offered.

    Args:
        size: the machine's name, as `Standard_NC4as_T4_v3`.
    """
    return next((gpu for pattern, gpu in _BY_SIZE if re.fullmatch(pattern, size)), None)
