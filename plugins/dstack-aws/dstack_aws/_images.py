"""Which image a machine boots."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dstack_aws._account import Account
from dstack_aws._config import AwsConfig
from dstack_core.plugin import InvalidRequestError, MachineResources

_GOOD_FOR = 3600.0
"""Seconds for which the newest image is taken for the newest."""

_UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id"
"""Canonical's public parameter."""
_UBUNTU_ARCHS = {"x86": "amd64", "arm": "arm64"}

_DEEP_LEARNING_OWNER = "898082745236"
"""Amazon's own account for the Deep Learning images."""
_DEEP_LEARNING = {
    "x86": "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04) *",
    "arm": "Deep Learning ARM64 Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04) *",
}


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes:
        id: `ami-0abc`.
        root_device: the name under which its disk is attached.
        disk_gib: the least size of that disk.
    """

    id: str
    root_device: str
    disk_gib: int


class Images:
    """The images of all regions."""

    def __init__(self, account: Account, config: AwsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._account = account
        self._config = config
        self._clock = clock
        self._known: dict[tuple[str, str, bool], tuple[float, Image]] = {}

    def of(self, region: str, machine: MachineResources) -> Image:
        """The image for a machine: the configured one, else the newest that fits.

        Raises:
            InvalidRequestError: there is none.
            BackendError: it cannot be looked up.
        """
        with_gpus = any(gpu.vendor == "nvidia" for gpu in machine.gpus)
        key = (region, machine.arch, with_gpus)
        since, image = self._known.get(key, (float("-inf"), None))
        if image is None or self._clock() - since > _GOOD_FOR:
            image = self._find(region, machine.arch, with_gpus=with_gpus)
            self._known[key] = (self._clock(), image)
        return image

    def _find(self, region: str, arch: str, *, with_gpus: bool) -> Image:
        configured = self._config.image_in(region)
        if configured is not None:
            return self._described(region, ImageIds=[configured])
        if with_gpus:
            name = {"Name": "name", "Values": [_DEEP_LEARNING[arch]]}
            state = {"Name": "state", "Values": ["available"]}
            return self._described(region, Owners=[_DEEP_LEARNING_OWNER], Filters=[name, state])
        parameter = _UBUNTU.format(arch=_UBUNTU_ARCHS[arch])
        answer = self._account.call("ssm", "get_parameter", region, Name=parameter)
        return self._described(region, ImageIds=[answer["Parameter"]["Value"]])

    def _described(self, region: str, **wanted: Any) -> Image:
        images = self._account.call("ec2", "describe_images", region, **wanted)["Images"]
        if not images:
            raise InvalidRequestError(f"There is no image for {wanted} in {region}. Set `ami`.")
        newest = max(images, key=lambda image: image["CreationDate"])
        root = newest.get("RootDeviceName") or "/dev/sda1"
        sizes = [
            mapping["Ebs"].get("VolumeSize", 8)
            for mapping in newest.get("BlockDeviceMappings", ())
            if mapping.get("DeviceName") == root and "Ebs" in mapping
        ]
        return Image(newest["ImageId"], root, max(sizes, default=8))
