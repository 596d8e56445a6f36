"""Which offer a job gets, and what is said when there is none."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from dstack_core._backends import Listing
from dstack_core._engine import placement
from dstack_core._engine.placement import OfferKey, Ranked, offer_key
from dstack_core._engine.shortages import Memory
from dstack_core._models.offer_index import OfferIndex
from dstack_core.errors import AuthenticationError
from dstack_core.plugin import Availability, MachineResources, Offer, Range, Requirements, SpotPolicy

SMALL = MachineResources(cpus=2, memory_mib=8192, disk_mib=102400)
LARGE = MachineResources(cpus=16, memory_mib=65536, disk_mib=102400)
NONE = Availability.NO_CAPACITY
NOW = datetime(2026, 1, 1, tzinfo=UTC)
BLANK = Memory({}, NOW)


def rank(listings: list[Listing], requirements: Requirements, memory: Memory = BLANK) -> Ranked:
    """The best offers, where nothing is remembered."""
    return placement.rank(listings, requirements, memory)


def choose(
    listings: list[Listing], requirements: Requirements, tried: Collection[OfferKey], memory: Memory = BLANK
) -> Offer | None:
    """The offer to take, where nothing is remembered."""
    return placement.choose(listings, requirements, tried, memory)


def listing(backend: str, *offers: Offer, **facts: Any) -> Listing:
    """What one backend says."""
    return Listing(backend, OfferIndex(offers), **facts)


def offer(backend: str, price: float, resources: MachineResources = SMALL, **facts: object) -> Offer:
    """One offer."""
    return Offer(backend, "small" if resources is SMALL else "large", "here", resources, price, **facts)  # type: ignore[arg-type]  # fields by name


def test_the_cheapest_of_all_backends_comes_first() -> None:
    """Ranked by price across backends; what cannot be had comes last."""
    listings = [listing("a", offer("a", 3), offer("a", 1, availability=NONE)), listing("b", offer("b", 2))]
    ranked = rank(listings, Requirements())
    assert [(one.backend, one.price) for one in ranked.offers] == [("b", 2), ("a", 3), ("a", 1)]
    assert (ranked.total, ranked.can_start, ranked.notes) == (3, True, ())


def test_what_was_refused_is_passed_over() -> None:
    """The next best offer is chosen, until none is left."""
    offers = [offer("a", 1, zone="x"), offer("a", 2, zone="y")]
    listings = [listing("a", *offers)]
    assert choose(listings, Requirements(), ()) is offers[0]
    assert choose(listings, Requirements(), [offer_key(offers[0])]) is offers[1]
    assert choose(listings, Requirements(), [offer_key(one) for one in offers]) is None


def test_spot_and_on_demand_are_two_choices() -> None:
    """A refused spot offer does not rule out the same machine on demand."""
    offers = [offer("a", 1, spot=True), offer("a", 2)]
    refused = [offer_key(offers[0])]
    assert choose([listing("a", *offers)], Requirements(), refused) is offers[1]
    only_spot = Requirements(spot_policy=SpotPolicy.SPOT)
    assert choose([listing("a", *offers)], only_spot, refused) is None


def test_a_limit_of_price_holds() -> None:
    """`max_price` is inclusive."""
    listings = [listing("a", offer("a", 1.0), offer("a", 1.01))]
    assert rank(listings, Requirements(max_price=1.0)).total == 1


def test_each_backend_without_an_offer_says_why() -> None:
    """Broken, full, too small, late: one line each, and none for a backend that has something."""
    listings = [
        listing("fine", *(offer("fine", number / 100) for number in range(80))),
        listing("dear", offer("dear", 99)),
        Listing("locked", OfferIndex(), AuthenticationError("the key has expired: renew it")),
        listing("full", offer("full", 1, LARGE, availability=NONE, reason="no stock until May")),
        listing("tiny", offer("tiny", 1, MachineResources(cpus=1, memory_mib=512))),
        listing("slow", offer("slow", 5), late=True),
    ]
    ranked = rank(listings, Requirements(memory_mib=Range(min=1024, max=None)))
    notes = dict(note.split(": ", 1) for note in ranked.notes)
    assert set(notes) == {"locked", "full", "tiny", "slow"}
    assert notes["locked"] == "the key has expired: renew it"
    assert notes["full"] == "no stock until May"
    assert "memory" in notes["tiny"]
    assert "nearest: large in here (1 CPU" in notes["tiny"]
    assert "in time" in notes["slow"]


def test_sizes_nobody_asked_for_bind_only_machines_made_to_order() -> None:
    """The default of 8 GB sizes a cloud's machine, and asks nothing of a computer that exists."""
    tiny = MachineResources(cpus=1, memory_mib=512)
    wanted = Requirements(memory_mib=Range(min=8192, max=None), unset=frozenset({"memory_mib"}))
    assert rank([listing("cloud", offer("cloud", 1, tiny))], wanted).total == 0
    assert rank([listing("here", offer("here", 0, tiny), existing=True)], wanted).total == 1
