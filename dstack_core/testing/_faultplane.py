"""What goes wrong in a cloud under test, in no cloud's words: every front end uses the same, and adds its words.

A front end passes each call through `FaultPlane.carry_out`, takes what it sells by `take`, and answers `Struck` as its
cloud would.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from dstack_core.testing._clouds import Failure, Fault

__all__ = ["FaultPlane", "Struck"]

T = TypeVar("T")

_MAKING = (Fault.NO_CAPACITY, Fault.QUOTA, Fault.INVALID)
_AFTER = (Fault.SERVER_ERROR, Fault.DROP, Fault.HANG)


class Struck(Exception):
    """A call fails; the front end says so in its cloud's words, or hangs up (`Fault.DROP`).

    Attributes:
        fault: how.
        retry_after: seconds to wait, if that is known.
    """

    def __init__(self, fault: Fault, retry_after: float | None = None) -> None:
        super().__init__(fault.value)
        self.fault = fault
        self.retry_after = retry_after


@dataclass
class _Order:
    """Faults for the next calls, one after the other; `None` lets a call go well."""

    call: str
    faults: list[Fault | None]
    after: bool = False

    def befalls(self, call: str, *, making: bool, changing: bool) -> bool:
        """Whether the next one is meant for such a call."""
        if not self.faults or not fnmatchcase(call, self.call) or (self.after and not changing):
            return False
        ahead = next((fault for fault in self.faults if fault is not None), None)
        return making or ahead not in _MAKING


@dataclass
class _Bucket:
    """Tokens, one for each call."""

    rate: float
    burst: float
    left: float
    filled: float

    def take(self, now: float) -> float:
        """Takes one, and returns 0; or returns the seconds until there is one."""
        self.left = min(self.burst, self.left + (now - self.filled) * self.rate)
        self.filled = now
        if self.left < 1:
            return (1 - self.left) / self.rate if self.rate else float("inf")
        self.left -= 1
        return 0.0


@dataclass(frozen=True)
class _Taken:
    type: str
    zone: str
    uses: Mapping[str, float] = field(default_factory=dict)


class FaultPlane:
    """What goes wrong by order, and what is scarce. Safe to use from several threads.

    Names of calls, types and zones are the front end's; where a pattern is asked for, `*` and `?` stand for anything.
    It has the abilities `Faulty`, `Lagging` and `Counting` of a cloud under test, so that a front end passes them on.

    Args:
        failures: what the cloud says to each fault, for `fail` to return.
        clock: seconds, from any beginning.
        pause: lets so many seconds pass.
    """

    def __init__(
        self,
        failures: Mapping[Fault, Failure] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._failures = dict(failures or {})
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._orders: list[_Order] = []
        self._buckets: dict[str, _Bucket] = {}
        self._latencies: dict[str, float] = {}
        self._capacities: dict[tuple[str, str], int] = {}
        self._quotas: dict[str, float] = {}
        self._taken: dict[str, _Taken] = {}
        self._calls: Counter[str] = Counter()
        self._lag = 0.0

    # -- by order ---------------------------------------------------------------------------------------------------

    def fail(
        self, kind: Fault | str, times: int = 1, *, after: bool = False, skip: int = 0, call: str = "*"
    ) -> Failure:
        """Makes the next calls fail; see `Faulty.fail`. Replaces what was left of earlier orders.

        Args:
            kind: how.
            times: how many calls.
            after: what the call asks for is done first, and only the answer is lost.
            skip: so many of the calls that it could befall go well first.
            call: pattern of the calls that it befalls.

        Raises:
            ValueError: this kind cannot come after.
        """
        fault = Fault(kind)
        if after and fault not in _AFTER:
            raise ValueError(f"{fault.value!r} is an answer that says that nothing happened, so it cannot come after")
        with self._lock:
            self._orders = [_Order(call, [None] * skip + [fault] * times, after)]
        return self._failures.get(fault, Failure())

    def script(self, call: str, *kinds: Fault | str | None) -> None:
        """Says what happens to the next calls that match this pattern, one after the other; `None`: they go well.

        Is added to what was ordered before.
        """
        with self._lock:
            self._orders.append(_Order(call, [None if kind is None else Fault(kind) for kind in kinds]))

    def heal(self) -> None:
        """Takes back the orders that are left; calls that hang are answered. What is scarce stays so."""
        with self._lock:
            self._orders.clear()
            self._healed.set()
            self._healed = threading.Event()

    # -- what is scarce ---------------------------------------------------------------------------------------------

    def capacity(self, count: int | None, *, type: str = "*", zone: str = "*") -> None:
        """So many at once of these types in these zones, together; `None`: as many as one likes, as at first."""
        with self._lock:
            _set(self._capacities, (type, zone), count)

    def quota(self, name: str, limit: float | None) -> None:
        """So much at once of what counts under this name, in the front end's units; `None`: no limit, as at first."""
        with self._lock:
            _set(self._quotas, name, limit)

    def limit(self, name: str) -> float | None:
        """The limit of a quota, for the front end to show; `None` if there is none."""
        return self._quotas.get(name)

    def throttle(self, rate: float | None, *, burst: float = 1, call: str = "*") -> None:
        """A bucket of `burst` tokens, filled by `rate` tokens a second, from which each matching call takes one.

        `None`: no bucket, as at first. Calls that match several take one from each.
        """
        with self._lock:
            _set(self._buckets, call, None if rate is None else _Bucket(rate, burst, burst, self._clock()))

    def latency(self, seconds: float, *, call: str = "*") -> None:
        """Lets each matching call wait before it is carried out. The longest of several counts."""
        with self._lock:
            _set(self._latencies, call, seconds or None)

    def lag(self, seconds: float) -> None:
        """From now on, what is younger than this is missing in listings; see `Lagging`."""
        self._lag = seconds

    # -- for the front end ------------------------------------------------------------------------------------------

    def carry_out(self, call: str, do: Callable[[], T], *, making: bool = False, changing: bool | None = None) -> T:
        """Counts a call and does what it asks for, unless something befalls it.

        Args:
            call: its name.
            do: what it asks for.
            making: it makes a server, so that shortages can befall it.
            changing: it changes something, so that its answer alone may be lost; as `making` if not set.

        Raises:
            Struck: this must be answered instead.
        """
        with self._lock:
            self._calls[call] += 1
            wait = max((s for pattern, s in self._latencies.items() if fnmatchcase(call, pattern)), default=0)
        if wait:
            self._pause(wait)
        with self._lock:
            self._spend(call)
            fault, after = self._next(call, making=making, changing=making if changing is None else changing)
            healed = self._healed
        if fault is None:
            return do()
        if fault is Fault.HANG:
            return _hang(do, healed, after=after)
        if after:
            do()
        raise self._struck(fault)

    def take(self, key: str, *, type: str, zone: str, uses: Mapping[str, float] | None = None) -> None:
        """Takes a machine from what there is, until `give_back(key)`. Repeated with the same key, it is the same one.

        Args:
            key: of the machine.
            type: which kind.
            zone: where.
            uses: how much it counts under each quota.

        Raises:
            Struck: with `Fault.QUOTA` or `Fault.NO_CAPACITY`; nothing was taken.
        """
        wanted = _Taken(type, zone, dict(uses or {}))
        with self._lock:
            if key in self._taken:
                return
            if any(self._over(name, amount) for name, amount in wanted.uses.items()):
                raise self._struck(Fault.QUOTA)
            if self._left(type, zone) == 0:
                raise self._struck(Fault.NO_CAPACITY)
            self._taken[key] = wanted

    def give_back(self, key: str) -> None:
        """The machine is gone. May be repeated."""
        with self._lock:
            self._taken.pop(key, None)

    def left(self, type: str, zone: str) -> int | None:
        """How many can be had now; `None`: as many as one likes."""
        with self._lock:
            return self._left(type, zone)

    def now(self) -> float:
        """The time at which something is made, for `listed`."""
        return self._clock()

    def listed(self, born: float) -> bool:
        """Whether listings show by now what was made then."""
        return self._clock() - born >= self._lag

    def calls(self, call: str = "*") -> int:
        """How many calls that match there were so far, those that failed included; see `Counting`."""
        with self._lock:
            return sum(count for name, count in self._calls.items() if fnmatchcase(name, call))

    # ---------------------------------------------------------------------------------------------------------------

    def _struck(self, fault: Fault) -> Struck:
        return Struck(fault, self._failures.get(fault, Failure()).retry_after)

    def _next(self, call: str, *, making: bool, changing: bool) -> tuple[Fault | None, bool]:
        """What befalls this call, and whether only after it was carried out."""
        for order in self._orders:
            if order.befalls(call, making=making, changing=changing):
                return order.faults.pop(0), order.after
        return None, False

    def _spend(self, call: str) -> None:
        now = self._clock()
        waits = [bucket.take(now) for pattern, bucket in self._buckets.items() if fnmatchcase(call, pattern)]
        if any(waits):
            raise Struck(Fault.THROTTLE, max(waits))

    def _over(self, name: str, amount: float) -> bool:
        if name not in self._quotas:
            return False
        used = sum(taken.uses.get(name, 0) for taken in self._taken.values())
        return used + amount > self._quotas[name]

    def _left(self, type: str, zone: str) -> int | None:
        limits = [
            count - sum(fnmatchcase(one.type, types) and fnmatchcase(one.zone, zones) for one in self._taken.values())
            for (types, zones), count in self._capacities.items()
            if fnmatchcase(type, types) and fnmatchcase(zone, zones)
        ]
        return max(0, min(limits)) if limits else None


def _hang(do: Callable[[], T], healed: threading.Event, *, after: bool) -> T:
    if after:
        answer = do()
        healed.wait()
        return answer
    healed.wait()
    return do()


K = TypeVar("K")
V = TypeVar("V")


def _set(table: dict[K, V], key: K, value: V | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


for _public in __all__:
    globals()[_public].__module__ = "dstack_core.testing"
