"""The entry points of the mutants: `tests.mutants.plugins:NAME` registers the mutant of that name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from pydantic import ConfigDict, SecretStr

from dstack_core.plugin import BackendConfig, BackendInfo, hookimpl


class Config(BackendConfig):
    """As the reference backend's."""

    type: Literal["nimbus"] = "nimbus"
    url: str
    token: SecretStr
    regions: tuple[str, ...] = ()


class OpenConfig(BackendConfig):
    """A token that everybody can read."""

    type: Literal["nimbus"] = "nimbus"
    url: str
    token: str
    regions: tuple[str, ...] = ()


class LooseConfig(Config):
    """Anything may be written into it."""

    model_config = ConfigDict(extra="allow")


FACTS: dict[str, dict[str, Any]] = {
    "TokenInTheOpen": {"config": OpenConfig},
    "AcceptsAnyKey": {"config": LooseConfig},
    "WrittenForAnotherApi": {"plugin_api": (2, 0)},
    "BlocksForAMinute": {"hook_timeout": 2.0},
    "NeverReachable": {"hook_timeout": 2.0},
    "LeavesThePending": {"hook_timeout": 2.0},
    "ListsOneRegion": {"hook_timeout": 5.0},
    "ListsConfiguredRegions": {"hook_timeout": 5.0},
    "ListsOnePage": {"hook_timeout": 5.0},
    "NeverGivesUp": {"hook_timeout": 3.0},
    "Nameless": {"title": ""},
    "LooksFirst": {"native_idempotency": False},
}
"""What a mutant declares that differs from the reference backend."""


def info(name: str) -> BackendInfo:
    """What a mutant declares."""
    facts = {
        "config": Config,
        "hook_timeout": 10.0,
        "title": "Nimbus",
        "native_idempotency": True,
        **FACTS.get(name, {}),
    }
    return BackendInfo(
        name="nimbus",
        factory=f"tests.mutants.backends:{name}",
        visibility_window=10.0,
        **facts,
    )


def __getattr__(name: str) -> SimpleNamespace:
    """What the entry point of a mutant leads to."""
    if not name[:1].isupper():
        raise AttributeError(name)

    @hookimpl
    def dstack_register_backends() -> list[BackendInfo]:
        return [info(name)]

    return SimpleNamespace(dstack_register_backends=dstack_register_backends)
