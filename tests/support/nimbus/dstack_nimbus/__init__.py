"""Nimbus as a backend of dstack-core."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from dstack_core.plugin import BackendConfig, BackendInfo, hookimpl


class NimbusConfig(BackendConfig):
    """An account of Nimbus.

    Attributes:
        url: where its API is.
        token: a token that may read and write servers.
        regions: where machines are started; all regions if not set.
    """

    type: Literal["nimbus"] = "nimbus"
    url: str
    token: SecretStr
    regions: tuple[str, ...] = ()


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend. What does the work is imported when it is first used."""
    return [
        BackendInfo(
            name="nimbus",
            title="Nimbus",
            config=NimbusConfig,
            factory="dstack_nimbus._backend:NimbusBackend",
            plugin_api=(1, 2),
            native_idempotency=True,
            boots_machines=True,
            visibility_window=10.0,
            hook_timeout=10.0,
        )
    ]
