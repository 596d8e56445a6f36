"""Which offer a job gets: filter, rank by price, pass over what was refused already. Pure functions."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter

from dstack_core._backends import Listing
from dstack_core._engine.shortages import Memory
from dstack_core._models.offer_index import Matches
from dstack_core._models.offers import Availability, Offer, Requirements

PLAN_OFFERS = 50
"""How many offers a plan shows for a job."""

OfferKey = tuple[str, ...]


def offer_key(offer: Offer) -> OfferKey:
    """What makes two offers the same choice, from one listing to the next."""
    return (offer.backend, offer.instance_type, offer.region, offer.zone or "", "spot" if offer.spot else "")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The offers that satisfy a job, cheapest first and unavailable ones last, and how many there are in all."""

    offers: tuple[Offer, ...]
    total: int
    notes: tuple[str, ...]

    @property
    def can_start(self) -> bool:
        """True when at least one offer is worth trying. Those come first."""
        return bool(self.offers) and self.offers[0].availability.worth_trying


def rank(listings: Sequence[Listing], requirements: Requirements, memory: Memory, limit: int = PLAN_OFFERS) -> Ranked:
    """The best offers of all backends, with a note for each backend that has none or did not answer."""
    matches = [_match(listing, requirements) for listing in listings]
    sorts = [_sort(listing.backend, match, memory, limit) for listing, match in zip(listings, matches, strict=True)]
    notes = (_note(*one, requirements) for one in zip(listings, sorts, strict=True))
    return Ranked(
        offers=tuple(islice(_in_order(sorts), limit)),
        total=sum(match.total for match in matches),
        notes=tuple(note for note in notes if note is not None),
    )


def choose(
    listings: Sequence[Listing], requirements: Requirements, tried: Collection[OfferKey], memory: Memory
) -> Offer | None:
    """The cheapest offer that is worth trying and was not refused before; `None` when there is none.

    What another attempt was refused is passed over; if nothing else is left, it is tried after a while.
    """
    last = None
    for offer in heapq.merge(*(_worth_a_look(one, requirements, memory) for one in listings), key=_price):
        if offer_key(offer) in tried:
            continue
        shortage = memory.of(offer) if memory else None
        if shortage is None:
            return offer
        if last is None and not memory.forbids(shortage):
            last = offer
    return last


def _match(listing: Listing, requirements: Requirements) -> Matches:
    return listing.offers.match(listing.relaxed(requirements))


def _worth_a_look(listing: Listing, requirements: Requirements, memory: Memory) -> Iterable[Offer]:
    """The available offers of a backend, unless it just refused everything."""
    refused = memory.of_all(listing.backend) if memory else None
    return () if refused is not None and memory.forbids(refused) else _match(listing, requirements).available


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The best offers of one backend: those to be had, those to be tried last, and those not to be had."""

    good: Sequence[Offer] = ()
    last: Sequence[Offer] = ()
    bad: Sequence[Offer] = ()


def _sort(backend: str, match: Matches, memory: Memory, limit: int) -> _Sorted:
    """Looks at no more offers than it takes to find enough good ones."""
    bad = list(islice(match.unavailable, limit))
    if not memory:
        return _Sorted(list(islice(match.available, limit)), (), bad)
    good: list[Offer] = []
    last: list[Offer] = []
    # Where everything is refused, looking further finds nothing else.
    most = limit if memory.of_all(backend) is not None else None
    for offer in islice(match.available, most):
        shortage = memory.of(offer)
        if shortage is None:
            good.append(offer)
        elif len(last) < limit and not memory.forbids(shortage):
            last.append(replace(offer, availability=Availability.UNKNOWN, reason=shortage.reason))
        elif len(bad) < 2 * limit:
            bad.append(replace(offer, availability=_REFUSED[shortage.key[0]], reason=shortage.reason))
        if len(good) == limit:
            break
    return _Sorted(good, last, sorted(bad, key=_price))


_REFUSED = {"capacity": Availability.NO_CAPACITY, "quota": Availability.NO_QUOTA}
_price = attrgetter("price")


def _in_order(sorts: Sequence[_Sorted]) -> Iterator[Offer]:
    """All that can be had, cheapest first; then all that is tried last; then all that cannot be had."""
    yield from heapq.merge(*(one.good for one in sorts), key=_price)
    yield from heapq.merge(*(one.last for one in sorts), key=_price)
    yield from heapq.merge(*(one.bad for one in sorts), key=_price)


def _note(listing: Listing, found: _Sorted, requirements: Requirements) -> str | None:
    """Why a backend has nothing to start with, and what comes nearest; also that it answered too late."""
    if listing.error is not None:
        return f"{listing.backend}: {listing.error}"
    if found.good or found.last:
        return f"{listing.backend}: did not answer in time, its offers are older" if listing.late else None
    full = found.bad[0] if found.bad else None
    if full is not None:
        return f"{listing.backend}: {full.reason or f'{full.instance_type} in {full.region} has no capacity now'}"
    return f"{listing.backend}: {listing.offers.explain(listing.relaxed(requirements))}"
