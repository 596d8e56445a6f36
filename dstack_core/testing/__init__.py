"""What tests of backends and of programs that use dstack need.

`BackendSuite` holds a backend against its contract, `NimbusServer` is a small cloud to try it on, and the protocols
(`Cloud` and the abilities after it) say what a cloud under test may offer. A cloud of your own gets what goes wrong
from `FaultPlane`, and real machines from `Fleet`. `SimCloud` is a cloud in memory, on a virtual clock. Loaded when they
are first used: `wait_until` alone costs nothing.
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
        Unmarking,
    )
    from dstack_core.testing._faultplane import FaultPlane, Struck
    from dstack_core.testing._suite import BackendSuite
    from dstack_core.testing.fleet import Fleet, FleetUnavailable, Machine, MachineResult
    from dstack_core.testing.nimbus import NimbusServer
    from dstack_core.testing.simcloud import (
        Drought,
        Faults,
        Meter,
        Script,
        SimClock,
        SimCloud,
        SimInstance,
        SimJob,
        SimJobState,
        SimMachine,
        SimRefused,
        SimType,
        Weather,
    )

wait_until.__module__ = __name__

__all__ = [
    "Account",
    "BackendSuite",
    "Booting",
    "Catalogued",
    "Cloud",
    "Counting",
    "Drought",
    "Event",
    "Eventful",
    "Failure",
    "Fault",
    "FaultPlane",
    "Faults",
    "Faulty",
    "Fleet",
    "FleetUnavailable",
    "Lagging",
    "Machine",
    "MachineResult",
    "Meter",
    "NimbusServer",
    "Script",
    "Server",
    "SimClock",
    "SimCloud",
    "SimInstance",
    "SimJob",
    "SimJobState",
    "SimMachine",
    "SimRefused",
    "SimType",
    "Stocked",
    "Struck",
    "Truth",
    "Truthful",
    "Unmarking",
    "Weather",
    "wait_until",
]

_ROOMS = {
    "BackendSuite": "dstack_core.testing._suite",
    "Drought": "dstack_core.testing.simcloud",
    "FaultPlane": "dstack_core.testing._faultplane",
    "Faults": "dstack_core.testing.simcloud",
    "Fleet": "dstack_core.testing.fleet",
    "FleetUnavailable": "dstack_core.testing.fleet",
    "Machine": "dstack_core.testing.fleet",
    "MachineResult": "dstack_core.testing.fleet",
    "Meter": "dstack_core.testing.simcloud",
    "NimbusServer": "dstack_core.testing.nimbus",
    "Script": "dstack_core.testing.simcloud",
    "SimClock": "dstack_core.testing.simcloud",
    "SimCloud": "dstack_core.testing.simcloud",
    "SimInstance": "dstack_core.testing.simcloud",
    "SimJob": "dstack_core.testing.simcloud",
    "SimJobState": "dstack_core.testing.simcloud",
    "SimMachine": "dstack_core.testing.simcloud",
    "SimRefused": "dstack_core.testing.simcloud",
    "SimType": "dstack_core.testing.simcloud",
    "Struck": "dstack_core.testing._faultplane",
    "Weather": "dstack_core.testing.simcloud",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS.get(name, "dstack_core.testing._clouds")), name)


def __dir__() -> list[str]:
    return __all__
