"""Amazon EC2 as a backend of dstack-core."""

from __future__ import annotations

from dstack_aws._config import AwsConfig
from dstack_core.plugin import BackendInfo, hookimpl

__all__ = ["AwsConfig", "dstack_register_backends"]


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend. The SDK is imported when it is first used."""
    return [
        BackendInfo(
            name="aws",
            title="Amazon EC2",
            config=AwsConfig,
            factory="dstack_aws._backend:AwsBackend",
            plugin_api=(1, 2),
            # RunInstances takes a token of ours: the same token is the same instance, by EC2's own promise.
            native_idempotency=True,
            # "Eventually consistent": in practice seconds. Terminated instances stay in listings for about an hour.
            visibility_window=60.0,
            provisioning_timeout=900.0,
            offers_ttl=300.0,
            boots_machines=True,
            # An instance that shuts itself down is terminated, so the agent's lease ends it for good.
            terminates_itself="agent",
            hook_timeout=60.0,
        )
    ]
