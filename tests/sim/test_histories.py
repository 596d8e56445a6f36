"""A part of the simulation, small enough for every run of the tests; `nox -s sim` runs more of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dstack_core.testing import Weather
from tests.sim.bugs import BUGS
from tests.sim.crashes import SCENARIOS, points_of, scenario_world
from tests.sim.plan import Plan
from tests.sim.runner import find_bug
from tests.sim.sometimes import SOMETIMES, missing
from tests.sim.users import Wish
from tests.sim.world import World

ROOT = Path(__file__).parents[2]
SEEDS = range(60)
_AT_A_TIME = 10
_EVERY = 23
"""Of the points of a scenario, so many lie between those at which it is tried here."""

_DIGESTS = "from tests.sim.world import World; print(*(World(seed).run().digest for seed in (3, 4, 11, 12)))"


def digests(hash_seed: str) -> str:
    """The digests of some histories, in a process of their own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", _DIGESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_seed_is_one_history() -> None:
    """In two processes that hash differently, every call, every crash and every row is the same."""
    one, other = digests("1"), digests("2")
    assert one == other
    assert len(set(one.split())) == 4


@pytest.mark.parametrize("first", SEEDS[::_AT_A_TIME])
def test_what_must_hold_holds_in_every_history(first: int) -> None:
    """Whatever goes wrong: one instance for each intent, each claimed, no run lost, no job twice, no byte missing."""
    failed = {}
    for seed in range(first, first + _AT_A_TIME):
        outcome = World(seed).run()
        if outcome.violations:
            failed[f"python -m tests.sim --seed {seed}"] = outcome.violations
    assert failed == {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_anywhere_is_survived(name: str) -> None:
    """A server that dies at a point where a side effect is crossed is followed by one that settles everything."""
    failed = {}
    for number in range(0, len(points_of(name)), _EVERY):
        outcome = scenario_world(name, (number,)).run()
        if outcome.violations:
            failed[f"python -m tests.sim --scenario {name!r} --kill-at {number}"] = outcome.violations
    assert failed == {}


@pytest.mark.parametrize("bug", BUGS)
def test_a_deliberate_bug_is_found(bug: str) -> None:
    """The simulation has teeth: each bug that does harm is found within a few dozen seeds."""
    assert find_bug(bug, 100) is not None


def test_what_is_not_reached_is_told() -> None:
    """A fault or a way out that no seed has come to fails the long run, and each is told by name."""
    everything = Counter(SOMETIMES)
    assert missing(everything) == []
    for name in ("a server was killed", "swept: unknown"):
        assert missing(everything - Counter([name])) == [name]


# -- what was found, each as the smallest world that shows it ------------------------------------------------------


@pytest.mark.parametrize("point", ["before agent put_job", "after agent put_job"])
def test_a_job_that_may_have_run_is_not_begun_again(point: str) -> None:
    """The server dies around giving the job away, and its spot instance goes while it is down."""
    number = points_of("spot loss").index(point)
    assert scenario_world("spot loss", (number,)).run().violations == []


def test_an_address_that_was_used_again_leads_no_job_astray() -> None:
    """An instance goes unnoticed while it starts, and the next one gets its address and answers there."""
    wishes = (
        Wish("first", at=0.0, seconds=30, spot="spot", retry=("interruption", "no-capacity")),
        Wish("second", at=12.0, seconds=30, spot="on-demand"),
    )
    weather = Weather(starts=(2, 2), boots=(9, 9), ends=(0, 0))
    plan = Plan(lasts=60, weather=weather, script=wishes, reuse_addresses=True, interrupts=(6.0,))
    outcome = World(1, plan).run()
    assert outcome.violations == []
    assert outcome.seen["cloud: an address was used again"]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("servers", [1, 2])
def test_nothing_is_swept_after_an_old_copy_was_restored(servers: int, kept: bool) -> None:
    """What the copy does not know may be in use: it ends itself, by its own lease, and by nobody else."""
    wishes = (Wish("before", at=0.0, seconds=100), Wish("after", at=15.0, seconds=400))
    weather = Weather(starts=(1, 2), boots=(1, 2), ends=(1, 5))
    plan = Plan(lasts=120, servers=servers, kept=kept, restore=(5.0, 40.0), weather=weather, script=wishes)
    outcome = World(3, plan).run()
    assert outcome.violations == []
    assert outcome.seen["cloud: a machine powered itself off"] == 1


def test_whoever_stood_still_before_its_call_does_not_make_it() -> None:
    """A server stands still between intent and call, another one finds that nothing came of it, and the run is over."""
    wishes = (Wish("task", at=0.0, seconds=10, stop_after=5.0),)
    plan = Plan(servers=2, resync=10.0, lasts=270.0, script=wishes, stills={"intent": 1.0}, still_for=(220.0,))
    outcome = World(1, plan).run()
    assert outcome.violations == []
    assert outcome.seen["a server stood still right after a transaction"] == 1
    assert outcome.seen["a result was turned away, since its lease was lost"] == 1
    assert outcome.seen["instance: unknown -> failed"] == 1
