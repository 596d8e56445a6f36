"""The door for authors of backends and plugins: everything a plugin may import.

A backend is a package with an entry point in the group `dstack.backends` and an object that implements
the five hooks; see `dstack_core._hookspecs` for the contract of each.
"""

from __future__ import annotations

from dstack_core._hookspecs import BackendConfig, BackendInfo, hookimpl
from dstack_core._models.instances import Endpoint, Instance, InstanceRef, InstanceRequest, InstanceState, StateReason
from dstack_core._models.offer_index import fitting_gpus
from dstack_core._models.offers import Availability, Gpu, GpuRequirements, MachineResources, Offer, Requirements
from dstack_core._models.profiles import SpotPolicy
from dstack_core._models.resources import Range
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    PluginBug,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

__all__ = [
    "AuthenticationError",
    "Availability",
    "BackendConfig",
    "BackendError",
    "BackendInfo",
    "Endpoint",
    "Gpu",
    "GpuRequirements",
    "Instance",
    "InstanceRef",
    "InstanceRequest",
    "InstanceState",
    "InvalidRequestError",
    "MachineResources",
    "NoCapacityError",
    "Offer",
    "PluginBug",
    "QuotaExceededError",
    "Range",
    "RateLimitedError",
    "Requirements",
    "SpotPolicy",
    "StateReason",
    "UnknownOutcomeError",
    "fitting_gpus",
    "hookimpl",
]

# Tracebacks and documentation show the door. Models keep their module: pydantic looks up annotations there.
for _public in (Availability, BackendInfo, InstanceState, StateReason, fitting_gpus):
    _public.__module__ = __name__
# Of two doors, the users'.
SpotPolicy.__module__ = "dstack.api"
