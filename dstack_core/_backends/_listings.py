"""Listings of offers, kept for as long as their backend says they are good."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from dstack_core._backends._configured import Backend
from dstack_core._models.offer_index import OfferIndex
from dstack_core._models.offers import Requirements
from dstack_core.errors import BackendError

CACHED_OFFERS = 300_000
"""How many offers the kept listings may hold together."""

OLDEST = 900.0
"""Seconds after which a listing is too old even to stand in for one that did not come."""

_OVERHEAD = 100

Key = tuple[Backend, Requirements]
Fetched = OfferIndex | BackendError


@dataclass(frozen=True, slots=True)
class Listing:
    """What one backend offers for some requirements.

    Attributes:
        backend: its name.
        offers: all it offers; empty when there is an error.
        error: why it could not say.
        late: it did not answer in time. `offers` are those of an earlier answer, if there was one.
        existing: its offers are machines that exist already (`BackendInfo.existing_machines`).
    """

    backend: str
    offers: OfferIndex
    error: BackendError | None = None
    late: bool = False
    existing: bool = False

    def relaxed(self, requirements: Requirements) -> Requirements:
        """The requirements as this backend understands them: what nobody set asks nothing of a machine that exists."""
        return requirements.for_existing_machine() if self.existing else requirements


class Listings:
    """The kept listings, and those that are being fetched.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: OrderedDict[Key, tuple[float, OfferIndex]] = OrderedDict()
        self._under_way: dict[Key, asyncio.Task[Fetched]] = {}
        self._unshared: set[asyncio.Task[Fetched]] = set()

    def younger_than(self, key: Key, age: float) -> OfferIndex | None:
        """The kept listing, if it is young enough."""
        if key not in self._kept:
            return None
        when, offers = self._kept[key]
        return offers if self._clock() - when < age else None

    def keep(self, key: Key, offers: OfferIndex) -> None:
        """Keeps a listing, and gives up the oldest ones for it."""
        self._kept[key] = (self._clock(), offers)
        self._kept.move_to_end(key)
        total = sum(len(kept) + _OVERHEAD for _, kept in self._kept.values())
        while len(self._kept) > 1 and total > CACHED_OFFERS:
            _, (_, dropped) = self._kept.popitem(last=False)
            total -= len(dropped) + _OVERHEAD

    def shared(self, key: Key, fetch: Callable[[], Coroutine[Any, Any, Fetched]]) -> asyncio.Task[Fetched]:
        """The fetch of a listing: the one that is under way, else a new one."""
        if key not in self._under_way:
            self._under_way[key] = task = asyncio.get_running_loop().create_task(fetch())
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return self._under_way[key]

    def unshared(self, fetch: Callable[[], Coroutine[Any, Any, Fetched]]) -> asyncio.Task[Fetched]:
        """A fetch of its own, for offers that change with each run. Goes on to its end even if nobody waits."""
        task = asyncio.get_running_loop().create_task(fetch())
        self._unshared.add(task)
        task.add_done_callback(self._unshared.discard)
        return task
