"""What a world has in store, drawn from its seed: each world has some kinds of trouble and not others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol

from dstack_core.testing import Drought, Weather
from dstack_core.testing.simcloud import Idempotency
from tests.sim.users import Wish

TROUBLES = {
    "kill": "a server was killed",
    "stop": "a server was stopped",
    "freeze": "a server was frozen",
    "cut_off": "a server was cut off from all agents",
    "lose_store": "the database was away",
    "drought": "there was a drought",
    "quota": "there was a quota",
    "interrupt": "a spot instance got its notice",
    "lose_instance": "an instance was killed silently",
    "crash": "a machine hung for ever",
    "unplug": "a machine lost its network",
}
"""What happens now and then, by the name of its method in `World`; and how it is called when it did."""
HOOK_FAULTS = (
    ("create", "lost before"),
    ("create", "lost after"),
    ("create", "bug after"),
    ("create", "throttled"),
    ("create", "no capacity"),
    ("create", "quota"),
    ("create", "unauthorized"),
    ("create", "invalid"),
    ("create", "mismatch"),
    ("create", "late shortage"),
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
NETWORK_FAULTS = ("agent loss", "agent twice")
STORE_FAULTS = ("before commit", "after commit")
POINTS = (
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
        stills: how likely a server stands still right after a transaction that wrote down an `intent`, or another
            `move` of a job or an instance, for longer than its leases, while another server goes on.
        still_for: for how many seconds, one of these.
        script: what the users do, where that is not left to chance.
        droughts: shortages, where they are not left to chance.
        interrupts: when all spot instances are taken away.
        vanish: when all machines hang and are not listed any more.
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
    stills: dict[str, float] = field(default_factory=dict)
    still_for: tuple[float, ...] = (50.0, 90.0, 220.0)
    script: tuple[Wish, ...] | None = None
    droughts: tuple[Drought, ...] = ()
    interrupts: tuple[float, ...] = ()
    vanish: float | None = None
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
        plan.hook_faults = {one: rng.choice((0.05, 0.3)) for one in HOOK_FAULTS if rng.random() < 0.15}
        plan.network_faults = {one: 0.1 for one in NETWORK_FAULTS if rng.random() < 0.25}
        plan.store_faults = {one: 0.02 for one in STORE_FAULTS if rng.random() < 0.25}
        plan.kills = {one: 0.02 for one in POINTS if rng.random() < 0.1}
        plan.stills = {"intent": 0.1, "move": 0.1} if servers == 2 and rng.random() < 0.5 else {}
        if rng.random() < _STEERED:
            rng.choice(STEERINGS)(plan, rng)
        plan.leave_out_what_nobody_can_mend()
        return plan

    def leave_out_what_nobody_can_mend(self) -> None:
        """A steering changes a part of what was drawn; these two do not go together with the rest of it.

        - A request that arrives twice makes two instances where the cloud looks through a listing that lags behind.
        - An instance that neither the cloud's listing nor the database knows is beyond anybody's reach: made by a
          request that arrived twice, or in the time that a restored database knows nothing of.
        """
        if self.idempotency == "tags":
            self.hook_twice = 0.0
        if self.vanish is not None:
            self.restore, self.hook_twice = None, 0.0


def _weather(rng: random.Random) -> Weather:
    return Weather(
        starts=rng.choice(((0, 0), (1, 10), (1, 10), (5, 40))),
        boots=rng.choice(((0, 2), (0, 5), (2, 20), (2, 20), (5, 200))),
        list_lag=rng.choice(((0, 0), (0, 10), (0, 85))),
        get_lag=rng.choice(((0, 0), (0, 0), (0, 30))),
        ends=rng.choice(((0, 0), (0, 0), (1, 30), (0, 600))),
    )


# -- what chance alone reaches too rarely: a share of all seeds is steered to it -----------------------------------

_STEERED = 0.2
"""This share of all seeds."""


_FAIR = Weather(starts=(1, 2), boots=(1, 3), ends=(0, 2))
"""Nothing takes long."""


def _quiet(plan: Plan) -> None:
    """Nothing goes wrong but what is said from here on."""
    plan.troubles, plan.hook_faults, plan.network_faults, plan.store_faults = frozenset(), {}, {}, {}
    plan.rate, plan.slow_hooks, plan.kills, plan.stills = None, 0.0, {}, {}


class Steering(Protocol):
    """Changes a plan that was drawn, so that its history is likely to get somewhere."""

    def __call__(self, plan: Plan, rng: random.Random) -> None:
        """Changes it."""


def _outlived(plan: Plan, rng: random.Random) -> None:
    """A server stands still before it asks for an instance, while another one goes on, and the run is stopped."""
    _quiet(plan)
    plan.servers, plan.resync, plan.lasts = 2, 10.0, 270.0
    plan.stills, plan.still_for = {"intent": 0.5}, (220.0,)
    plan.script = tuple(Wish(f"run-{n}", at=10.0 * n, seconds=20, stop_after=rng.uniform(1, 30)) for n in range(3))


def _replayed(plan: Plan, rng: random.Random) -> None:
    """Answers to create calls get lost, and a cloud that was asked again says that it was another request."""
    plan.idempotency, plan.runs, plan.weather.list_lag = rng.choice(("token", "name", "tags")), 3, (20, 85)
    plan.hook_faults |= {("create", "lost after"): 0.4, ("create", "mismatch"): 0.7}


def _made_too_late(plan: Plan, rng: random.Random) -> None:
    """A request that was refused arrives once more, and is carried out: nobody waits for that instance."""
    plan.idempotency, plan.runs, plan.lasts = rng.choice(("token", "name")), 3, 120.0
    plan.hook_twice, plan.hook_faults["create", "no capacity"] = 0.6, 0.5


def _old_copy(plan: Plan, rng: random.Random) -> None:
    """An old copy of the database is restored while a run goes on, on a machine that does not end itself."""
    plan.restore, plan.kept, plan.grace = (5.0, 45.0), rng.random() < 0.5, rng.choice((600.0, None, None))
    plan.lasts = 120.0
    plan.script = (Wish("before", at=0.0, seconds=60), Wish("after", at=12.0, seconds=200))


def _slow_end(plan: Plan, rng: random.Random) -> None:
    """Instances take so long to end that an alarm is raised."""
    plan.weather.ends, plan.grace = (950.0, 950.0 + 300.0 * rng.random()), None


def _unlisted(plan: Plan, rng: random.Random) -> None:
    """A machine hangs and is not listed any more, while the cloud says that it runs."""
    plan.lasts, plan.vanish, plan.sweeps = 420.0, 400.0, 60.0
    plan.script = (Wish("long", at=0.0, seconds=900, spot="on-demand", retry=rng.choice(((), ("interruption",)))),)


def _at_the_agent(plan: Plan, rng: random.Random) -> None:
    """Servers die around what they ask of an agent; runs are stopped while they run."""
    plan.kills |= {"before agent put_job": 0.2, "after agent put_job": 0.2, "after agent stop_job": 0.6}
    plan.weather, plan.lasts = _FAIR, 120.0
    plan.script = tuple(Wish(f"run-{n}", at=rng.uniform(0, 30), seconds=200, stop_after=50.0) for n in range(3))


def _led_astray(plan: Plan, rng: random.Random) -> None:
    """A server dies before it gives a job away, its instance is taken away, and the next one gets the address."""
    plan.servers, plan.resync, plan.lasts = 2, 10.0, 60.0
    plan.weather, plan.reuse_addresses = Weather(starts=(1, 2), ends=(0, 2)), True
    _quiet(plan)
    plan.kills, plan.down_for = {"before agent put_job": 0.6}, 60.0
    plan.interrupts = (rng.uniform(6, 8),)
    retry = rng.choice(((), ("interruption", "no-capacity")))
    later = (Wish(f"later-{n}", at=rng.uniform(14, 20), spot="on-demand") for n in range(2))
    plan.script = (Wish("first", at=0.0, spot="spot", retry=retry), *later)


def _short(plan: Plan, rng: random.Random) -> None:
    """Next to nothing is to be had, and then something is."""
    plan.runs, plan.lasts = 3, 240.0
    plan.droughts = (Drought(end=rng.uniform(100, 240), instance_type="small"),)
    plan.hook_faults["create", "no capacity"] = 0.3


STEERINGS: tuple[Steering, ...] = (
    _outlived,
    _at_the_agent,
    _made_too_late,
    _old_copy,
    _slow_end,
    _unlisted,
    _replayed,
    _led_astray,
    _short,
)
