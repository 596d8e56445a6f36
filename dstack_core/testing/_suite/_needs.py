"""What a case needs of the cloud under test or of the backend. Where it is missing, the case is skipped and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dstack_core.testing._clouds import (
    Booting,
    Catalogued,
    Counting,
    Eventful,
    Faulty,
    Lagging,
    Stocked,
    Truthful,
    Unmarking,
)
from dstack_core.testing._suite._rig import Rig

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Need:
    """Something that a case cannot do without.

    Attributes:
        met: whether it is there.
        reason: what is said where it is not.
        label: for the list of cases.
    """

    met: Callable[[Rig], bool]
    reason: str
    label: str


def _able(kind: type, what: str) -> Need:
    name = kind.__name__
    return Need(lambda rig: isinstance(rig.cloud, kind), f"the cloud under test cannot {what} ({name})", name)


TRUTH = _able(Truthful, "tell what exists in it")
CATALOGUE = _able(Catalogued, "tell what it sells")
FAULTS = _able(Faulty, "be made to fail")
LAG = _able(Lagging, "be made to lag")
STOCK = _able(Stocked, "have servers of others")
BOOT = _able(Booting, "be told how long machines boot")
EVENTS = _able(Eventful, "make something happen to a server")
UNMARK = _able(Unmarking, "take the tags off a server")
COUNT = _able(Counting, "count its calls")
NATIVE = Need(
    lambda rig: rig.info.native_idempotency,
    "the backend declares no `native_idempotency`: the engine asks one at a time, and waits until it can see",
    "native_idempotency",
)
MARKED = Need(
    lambda rig: rig.info.ownership != "none",
    "the backend declares `ownership='none'`: its instances carry no owner",
    "ownership",
)
TAGGED = Need(
    lambda rig: rig.info.ownership == "tags", "the backend does not mark its instances by tags", "ownership='tags'"
)
TO_ORDER = Need(
    lambda rig: not rig.info.existing_machines,
    "the backend declares `existing_machines`: its offers follow what is asked for",
    "not existing_machines",
)
CHECKS = Need(
    lambda rig: "dstack_check_config" in rig.backend.hooks,
    "the backend does not implement dstack_check_config",
    "dstack_check_config",
)
CONNECTS = Need(
    lambda rig: "dstack_connect" in rig.backend.hooks,
    "the backend does not implement dstack_connect",
    "dstack_connect",
)
SECRETS = Need(lambda rig: bool(rig.secrets), "the configuration holds no secret", "secrets")


def needs(*what: Need) -> Callable[[F], F]:
    """Marks a case with what it needs."""

    def marked(case: F) -> F:
        case.needs = what  # type: ignore[attr-defined]  # read by the fixture `rig` and by the list of cases
        return case

    return marked


def missing(case: Any, rig: Rig) -> str | None:
    """The first reason why a case cannot be tried."""
    return next((need.reason for need in getattr(case, "needs", ()) if not need.met(rig)), None)
