"""A kill at every point where a side effect is crossed: a scenario is run once to count them, then once for each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from dstack_core.testing import Drought, Weather
from tests.sim.plan import Plan
from tests.sim.users import Wish
from tests.sim.world import World

_WEATHER = Weather(starts=(1, 2), boots=(1, 3), list_lag=(0, 20), ends=(3, 8))


def _plan(*wishes: Wish, lasts: float = 40.0, **facts: object) -> Plan:
    return Plan(lasts=lasts, weather=_WEATHER, script=wishes, resync=60.0, **facts)  # type: ignore[arg-type]  # by name


def _succeeds() -> Plan:
    """A task that succeeds."""
    return _plan(Wish("task", at=0.0, seconds=10))


def _next_offer() -> Plan:
    """The first offer is refused, the next one is taken."""
    return _plan(Wish("task", at=0.0, seconds=5), droughts=(Drought(zone="a", region="east"),))


def _stopped_early() -> Plan:
    """A stop while the instance is being made."""
    return _plan(Wish("task", at=0.0, seconds=60, stop_after=1.5))


def _spot_loss() -> Plan:
    """A spot instance is taken away, and the task tries again."""
    wish = Wish("task", at=0.0, seconds=20, spot="spot", retry=("interruption", "no-capacity"))
    return _plan(wish, interrupts=(15.0,))


def _by_listing() -> Plan:
    """A cloud that knows no tokens: what came of a call is found out by looking."""
    return _plan(Wish("task", at=0.0, seconds=5), idempotency="tags")


SCENARIOS: dict[str, Callable[[], Plan]] = {
    "succeeds": _succeeds,
    "next offer": _next_offer,
    "stopped early": _stopped_early,
    "spot loss": _spot_loss,
    "by listing": _by_listing,
}


def scenario_world(name: str, kill_at: tuple[int, ...] = (), *, keep: bool = False) -> World:
    """The world of a scenario, in which servers are killed at these points."""
    return World(1, SCENARIOS[name](), kill_at=kill_at, keep=keep)


def points_of(name: str) -> list[str]:
    """All points of a scenario, in order."""
    return scenario_world(name).run().points


def crash_worlds(name: str, pairs: int) -> Iterator[tuple[int, ...]]:
    """Where to kill: at each point, and at random pairs of points."""
    count = len(points_of(name))
    for number in range(count):
        yield (number,)
    rng = random.Random(f"pairs of {name}")
    for _ in range(pairs):
        # The second one is counted from the first one on: what follows a kill is a history of its own.
        first = rng.randrange(count)
        yield first, first + rng.randrange(1, count)
