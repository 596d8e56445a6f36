"""What a plugin returned, held against the contract. Each check returns its argument, or raises `Broken`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from uuid import UUID

from dstack_core._hookspecs import BACKEND_NAME, BACKEND_NAME_LENGTH, PLUGIN_API, BackendConfig, BackendInfo
from dstack_core._models.instances import Endpoint, Instance, InstanceRef, InstanceRequest
from dstack_core._models.offers import MachineResources, Offer

T = TypeVar("T")


class Broken(Exception):
    """The contract was broken; the message says how, in one sentence."""


def offers(backend: str) -> Callable[[object], list[Offer]]:
    """Offers of this backend, with prices that are prices."""

    def check(result: object) -> list[Offer]:
        found = _items(result, Offer)
        for offer in found:
            if offer.backend != backend:
                raise Broken(f"returned an offer of the backend {offer.backend!r}")
            # Written so that NaN fails, too.
            if not 0 <= offer.price < float("inf"):
                raise Broken(f"returned {offer.instance_type!r} with the price {offer.price!r}; it must be 0 or more")
            if not isinstance(offer.resources, MachineResources):
                raise Broken(f"returned {offer.instance_type!r} with resources that are no MachineResources")
        return found

    return check


def created(backend: str, request: InstanceRequest) -> Callable[[object], Instance]:
    """The instance of this very request."""

    def check(result: object) -> Instance:
        instance = _instance(backend, _a(Instance, result))
        if instance.intent != request.intent:
            raise Broken(f"was asked for intent {request.intent} and returned an instance of {instance.intent}")
        if instance.owner != request.owner:
            raise Broken(f"was asked for owner {request.owner} and returned an instance of {instance.owner}")
        return instance

    return check


def found(ref: InstanceRef) -> Callable[[object], Instance | None]:
    """The instance that was asked for, or `None`."""

    def check(result: object) -> Instance | None:
        if result is None:
            return None
        instance = _instance(ref.backend, _a(Instance, result))
        if instance.ref.id != ref.id:
            raise Broken(f"was asked for instance {ref.id!r} and returned {instance.ref.id!r}")
        return instance

    return check


def owned(backend: str, owner: UUID) -> Callable[[object], list[Instance]]:
    """Instances of this owner alone."""

    def check(result: object) -> list[Instance]:
        instances = _items(result, Instance)
        for instance in instances:
            _instance(backend, instance)
            if instance.owner != owner:
                raise Broken(f"was asked for owner {owner} and returned {instance.ref.id!r} of {instance.owner}")
        return instances

    return check


def whoever_s(backend: str) -> Callable[[object], list[Instance]]:
    """Instances of any owner."""
    return lambda result: [_instance(backend, instance) for instance in _items(result, Instance)]


def endpoint(result: object) -> Endpoint | None:
    """An endpoint, or `None` when there is none yet."""
    return None if result is None else _a(Endpoint, result)


def text(result: object) -> str | None:
    """A text, or `None` when there is none."""
    return None if result is None else _a(str, result)


def sentences(result: object) -> list[str]:
    """Problems in words."""
    if isinstance(result, str):
        raise Broken("returned one text instead of a list of texts")
    return _items(result, str)


def anything(result: object) -> None:
    """For hooks whose result means nothing."""


def infos(result: object) -> list[BackendInfo]:
    """What `dstack_register_backends` may return."""
    checked = _items(result, BackendInfo)
    for info in checked:
        _info(info)
    return checked


def other_api(version: object) -> str | None:
    """Why a plugin written for that version of the hook specification cannot be used; `None` if it can."""
    if not (isinstance(version, tuple) and len(version) == 2 and all(isinstance(part, int) for part in version)):
        return f"its plugin API version is {version!r}; it must be a pair, as (1, 0)"
    if version[0] == PLUGIN_API[0]:
        return None
    ours, theirs = (".".join(map(str, pair)) for pair in (PLUGIN_API, version))
    cure = "upgrade dstack-core" if version[0] > PLUGIN_API[0] else "upgrade the plugin"
    return f"it is written for plugin API {theirs}, and this dstack-core speaks {ours}: {cure}"


def _info(info: BackendInfo) -> None:
    if not re.fullmatch(BACKEND_NAME, info.name) or len(info.name) > BACKEND_NAME_LENGTH:
        raise Broken(
            f"declares a backend named {info.name!r}; names are at most {BACKEND_NAME_LENGTH} lower-case letters, "
            "digits and dashes"
        )
    config: object = info.config
    if not (isinstance(config, type) and issubclass(config, BackendConfig)):
        raise Broken(f"declares the backend '{info.name}' with a config that is no subclass of BackendConfig")
    if info.config.model_fields["type"].default != info.name:
        raise Broken(
            f"declares the backend '{info.name}' with a config whose `type` is not the same: "
            f'write `type: Literal["{info.name}"] = "{info.name}"`'
        )
    if not re.fullmatch(r"[\w.]+:[\w.]+", info.factory):
        raise Broken(f"declares the factory {info.factory!r}; write 'module:callable'")
    if info.default_config is not None and not isinstance(info.default_config, info.config):
        raise Broken(f"declares a default_config of '{info.name}' that is no {info.config.__name__}")
    if info.max_concurrency < 1 or info.hook_timeout <= 0:
        raise Broken(f"declares '{info.name}' with a max_concurrency or hook_timeout that allows no call at all")


def _instance(backend: str, instance: Instance) -> Instance:
    if instance.ref.backend != backend:
        raise Broken(f"returned an instance of the backend {instance.ref.backend!r}")
    if instance.created_at.utcoffset() is None:
        raise Broken("returned an instance whose created_at has no time zone")
    return instance


def _items(result: object, kind: type[T]) -> list[T]:
    if not isinstance(result, Iterable):
        raise Broken(f"returned {_type(result)} instead of a list of {kind.__name__}")
    items: Sequence[Any] = result if isinstance(result, list) else list(result)
    for item in items:
        if not isinstance(item, kind):
            raise Broken(f"returned a list with {_type(item)} in it instead of {kind.__name__}")
    return list(items)


def _a(kind: type[T], result: object) -> T:
    if not isinstance(result, kind):
        raise Broken(f"returned {_type(result)} instead of {kind.__name__}")
    return result


def _type(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
