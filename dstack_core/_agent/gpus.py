"""What the GPUs of this machine are doing, as far as `nvidia-smi` says."""

from __future__ import annotations

import os

from .steps import Command, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

_FIELDS = "name,utilization.gpu,memory.used,memory.total"
_LIMIT = 10.0


def read_gpus(wanted: str | list[int] | None) -> Generator[Command, tuple[int, str], list[dict[str, Any]]]:
    """One dictionary for each GPU of the job; for each of the machine, if the job has no list of its own."""
    program = which("nvidia-smi")
    if program is None:
        return []
    names = (
        [str(index) for index in wanted] if isinstance(wanted, list) else os.environ.get("DSTACK_GPUS", "").split(",")
    )
    chosen = ["--id=" + ",".join(names)] if any(names) else []
    code, output = yield Command(
        [program, "--query-gpu=" + _FIELDS, "--format=csv,noheader,nounits", *chosen], limit=_LIMIT
    )
    return [_parse(line) for line in output.splitlines() if line.count(",") >= 3] if code == 0 else []


def _parse(line: str) -> dict[str, Any]:
    name, *numbers = line.rsplit(",", 3)
    utilization, used, total = map(_number, numbers)
    return {
        "name": name.strip(),
        "utilization_percent": utilization,
        "memory_used_mib": used,
        "memory_total_mib": total,
    }


def _number(text: str) -> float:
    """Zero where the driver says `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return 0.0
