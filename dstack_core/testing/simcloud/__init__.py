"""SimCloud: a cloud in memory for tests, with everything that goes wrong with clouds.

clock = SimClock()
cloud = SimCloud(clock, seed=7)
cloud.weather.list_lag = (0.0, 90.0)
cloud.faults.script("create", "lost after")         # the next create call succeeds, and says that it did not
cloud.faults.chances["terminate", "throttled"] = 0.2
…                                                   # call its hooks, `dstack_create_instance` and so on
clock.advance(120)
assert not cloud.alive()
print(cloud.meter.total(clock.time()))
"""

from __future__ import annotations

from dstack_core.testing.simcloud._clock import SimClock
from dstack_core.testing.simcloud._cloud import (
    Idempotency,
    SimCloud,
    SimCloudConfig,
    SimInstance,
    SimType,
    Weather,
    connect,
)
from dstack_core.testing.simcloud._faults import Drought, Faults, Hook, Kind
from dstack_core.testing.simcloud._machines import Script, SimJob, SimJobState, SimMachine, SimRefused
from dstack_core.testing.simcloud._meter import Meter

__all__ = [
    "Drought",
    "Faults",
    "Hook",
    "Idempotency",
    "Kind",
    "Meter",
    "Script",
    "SimClock",
    "SimCloud",
    "SimCloudConfig",
    "SimInstance",
    "SimJob",
    "SimJobState",
    "SimMachine",
    "SimRefused",
    "SimType",
    "Weather",
    "connect",
]

# Their users find these at the door.
for _public in (
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
):
    _public.__module__ = "dstack_core.testing"
