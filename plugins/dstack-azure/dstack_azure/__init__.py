"""Microsoft Azure as a backend of dstack-core."""

from __future__ import annotations

from dstack_azure._config import AzureConfig
from dstack_core.plugin import BackendInfo, hookimpl

__all__ = ["AzureConfig", "dstack_register_backends"]


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend. The SDK is imported when it is first used."""
    return [
        BackendInfo(
            name="azure",
            title="Microsoft Azure",
            config=AzureConfig,
            factory="dstack_azure._backend:AzureBackend",
            plugin_api=(1, 3),
            # A virtual machine is made by its name, and only if there is none of that name: Azure's own promise.
            native_idempotency=True,
            # Listings are of a cache that is seconds old; some minutes were seen.
            visibility_window=120.0,
            provisioning_timeout=900.0,
            offers_ttl=300.0,
            boots_machines=True,
            # A machine that shuts itself down is billed on: nobody but a server ends it.
            terminates_itself="nobody",
            hook_timeout=60.0,
        )
    ]
