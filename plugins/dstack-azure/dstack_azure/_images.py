"""Which image a machine boots."""

from __future__ import annotations

from typing import Any

from dstack_azure._config import AzureConfig
from dstack_core.plugin import MachineResources

_UBUNTU = "Canonical:ubuntu-24_04-lts:{sku}:latest"
_UBUNTU_SKUS = {("x86", 2): "server", ("x86", 1): "server-gen1", ("arm", 2): "server-arm64"}
_WITH_DRIVER = "microsoft-dsvm:ubuntu-hpc:{sku}:latest"
"""Microsoft's own Ubuntu, with the drivers of NVIDIA or AMD."""
_DRIVER_SKUS = {("nvidia", "x86"): "2204", ("nvidia", "arm"): "2404-arm64", ("amd", "x86"): "2204-rocm"}

PLAIN_DISK_GIB, DRIVER_DISK_GIB = 30, 64
"""The least sizes of the disks."""


def image_of(config: AzureConfig, machine: MachineResources, generation: int = 2) -> dict[str, Any]:
    """The reference to the image for a machine: the configured one, else the newest that fits.

    Args:
        config: may name one.
        machine: what it has to fit.
        generation: of its firmware, 1 or 2.
    """
    if config.image is not None:
        return _reference(config.image)
    if machine.gpus:
        return _reference(_WITH_DRIVER.format(sku=_DRIVER_SKUS[machine.gpus[0].vendor, machine.arch]))
    return _reference(_UBUNTU.format(sku=_UBUNTU_SKUS.get((machine.arch, generation), "server")))


def _reference(image: str) -> dict[str, Any]:
    lower = image.lower()
    if lower.startswith("/communitygalleries/"):
        return {"communityGalleryImageId": image}
    if lower.startswith("/sharedgalleries/"):
        return {"sharedGalleryImageId": image}
    if image.startswith("/"):
        return {"id": image}
    publisher, offer, sku, version = image.split(":")
    return {"publisher": publisher, "offer": offer, "sku": sku, "version": version}
