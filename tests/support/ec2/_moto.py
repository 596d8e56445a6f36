"""moto, with what this needs of it changed. Its insides are private, so it is pinned to one version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tests.support.ec2._wares import REGIONS, WARES, ZONES

ACCOUNT = "123456789012"
UBUNTU, DEEP_LEARNING = "Ubuntu 24.04", "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04) 20261101"
_SETTINGS = {
    "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
}


class Moto:
    """The state of one EC2, and the application that answers for it."""

    def __init__(self, born: Callable[[], float]) -> None:
        self._born = born
        self.ended: dict[str, str] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Changes moto's insides, from an empty account on; and changes them back."""
        before = {name: os.environ.get(name) for name in _SETTINGS}
        os.environ.update(_SETTINGS)
        try:
            with _quick_tags(), _changed(self._born):
                reset()
                self._register_images()
                yield
        finally:
            reset()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def region(self, name: str) -> Any:
        """What there is in a region."""
        from moto.ec2.models import ec2_backends

        return ec2_backends[ACCOUNT][name]

    def instances(self) -> Iterator[tuple[str, Any]]:
        """All instances, with their region."""
        for name in REGIONS:
            for reservation in list(self.region(name).reservations.values()):
                for instance in reservation.instances:
                    yield name, instance

    def leftovers(self) -> Iterator[str]:
        """Disks and interfaces whose instance is gone."""
        for name in REGIONS:
            backend = self.region(name)
            for volume in backend.volumes.values():
                if volume.status == "available":
                    yield f"volume {volume.id} in {name}"
            for interface in backend.enis.values():
                if interface.instance is None or interface.instance.state == "terminated":
                    yield f"interface {interface.id} in {name}"

    def image(self, region: str, title: str, arch: str) -> str:
        """The id of an image."""
        return next(
            str(image.id)
            for image in self.region(region).amis.values()
            if image.name == title and image.architecture == arch
        )

    def _register_images(self) -> None:
        for name in REGIONS:
            for arch in ("x86_64", "arm64"):
                for title in (
                    UBUNTU,
                    DEEP_LEARNING if arch == "x86_64" else DEEP_LEARNING.replace("Base", "ARM64 Base", 1),
                ):
                    image = self.region(name).register_image(title, "")
                    image.architecture = arch
                    image.owner_id = "898082745236" if "Deep" in title else "099720109477"


@cache
def app() -> Any:
    """What answers requests. Made once in a process: that takes seconds, and all state is elsewhere."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    return DomainDispatcherApplication(create_backend_app)


def reset() -> None:
    """An empty account."""
    from moto.ec2.models import ec2_backends
    from moto.iam.models import iam_backends

    for backends in (ec2_backends, iam_backends):
        backends.reset()


@contextmanager
def _quick_tags() -> Iterator[None]:
    """Tags of a resource are looked up by its id. moto searches those of all, which takes minutes with many servers."""
    from moto.ec2.models.core import TaggedEC2Resource as Tagged

    search = Tagged.get_tags

    def own_tags(self: Any) -> list[dict[str, str]]:
        found = self.ec2_backend.tags.get(self.id, {})
        return [{"resource_id": self.id, "key": key, "value": value} for key, value in found.items()]

    Tagged.get_tags = own_tags  # type: ignore[method-assign]  # that is the point
    try:
        yield
    finally:
        Tagged.get_tags = search  # type: ignore[method-assign]  # as before


@contextmanager
def _changed(born: Callable[[], float]) -> Iterator[None]:
    from moto.ec2.models import instance_types, instances
    from moto.ec2.utils import filter_dict_attribute_mapping as filters

    plain = instances.Instance

    class Machine(plain):  # type: ignore[misc, valid-type]  # moto's own class
        """An instance that takes its time to boot, and remembers what it was born with."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._state = instances.InstanceState("pending", 0)
            self.born = born()
            self.born_with: dict[str, str] = {}
            self.address: str | None = None

        @property
        def public_ip(self) -> str | None:
            """That of its machine, if it has one."""
            return self.address or super().public_ip

        @property
        def public_ip_address(self) -> str | None:
            """The same."""
            return self.public_ip

        def terminate(self) -> Any:
            """Once is enough: its interface is gone by the second time."""
            return instances.InstanceState("terminated", 48) if self.state == "terminated" else super().terminate()

        def add_tags(self, tags: dict[str, str]) -> None:
            """The first ones are those of the call that made it."""
            super().add_tags(tags)
            if "born" in self.__dict__ and not self.born_with:
                self.born_with = dict(tags)

    types = dict(instance_types.INSTANCE_TYPES)
    sold = {kind: dict(places) for kind, places in instance_types.INSTANCE_TYPE_OFFERINGS.items()}
    instances.Instance = Machine  # type: ignore[misc]  # that is the point
    filters.update({"client-token": "client_token", "instance-lifecycle": "lifecycle"})
    catalogue = instance_types.InstanceTypeBackend
    shown = catalogue.instance_types
    # All 1,395 take seconds to put into words.
    catalogue.instance_types = [one for one in shown if one["InstanceType"] in WARES]
    _replace(instance_types.INSTANCE_TYPES, {name: types[name] for name in WARES})
    for kind in ("region", "availability-zone"):
        _replace(instance_types.INSTANCE_TYPE_OFFERINGS[kind], {region: _sold(kind, region) for region in REGIONS})
    try:
        yield
    finally:
        instances.Instance = plain  # type: ignore[misc]  # as before
        catalogue.instance_types = shown
        for name in ("client-token", "instance-lifecycle"):
            filters.pop(name, None)
        _replace(instance_types.INSTANCE_TYPES, types)
        for kind, places in sold.items():
            _replace(instance_types.INSTANCE_TYPE_OFFERINGS[kind], places)


def _replace(table: dict[str, Any], values: dict[str, Any]) -> None:
    table.clear()
    table.update(values)


def _sold(kind: str, region: str) -> list[dict[str, str]]:
    found = [(name, region) for name in WARES]
    if kind == "availability-zone":
        found = [(name, region + letter) for name, ware in WARES.items() for letter in ware.zones if letter in ZONES]
    return [{"InstanceType": name, "Location": place, "LocationType": kind} for name, place in found]
