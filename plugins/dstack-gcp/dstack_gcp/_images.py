"""Which image a machine boots."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dstack_core.plugin import MachineResources
from dstack_gcp._account import Account
from dstack_gcp._config import GcpConfig

_GOOD_FOR = 3600.0
"""Seconds for which the newest image is taken for the newest."""

_UBUNTU = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-{arch}"
_UBUNTU_ARCHS = {"x86": "amd64", "arm": "arm64"}
_DEEP_LEARNING = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580"
"""With NVIDIA's driver, Docker, and the container toolkit."""


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes:
        path: `projects/P/global/images/NAME`.
        disk_gib: the least size of its disk.
    """

    path: str
    disk_gib: int


class Images:
    """The images, looked up once an hour."""

    def __init__(self, account: Account, config: GcpConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._account = account
        self._config = config
        self._clock = clock
        self._known: dict[str, tuple[float, Image]] = {}

    def of(self, machine: MachineResources) -> Image:
        """The image for a machine: the configured one, else the newest that fits.

        Raises:
            InvalidRequestError: there is none.
            BackendError: it cannot be looked up.
        """
        wanted = self._config.image or (
            _DEEP_LEARNING if machine.gpus else _UBUNTU.format(arch=_UBUNTU_ARCHS[machine.arch])
        )
        since, image = self._known.get(wanted, (float("-inf"), None))
        if image is None or self._clock() - since > _GOOD_FOR:
            image = self._find(wanted)
            self._known[wanted] = (self._clock(), image)
        return image

    def _find(self, wanted: str) -> Image:
        parts = wanted.split("/")
        project, name = parts[1], parts[-1]
        if "family" in parts:
            found = self._account.call("images", "get_from_family", wanted, project=project, family=name)
        else:
            found = self._account.call("images", "get", wanted, project=project, image=name)
        return Image(f"projects/{project}/global/images/{found.name}", int(found.disk_size_gb))
