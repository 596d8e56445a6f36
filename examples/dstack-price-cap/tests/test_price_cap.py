"""The example does what its README says, through real entry points."""

from __future__ import annotations

import asyncio
from importlib.metadata import EntryPoint

import pytest

from dstack_core._backends import Listing
from dstack_core.plugin import Requirements
from tests.support.toys import Point, Toy, hub_of, info, offer, plugin, prepared

CAP = EntryPoint("price-cap", "dstack_price_cap", "dstack.backends")


def listings() -> list[Listing]:
    """What two backends offer with the cap installed."""
    prepared["toy"] = Toy(offers=[offer(price=1.0), offer(price=3.0)])
    prepared["other"] = Toy(offers=[offer(backend="other", price=2.5), offer(backend="other", price=2.51)])
    hub = hub_of(CAP, Point("toys", plugin(info(), info("other"))))
    return asyncio.run(hub.list_offers(Requirements(), timeout=30))


def prices() -> list[float]:
    """All prices that are offered."""
    return [one.price for listing in listings() for one in listing.offers]


def test_offers_over_the_cap_are_hidden_for_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap itself is still offered."""
    monkeypatch.setenv("DSTACK_PRICE_CAP", "2.50")
    assert prices() == [2.5, 1.0]


def test_without_a_cap_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is harmless until it is told a price."""
    monkeypatch.delenv("DSTACK_PRICE_CAP", raising=False)
    assert prices() == [2.5, 2.51, 1.0, 3.0]


def test_a_cap_that_is_no_price_hides_everything_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the limit must not let everything through."""
    monkeypatch.setenv("DSTACK_PRICE_CAP", "cheap")
    assert [len(listing.offers) for listing in listings()] == [0, 0]
    assert "DSTACK_PRICE_CAP='cheap' is no price" in str(listings()[0].error)
