"""All backends behind one door: found by entry point, isolated from each other, each hook a coroutine.

- `_calls` runs blocking hooks in bounded daemon threads; the seam of the simulator.
- `_checks` holds what plugins return against the contract.
- `_plugins` finds and loads plugins, and calls their hooks (the only user of pluggy's manager).
- `_configured` matches what is installed with what is configured.
- `_listings` keeps listings of offers for as long as they are good.
- `_hub` is what the engine and the server use.
"""

from __future__ import annotations

from dstack_core._backends._calls import Busy, Caller, ThreadCaller
from dstack_core._backends._hub import BackendHub
from dstack_core._backends._listings import Listing
from dstack_core._models.server_config import BackendEntry, ServerConfig, load_server_config

__all__ = [
    "BackendEntry",
    "BackendHub",
    "Busy",
    "Caller",
    "Listing",
    "ServerConfig",
    "ThreadCaller",
    "load_server_config",
]
