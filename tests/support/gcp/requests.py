"""Requests as the engine renders them."""

from __future__ import annotations

from uuid import UUID

from dstack_core.plugin import InstanceRequest, Offer
from dstack_core.testing._suite._requests import new_intent, render


def request_for(offer: Offer, owner: UUID) -> InstanceRequest:
    """A request for a new intent."""
    return render(owner, new_intent(), offer, ())
