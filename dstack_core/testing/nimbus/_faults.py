"""What goes wrong by order, one order at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dstack_core.testing._clouds import Failure, Fault

RETRY_AFTER = 7
_MAKING = (Fault.NO_CAPACITY, Fault.QUOTA, Fault.INVALID)

ANSWERS = {
    Fault.THROTTLE: (429, "rate_limited", "Too many requests, this account may make 10 a second"),
    Fault.NO_CAPACITY: (503, "no_capacity", "No servers of this type are left in this zone"),
    Fault.QUOTA: (403, "quota_exceeded", "The quota 'servers per region' of this account is reached"),
    Fault.UNAUTHORIZED: (401, "unauthorized", "This token is not valid"),
    Fault.FORBIDDEN: (403, "forbidden", "This token lacks the permission 'servers:write'"),
    Fault.INVALID: (422, "invalid", "The image of this type is no longer offered"),
    Fault.SERVER_ERROR: (500, "internal", "Something broke at our end"),
}
"""Status, code and message of what is answered."""

_FAILURES = {
    Fault.THROTTLE: Failure(ANSWERS[Fault.THROTTLE][2], retry_after=RETRY_AFTER),
    Fault.NO_CAPACITY: Failure(ANSWERS[Fault.NO_CAPACITY][2], scope="zone", retry_after=RETRY_AFTER),
    Fault.QUOTA: Failure(ANSWERS[Fault.QUOTA][2], scope="region"),
}


@dataclass
class _Order:
    kind: Fault
    times: int
    after: bool
    skip: int

    def befalls(self, *, making: bool, changing: bool) -> bool:
        """Whether it is meant for such a call."""
        return self.times > 0 and (making or self.kind not in _MAKING) and (changing or not self.after)


class Faults:
    """The order that stands, and those whose answer is held back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order: _Order | None = None
        self._healed = threading.Event()

    def order(self, kind: Fault, times: int, *, after: bool, skip: int) -> Failure:
        """See `Faulty.fail`."""
        if after and kind not in (Fault.SERVER_ERROR, Fault.DROP, Fault.HANG):
            raise ValueError(f"{kind} is an answer that says that nothing happened, so it cannot come after")
        with self._lock:
            self._order = _Order(kind, times, after, skip)
        return _FAILURES.get(kind) or Failure(ANSWERS[kind][2] if kind in ANSWERS else "")

    def heal(self) -> None:
        """See `Faulty.heal`."""
        with self._lock:
            self._order = None
            self._healed.set()
            self._healed = threading.Event()

    def wait(self) -> None:
        """Returns when it is healed."""
        with self._lock:
            healed, standing = self._healed, self._order is not None
        if standing:
            healed.wait()

    def next(self, *, making: bool, changing: bool) -> tuple[Fault | None, bool]:
        """What befalls this call, and whether only after it was carried out."""
        with self._lock:
            order = self._order
            if order is None or not order.befalls(making=making, changing=changing):
                return None, False
            if order.skip > 0:
                order.skip -= 1
                return None, False
            order.times -= 1
            return order.kind, order.after
