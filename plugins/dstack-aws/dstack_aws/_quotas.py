"""Which quota of virtual CPUs an instance type counts under.

Codes: Service Quotas, service `ec2`, "Running On-Demand ... instances" and "All ... Spot Instance Requests".
"""

from __future__ import annotations

import re

_STANDARD = ("L-1216C47A", "L-34B43A08")
_BY_FAMILY = {
    "dl": ("L-6E869C2A", "L-85EED4F7"),
    "f": ("L-74FC7D96", "L-88CF9481"),
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "vt": ("L-DB2E81BA", "L-3819A6DF"),
    "inf": ("L-1945791B", "L-B5D1601B"),
    "p": ("L-417A185B", "L-7212CCBC"),
    "p5": ("L-417A185B", "L-C4BD4855"),
    "trn": ("L-2C3B7624", "L-6B0D517C"),
    "u": ("L-43DA4232", None),
    "x": ("L-7295265B", "L-E3A00192"),
}
"""On demand, spot; the most exact name of a family counts. All others are standard."""


def quota_of(instance_type: str, *, spot: bool) -> str | None:
    """The code of the quota; `None` where there is none of its own."""
    family = instance_type.partition(".")[0]
    letters = re.match(r"[a-z]+", family)
    name = letters.group() if letters else family
    generation = re.match(r"[a-z]+\d+", family)
    codes = _BY_FAMILY.get(generation.group() if generation else "") or _BY_FAMILY.get(name) or _STANDARD
    return codes[1] if spot else codes[0]
