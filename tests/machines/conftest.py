"""Machines for this room, and a cloud that has them."""

from __future__ import annotations

from tests.support.booting_cloud import cloud, cloud_home
from tests.support.machines import fleet, machine_key

__all__ = ["cloud", "cloud_home", "fleet", "machine_key"]
