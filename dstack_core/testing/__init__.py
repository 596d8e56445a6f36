"""What tests of backends and of programs that use dstack need.

`BackendSuite` holds a backend against its contract, `NimbusServer` is a small cloud to try it on, and the protocols
(`Cloud` and the abilities after it) say what a cloud under test may offer. A cloud of your own gets what goes wrong
from `FaultPlane`, and real machines from `Fleet`. Loaded when they are first used: `wait_until` alone costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dstack_core.testing._wait import wait_until

if TYPE_CHECKING:
    from dstack_core.testing._clouds import (
        Account,
        Booting,
        Catalogued,
        Cloud,
        Counting,
        Event,
        Eventful,
        Failure,
        Fault,
        Faulty,
        Lagging,
        Server,
        Stocked,
        Truth,
        Truthful,
    )
    from dstack_core.testing._faultplane import FaultPlane, Struck
    from dstack_core.testing._suite import BackendSuite
    from dstack_core.testing.fleet import Fleet, FleetUnavailable, Machine, MachineResult
    from dstack_core.testing.nimbus import NimbusServer

wait_until.__module__ = __name__

__all__ = [
    "Account",
    "BackendSuite",
    "Booting",
    "Catalogued",
    "Cloud",
    "Counting",
    "Event",
    "Eventful",
    "Failure",
    "Fault",
    "FaultPlane",
    "Faulty",
    "Fleet",
    "FleetUnavailable",
    "Lagging",
    "Machine",
    "MachineResult",
    "NimbusServer",
    "Server",
    "Stocked",
    "Struck",
    "Truth",
    "Truthful",
    "wait_until",
]

_ROOMS = {
    "BackendSuite": "dstack_core.testing._suite",
    "FaultPlane": "dstack_core.testing._faultplane",
    "Fleet": "dstack_core.testing.fleet",
    "FleetUnavailable": "dstack_core.testing.fleet",
    "Machine": "dstack_core.testing.fleet",
    "MachineResult": "dstack_core.testing.fleet",
    "NimbusServer": "dstack_core.testing.nimbus",
    "Struck": "dstack_core.testing._faultplane",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS.get(name, "dstack_core.testing._clouds")), name)


def __dir__() -> list[str]:
    return __all__
