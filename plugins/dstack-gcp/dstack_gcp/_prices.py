"""The price list: what a core, a GiB of memory, a GPU, a disk and an address cost, by region.

The Cloud Billing catalogue has no machines, only their parts, which are told apart by their English descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

COMPUTE = "services/6F81-5844-456A"
"""Compute Engine, in the catalogue."""
HOURS_PER_MONTH = 730.0

FAMILIES = {
    "e2": ("E2 Instance", True),
    "n1": ("N1 Predefined Instance", True),
    "n2": ("N2 Instance", True),
    "n2d": ("N2D AMD Instance", True),
    "t2d": ("T2D AMD Instance", True),
    "t2a": ("T2A Arm Instance", True),
    "c2": ("Compute optimized", False),
    "c2d": ("C2D AMD Instance", True),
    "c3": ("C3 Instance", True),
    "c3d": ("C3D Instance", True),
    "a2": ("A2 Instance", True),
    "a3": ("A3 Instance", True),
    "g2": ("G2 Instance", True),
}
"""What the descriptions of a family's cores and memory begin with."""

_GPUS = {
    "nvidia-tesla-t4": "Nvidia Tesla T4 GPU",
    "nvidia-tesla-v100": "Nvidia Tesla V100 GPU",
    "nvidia-tesla-p100": "Nvidia Tesla P100 GPU",
    "nvidia-tesla-p4": "Nvidia Tesla P4 GPU",
    "nvidia-tesla-a100": "Nvidia Tesla A100 GPU",
    "nvidia-a100-80gb": "Nvidia Tesla A100 80GB GPU",
    "nvidia-l4": "Nvidia L4 GPU",
    "nvidia-h100-80gb": "Nvidia H100 80GB GPU",
}
_SPOT = r"(?:Spot )?Preemptible "
_DISK, _ADDRESS, _SCRATCH = "disk", "address", "scratch"


def _patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    for family, (words, _) in FAMILIES.items():
        for part, name in (("core", "Core"), ("ram", "Ram")):
            yield f"{family}.{part}", re.compile(rf"^{re.escape(words)} {name} running in ")
            yield f"{family}.{part}.spot", re.compile(rf"^{_SPOT}{re.escape(words)} {name} running in ")
    for accelerator, words in _GPUS.items():
        yield accelerator, re.compile(rf"^{re.escape(words)} running in ")
        yield f"{accelerator}.spot", re.compile(rf"^{re.escape(words)} attached to {_SPOT}VMs running in ")
    yield _DISK, re.compile(r"^Balanced PD Capacity(?: in .+)?$")
    yield _SCRATCH, re.compile(r"^SSD backed Local Storage(?: in .+)?$")
    yield f"{_SCRATCH}.spot", re.compile(rf"^SSD backed Local Storage attached to {_SPOT}VMs(?: in .+)?$")
    yield _ADDRESS, re.compile(r"^External IP Charge on a Standard VM")
    yield f"{_ADDRESS}.spot", re.compile(r"^External IP Charge on a (?:Spot )?Preemptible VM")


_PATTERNS = tuple(_patterns())
_WORTH_A_LOOK = re.compile(r" (?:Core|Ram|GPU|VMs) running in |^Balanced PD|^SSD backed Local|^External IP")
"""Of tens of thousands of prices most can be told at a glance to be others'."""


@dataclass(frozen=True)
class Prices:
    """Prices of parts.

    Attributes:
        by_region: USD per hour for each part; disks per GiB and month. What is the same everywhere is under `global`.
    """

    by_region: dict[str, dict[str, float]]

    def of(self, region: str, part: str, *, spot: bool) -> float | None:
        """The price of a part; on demand where there is no other for spot."""
        here, everywhere = self.by_region.get(region, {}), self.by_region.get("global", {})
        for name in ([f"{part}.spot"] if spot else []) + ([part] if not spot or part in _SAME else []):
            if name in here or name in everywhere:
                return here.get(name, everywhere.get(name))
        return None


_SAME = (_DISK, _ADDRESS, _SCRATCH)
"""What has no price of its own for spot, or not everywhere."""


def prices_of(skus: Iterable[Any]) -> Prices:
    """From the catalogue: on demand and spot, without commitments, reservations, sole tenants and custom machines."""
    found: dict[str, dict[str, float]] = {}
    for sku in skus:
        if sku.category.usage_type not in ("OnDemand", "Preemptible"):
            continue
        part = _part_of(sku.description)
        price = _price(sku) if part else None
        if part is None or price is None or part.endswith(".spot") != (sku.category.usage_type == "Preemptible"):
            continue
        for region in sku.service_regions:
            known = found.setdefault(region, {})
            # Of two prices of one thing the dearer one: nobody pays more than was said.
            known[part] = max(price, known.get(part, 0.0))
    return Prices(found)


def _part_of(description: str) -> str | None:
    """What a price is for; `None` for all that no machine of ours has."""
    if not _WORTH_A_LOOK.search(description):
        return None
    return next((name for name, pattern in _PATTERNS if pattern.match(description)), None)


def _price(sku: Any) -> float | None:
    """USD for one unit, from the first one on that costs something: there may be some free of charge."""
    for info in reversed(sku.pricing_info):
        rates = [rate.unit_price.units + rate.unit_price.nanos / 1e9 for rate in info.pricing_expression.tiered_rates]
        paid = [rate for rate in rates if rate > 0]
        if paid:
            return float(paid[0])
    return None


def machine_price(
    prices: Prices,
    region: str,
    family: str,
    cores: float,
    memory_gib: float,
    gpus: tuple[tuple[str, int], ...],
    scratch_gib: float,
    *,
    spot: bool,
) -> float | None:
    """USD per hour of a machine, the sum of its parts; `None` if one of them has no price here."""
    parts = [
        (f"{family}.core", cores),
        (f"{family}.ram", memory_gib),
        *gpus,
        *([(_SCRATCH, scratch_gib / HOURS_PER_MONTH)] if scratch_gib else []),
    ]
    found = [(prices.of(region, part, spot=spot), amount) for part, amount in parts]
    known = [price * amount for price, amount in found if price is not None]
    return sum(known) if len(known) == len(found) else None


def extra_price(prices: Prices, region: str, disk_gib: float, *, public: bool, spot: bool) -> float:
    """USD per hour of a disk and a public address."""
    disk = (prices.of(region, _DISK, spot=False) or 0.0) * disk_gib / HOURS_PER_MONTH
    return disk + ((prices.of(region, _ADDRESS, spot=spot) or 0.0) if public else 0.0)
