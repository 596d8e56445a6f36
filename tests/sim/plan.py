"""What a world has in store, drawn from its seed: each world has some kinds of trouble and not others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from dstack_core.testing.simcloud import Drought, Idempotency, Weather

TROUBLES = (
    "kill",
    "stop",
    "freeze",
    "cut_off",
    "lose_store",
    "drought",
    "quota",
    "interrupt",
    "lose_instance",
    "crash",
    "unplug",
)
_HOOK_FAULTS = (
    ("create", "lost before"),
    ("create", "lost after"),
    ("create", "bug after"),
    ("create", "throttled"),
    ("create", "no capacity"),
    ("create", "quota"),
    ("create", "unauthorized"),
    ("create", "invalid"),
    ("get", "lost before"),
    ("get", "throttled"),
    ("list", "lost before"),
    ("list", "page lost"),
    ("list", "throttled"),
    ("terminate", "lost before"),
    ("terminate", "lost after"),
    ("terminate", "throttled"),
    ("terminate", "ignored"),
    ("offers", "lost before"),
    ("offers", "bug before"),
)
_POINTS = (
    "before commit",
    "after commit",
    "before hook",
    "after hook",
    "after hook's answer",
    "before agent put_job",
    "after agent put_job",
    "after agent stop_job",
)


@dataclass
class Plan:
    """All that is decided before a world begins. The defaults are a world where nothing goes wrong.

    Attributes:
        lasts: virtual seconds of trouble; then all heals, and everything has to settle.
        resync, renewal, sweeps: seconds between the looks of an idle engine, between the renewals of its leases, and
            between the first rounds of its sweeper.
        runs: how many runs are submitted.
        troubles: names of what happens now and then, as `TROUBLES`.
        trouble_every: seconds between them, on average.
        down_for: seconds until a dead server is started again, at most.
        kills: how likely a server is killed at a point, by its name.
        script: what the users do, where that is not left to chance.
        droughts: shortages, where they are not left to chance.
        interrupts: when all spot instances are taken away.
        restore: when the database is copied, and when that copy takes its place.
        kept: servers remember beside the database how often it was started.
    """

    servers: int = 1
    lasts: float = 300.0
    resync: float = 20.0
    renewal: float = 5.0
    sweeps: float = 10.0
    skew: float = 0.0
    runs: int = 2
    foreign: int = 0
    idempotency: Idempotency = "token"
    rate: float | None = None
    grace: float | None = 600.0
    weather: Weather = field(default_factory=lambda: Weather(starts=(1, 10), boots=(1, 10), ends=(1, 20)))
    reuse_addresses: bool = False
    troubles: frozenset[str] = frozenset()
    trouble_every: float = 60.0
    down_for: float = 60.0
    hook_faults: dict[Any, float] = field(default_factory=dict)
    slow_hooks: float = 0.0
    hook_twice: float = 0.0
    network_faults: dict[str, float] = field(default_factory=dict)
    slow_store: float = 0.0
    store_faults: dict[str, float] = field(default_factory=dict)
    kills: dict[str, float] = field(default_factory=dict)
    script: tuple[Any, ...] | None = None
    droughts: tuple[Drought, ...] = ()
    interrupts: tuple[float, ...] = ()
    restore: tuple[float, float] | None = None
    kept: bool = True

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        """The plan of a seed."""
        idempotency: Idempotency = rng.choice(("token", "token", "name", "tags"))
        troubles = {name for name in TROUBLES if rng.random() < 0.25}
        servers = rng.choice((1, 2))
        plan = cls(
            servers=servers,
            lasts=rng.choice((60.0, 120.0, 240.0)),
            resync=rng.choice((10.0, 30.0)) if servers == 2 else 60.0,
            skew=rng.choice((0.0, 2.0)) if servers == 2 else 0.0,
            renewal=rng.choice((5.0, 10.0)),
            sweeps=rng.choice((10.0, 60.0, 60.0)),
            runs=rng.choice((1, 1, 2, 2, 3)),
            foreign=rng.choice((0, 0, 5)),
            idempotency=idempotency,
            rate=rng.choice((None, None, 2.0)),
            weather=_weather(rng),
            reuse_addresses=rng.random() < 0.3,
            troubles=frozenset(troubles),
            down_for=rng.choice((5.0, 60.0, 60.0, 400.0)),
            trouble_every=rng.choice((10.0, 25.0, 60.0)),
            slow_hooks=rng.choice((0.0, 0.0, 0.1)),
            hook_twice=rng.choice((0.0, 0.0, 0.1)) if idempotency != "tags" else 0.0,
            slow_store=rng.choice((0.0, 0.2)),
        )
        if rng.random() < 0.06:
            plan.restore, plan.kept = (rng.uniform(0, 30), rng.uniform(30, 60)), rng.random() < 0.5
        plan.hook_faults = {one: rng.choice((0.05, 0.3)) for one in _HOOK_FAULTS if rng.random() < 0.15}
        plan.network_faults = {one: 0.1 for one in ("agent loss", "agent twice") if rng.random() < 0.25}
        plan.store_faults = {one: 0.02 for one in ("before commit", "after commit") if rng.random() < 0.25}
        plan.kills = {one: 0.02 for one in _POINTS if rng.random() < 0.1}
        return plan


def _weather(rng: random.Random) -> Weather:
    return Weather(
        starts=rng.choice(((0, 0), (1, 10), (1, 10), (5, 40))),
        boots=rng.choice(((0, 2), (0, 5), (2, 20), (2, 20), (5, 200))),
        list_lag=rng.choice(((0, 0), (0, 10), (0, 85))),
        get_lag=rng.choice(((0, 0), (0, 0), (0, 30))),
        ends=rng.choice(((0, 0), (0, 0), (1, 30), (0, 600))),
    )
