"""Machines for this room."""

from __future__ import annotations

from tests.support.machines import fleet, machine_key

__all__ = ["fleet", "machine_key"]
