"""Hides every offer that costs more than `DSTACK_PRICE_CAP` dollars an hour, whichever backend makes it."""

import os
from collections.abc import Generator
from math import inf

from dstack_core.plugin import InvalidRequestError, Offer, hookimpl


@hookimpl(wrapper=True)
def dstack_list_offers(backend: str) -> Generator[None, list[Offer], list[Offer]]:
    """Lets the backend answer, and passes on what is cheap enough."""
    cap = price_cap(backend)
    offers = yield
    return [offer for offer in offers if offer.price <= cap]


def price_cap(backend: str) -> float:
    """The cap, read for every listing, so that no restart is needed to change it. Without one, there is no cap."""
    text = os.environ.get("DSTACK_PRICE_CAP", "")
    if not text:
        return inf
    try:
        return float(text)
    except ValueError:
        problem = f"DSTACK_PRICE_CAP={text!r} is no price, so nothing of '{backend}' is offered"
        raise InvalidRequestError(f"{problem}. Write dollars an hour, as 2.50.") from None
