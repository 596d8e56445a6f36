"""What was done to an instance: Compute Engine's operations, which it shows for two weeks and longer.

They tell what an instance that is gone cannot: that there was one of this name, how its creation failed, why it ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dstack_core.plugin import BackendError, StateReason
from dstack_gcp._account import Account
from dstack_gcp._calls import action_of
from dstack_gcp._errors import of_operation

INSERT, DELETE, PREEMPTED = "insert", "delete", "compute.instances.preempted"
_REASONS = {
    PREEMPTED: StateReason.SPOT_INTERRUPTION,
    "compute.instances.guestTerminate": StateReason.SHUTDOWN_FROM_INSIDE,
    "compute.instances.hostError": StateReason.FAILURE,
    "compute.instances.terminateOnHostMaintenance": StateReason.FAILURE,
    "compute.instances.scheduledTermination": StateReason.REQUESTED,
    "stop": StateReason.REQUESTED,
    DELETE: StateReason.REQUESTED,
}
_NAME = re.compile(r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")


def is_name(text: str | None) -> bool:
    """Whether anything can have this name."""
    return bool(text and _NAME.match(text))


def operations(account: Account, zone: str, name: str) -> list[Any]:
    """All that was done to the instance of this name, the oldest first."""
    wanted = f'targetLink eq ".*/zones/{zone}/instances/{name}"'
    pages = account.pages("zone_operations", "list", zone, zone=zone, filter=wanted)
    found = [one for page in pages for one in page.items]
    return sorted(found, key=lambda one: (one.insert_time, int(one.id)))


def inserts(found: Iterable[Any]) -> list[Any]:
    """The creations among them."""
    return [one for one in found if one.operation_type == INSERT]


def is_over(operation: Any) -> bool:
    """Whether it has ended, well or not."""
    return bool(operation.status.name == "DONE")


def failure_of(operation: Any, where: str) -> BackendError | None:
    """How it failed; `None` if it did not, or is under way."""
    errors = list(operation.error.errors) if is_over(operation) else []
    if not errors:
        return None
    return of_operation(errors[0].code, errors[0].message, action_of("instances", "insert_unary"), where)


def reason_of(found: Iterable[Any]) -> StateReason | None:
    """Why the instance ended: the first of what can end one, since whoever cleans up comes later."""
    for one in found:
        if one.operation_type in _REASONS:
            return _REASONS[one.operation_type]
    return None
