"""Google Compute Engine as a backend of dstack-core."""

from __future__ import annotations

from dstack_core.plugin import BackendInfo, hookimpl
from dstack_gcp._config import GcpConfig

__all__ = ["GcpConfig", "dstack_register_backends"]


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend. The SDK is imported when it is first used."""
    return [
        BackendInfo(
            name="gcp",
            title="Google Compute Engine",
            config=GcpConfig,
            factory="dstack_gcp._backend:GcpBackend",
            plugin_api=(1, 3),
            # One name and one requestId for an intent: by Compute Engine's own promise both are used once.
            native_idempotency=True,
            visibility_window=60.0,
            provisioning_timeout=900.0,
            offers_ttl=300.0,
            boots_machines=True,
            # With a time limit it is the cloud; without one, a machine that shuts itself down ends all but its disk.
            terminates_itself="agent",
            hook_timeout=60.0,
        )
    ]
