"""Lambda's on-demand cloud as a backend of dstack-core."""

from __future__ import annotations

from dstack_core.plugin import BackendInfo, hookimpl
from dstack_lambda._config import LambdaConfig

__all__ = ["LambdaConfig", "dstack_register_backends"]


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """One backend. What speaks HTTP is imported when it is first used."""
    return [
        BackendInfo(
            name="lambda",
            title="Lambda",
            config=LambdaConfig,
            factory="dstack_lambda._backend:LambdaBackend",
            plugin_api=(1, 2),
            # A launch takes no token: instances are found again by their tags, which are part of it.
            native_idempotency=False,
            visibility_window=60.0,
            # GPU machines take up to a quarter of an hour to boot.
            provisioning_timeout=1200.0,
            offers_ttl=60.0,
            boots_machines=True,
            # A machine that shuts itself down is billed on, and the cloud knows no time limit.
            terminates_itself="nobody",
            # Most of them wait for their turn, or for one listing that they share.
            max_concurrency=16,
            # 20 s to prepare a launch, 13 s to wait for its turn, 30 s for the answer, and some to spare.
            hook_timeout=75.0,
        )
    ]
