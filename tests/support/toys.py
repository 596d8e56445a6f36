"""Small plugins and backends that do what a test tells them, found through entry points as real ones are."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from uuid import UUID, uuid4

from pydantic import SecretStr

from dstack_core._backends import BackendEntry, BackendHub
from dstack_core.plugin import (
    BackendConfig,
    BackendInfo,
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    MachineResources,
    Offer,
    Requirements,
    hookimpl,
)

MACHINE = MachineResources(cpus=4, memory_mib=16 * 1024, disk_mib=100 * 1024)
OWNER = UUID("00000000-0000-7000-8000-000000000001")


class ToyConfig(BackendConfig):
    """A backend with a key of its own."""

    type: Literal["toy"] = "toy"
    regions: tuple[str, ...] = ()
    key: SecretStr | None = None


class OtherConfig(BackendConfig):
    """Another backend's."""

    type: Literal["other"] = "other"


@dataclass
class Point:
    """An entry point that loads an object, or does whatever `loads` does."""

    name: str
    plugin: object = None
    value: str = "toys:plugin"
    loads: Callable[[], Any] | None = None
    distribution: str | None = None

    @property
    def dist(self) -> importlib.metadata.Distribution | None:
        """A distribution of version 1.0 of the given name."""
        return _Dist(self.distribution) if self.distribution else None

    def load(self) -> Any:
        """Imports it, so to say."""
        return self.loads() if self.loads else self.plugin


class _Dist(importlib.metadata.Distribution):
    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        """The metadata alone."""
        return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: 1.0\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        """Nowhere."""
        return Path("/nowhere", path)


def info(name: str = "toy", **facts: Any) -> BackendInfo:
    """What a toy declares."""
    config: type[ToyConfig | OtherConfig] = ToyConfig if name == "toy" else OtherConfig
    defaults = {
        "title": name.title(),
        "config": config,
        "factory": "tests.support.toys:take",
        "default_config": config(),
    }
    return BackendInfo(**{"name": name, "offers_ttl": 0.0, "hook_timeout": 20.0, **defaults, **facts})


def plugin(*infos: BackendInfo, **attributes: Any) -> SimpleNamespace:
    """A module that registers these backends."""

    @hookimpl
    def dstack_register_backends() -> list[BackendInfo]:
        return list(infos)

    return SimpleNamespace(**{"dstack_register_backends": dstack_register_backends, **attributes})


prepared: dict[str, object] = {}
"""What the next call of the factory returns, or does if it is callable, by backend type."""


def take(config: BackendConfig) -> object:
    """The factory of all toys."""
    made = prepared[config.type]
    return made(config) if callable(made) else made


def hub_of(*points: Any, entries: tuple[BackendEntry, ...] = (), **options: Any) -> BackendHub:
    """A hub that finds exactly these."""
    return BackendHub.discover(entries, entry_points=lambda **_: points, **options)


def toy_hub(backend: object, **facts: Any) -> BackendHub:
    """A hub with one backend, `toy`."""
    prepared["toy"] = backend
    return hub_of(Point("toy", plugin(info(**facts)), distribution="dstack-toy"))


def offer(**facts: Any) -> Offer:
    """An offer of the toy."""
    return Offer(**{"backend": "toy", "instance_type": "t", "region": "r", "resources": MACHINE, "price": 1.0, **facts})


def request(**facts: Any) -> InstanceRequest:
    """A request for a toy's instance."""
    defaults = {"intent": uuid4(), "owner": OWNER, "name": "toy-1", "token": "0" * 64, "request_id": uuid4()}
    return InstanceRequest(**{**defaults, "offer": offer(), "tags": {}, **facts})


def instance(of: InstanceRequest | None = None, **facts: Any) -> Instance:
    """The instance of a request."""
    of = of or request()
    defaults = {"ref": InstanceRef(backend="toy", id="i-1", region="r"), "intent": of.intent, "owner": of.owner}
    return Instance(**{**defaults, "state": InstanceState.RUNNING, "created_at": datetime.now(UTC), **facts})


@dataclass(eq=True)
class Toy:
    """A backend whose answers are given; one that is callable is called. Equal to others and unhashable, on purpose."""

    offers: Any = field(default_factory=lambda: [offer()])
    created: Any = instance
    got: Any = None
    listed: Any = field(default_factory=list)
    terminated: Any = None
    problems: Any = ()
    connected: Any = None
    everybody: Any = field(default_factory=list)

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> Any:
        """As given."""
        return self.offers(requirements) if callable(self.offers) else self.offers

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Any:
        """As given."""
        return self.created(request) if callable(self.created) else self.created

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Any:
        """As given."""
        return self.got(ref) if callable(self.got) else self.got

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> Any:
        """As given."""
        return self.listed(owner) if callable(self.listed) else self.listed

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> Any:
        """As given."""
        return self.terminated(ref) if callable(self.terminated) else self.terminated


@dataclass(eq=True)
class ToyWithAll(Toy):
    """With the optional hooks, too."""

    @hookimpl
    def dstack_check_config(self) -> Any:
        """As given."""
        return self.problems() if callable(self.problems) else self.problems

    @hookimpl
    def dstack_connect(self, instance: Instance) -> Endpoint | Any:
        """As given."""
        return self.connected(instance) if callable(self.connected) else self.connected

    @hookimpl
    def dstack_list_all_instances(self) -> Any:
        """As given."""
        return self.everybody() if callable(self.everybody) else self.everybody


def raising(error: BaseException) -> Callable[..., Any]:
    """Something that raises when it is called."""

    def raises(*_: object, **__: object) -> Any:
        raise error

    return raises


def noting(notes: list[Any], answer: Any = None, note: Any = None) -> Callable[..., Any]:
    """Something that writes down what it was called with (or `note`), and returns an answer."""

    def answers(*arguments: Any) -> Any:
        notes.append(note if note is not None else arguments[0])
        return answer

    return answers


def install(site: Path, distribution: str, module: str, source: str, version: str = "1.0") -> None:
    """Puts a package into a directory as pip would: module, metadata and entry point."""
    (site / f"{module}.py").write_text(source)
    meta = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (meta / "entry_points.txt").write_text(f"[dstack.backends]\n{distribution.removeprefix('dstack-')} = {module}\n")
    sys.modules.pop(module, None)


def uninstall(site: Path, distribution: str, version: str = "1.0") -> None:
    """Takes it out again, as far as metadata goes."""
    shutil.rmtree(site / f"{distribution.replace('-', '_')}-{version}.dist-info")
