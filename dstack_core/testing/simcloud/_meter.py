"""What it costs, and whether somebody answers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from dstack_core.testing.simcloud._cloud import SimInstance

_HOUR = 3600.0


class Meter:
    """The cloud's bill. Each instance is billed from its acceptance to its end.

    Attributes:
        unclaimed: USD for instances that nobody claimed, as far as `observe` was told.
    """

    def __init__(self) -> None:
        self._lines: list[SimInstance] = []
        self._seen: dict[str, float] = {}
        self._alone: dict[str, float] = {}
        self.unclaimed = 0.0

    def add(self, instance: SimInstance) -> None:
        """Begins to bill an instance."""
        self._lines.append(instance)
        self._seen[instance.id] = instance.created_at

    def total(self, now: float, owner: UUID | None = None) -> float:
        """USD so far, of one owner or of all."""
        return sum(one.price * self.seconds(one, now) / _HOUR for one in self.of(owner))

    def of(self, owner: UUID | None = None) -> Iterable[SimInstance]:
        """What was ever billed, oldest first."""
        return (one for one in self._lines if owner is None or one.owner == owner)

    @staticmethod
    def seconds(instance: SimInstance, now: float) -> float:
        """How long an instance has been billed."""
        return max(0.0, min(now, instance.ended_at) - instance.created_at)

    def observe(self, now: float, owner: UUID, claimed: Callable[[SimInstance], bool]) -> dict[str, float]:
        """Looks who claims what is billed now. Call it often: what was unclaimed at a look was so since the last one.

        Args:
            now: seconds on the cloud's clock.
            owner: whose instances.
            claimed: whether somebody answers for an instance.

        Returns:
            For each instance that is billed and unclaimed, the seconds for which it has been.
        """
        for one in self.of(owner):
            since, until = self._seen[one.id], min(now, one.ended_at)
            self._seen[one.id] = max(since, until)
            if until <= since or claimed(one):
                self._alone.pop(one.id, None)
                continue
            self.unclaimed += one.price * (until - since) / _HOUR
            self._alone[one.id] = self._alone.get(one.id, 0.0) + until - since
            if one.ended_at <= now:
                self._alone.pop(one.id)
        return dict(self._alone)
