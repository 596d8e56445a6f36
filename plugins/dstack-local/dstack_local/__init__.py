"""This computer as a backend: its instances are directories, each with an agent that runs one job."""

from __future__ import annotations

from typing import Literal

from dstack_core.plugin import BackendConfig, BackendInfo, hookimpl


class LocalConfig(BackendConfig):
    """Nothing to configure: what the computer has is found out."""

    type: Literal["local"] = "local"


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend, configured without configuration."""
    return [
        BackendInfo(
            name="local",
            title="This computer",
            config=LocalConfig,
            factory="dstack_local._backend:LocalBackend",
            default_config=LocalConfig(),
            native_idempotency=True,
            visibility_window=0,
            provisioning_timeout=60,
            offers_ttl=0,
            existing_machines=True,
            max_concurrency=32,
        )
    ]
