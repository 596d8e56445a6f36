"""What every long enough row of seeds must have reached: each kind of fault, and each way out of it."""

from __future__ import annotations

from collections import Counter

SOMETIMES = (
    "a server was killed",
    "a server was stopped",
    "a server was frozen for 90 s",
    "a server was cut off from all agents",
    "the database was away",
    "the connection to the database was lost before commit",
    "the connection to the database was lost after commit",
    "a hook was slow",
    "a request to the cloud arrived twice",
    "a machine hung for ever",
    "a machine lost its network",
    "a spot instance got its notice",
    "an instance was killed silently",
)


def missing(seen: Counter[str]) -> list[str]:
    """What was not reached."""
    return [name for name in SOMETIMES if not seen[name]]
