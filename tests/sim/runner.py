"""Runs many worlds on all cores, and says what came of them."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.sim.bugs import BUGS, with_bug
from tests.sim.crashes import SCENARIOS, crash_worlds, scenario_world
from tests.sim.sometimes import missing
from tests.sim.world import Outcome, World

_GATE_FROM = 500
"""So many seeds must have reached everything."""


@dataclass
class Report:
    """What to print, and whether it is good news."""

    text: str
    good: bool


@dataclass(frozen=True)
class Job:
    """One world to run, in whichever process.

    Attributes:
        again: the line that runs it again.
        make: which world, by name, and with what.
    """

    make: str
    arguments: tuple[Any, ...]
    again: str


@dataclass
class Result:
    """What is kept of a world."""

    again: str
    violations: list[str]
    seen: Counter[str] = field(default_factory=Counter)
    cpu: float = 0.0
    virtual: float = 0.0


def _seed(seed: int) -> Outcome:
    return World(seed).run()


def _crash(scenario: str, kill_at: tuple[int, ...]) -> Outcome:
    return scenario_world(scenario, kill_at).run()


def _bug(name: str, seed: int) -> Outcome:
    with with_bug(name):
        return World(seed).run()


_MAKERS: dict[str, Callable[..., Outcome]] = {"seed": _seed, "crash": _crash, "bug": _bug}


def _run(job: Job) -> Result:
    begin = time.process_time()
    try:
        outcome = _MAKERS[job.make](*job.arguments)
    except Exception as error:  # noqa: BLE001  # one broken world must not hide the others
        return Result(job.again, [f"the simulation itself failed: {error!r}"])
    finally:
        gc.collect(1)
    return Result(job.again, outcome.violations, outcome.seen, time.process_time() - begin, outcome.seconds)


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Runs worlds side by side; the results come as they come."""
    if workers <= 1:
        yield from map(_run, jobs)
        return
    # Everything that is made once is made before the processes part.
    World(0).run()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(_run, jobs, chunksize=4)


def run_seeds(seeds: Sequence[int], workers: int) -> Report:
    """Runs worlds of these seeds."""
    begin = time.perf_counter()
    jobs = [Job("seed", (seed,), f"python -m tests.sim --seed {seed}") for seed in seeds]
    results = list(run_jobs(jobs, workers))
    took = time.perf_counter() - begin
    seen, lines = _summary(results)
    lines += [f"{count:8}  {name}" for name, count in sorted(seen.items())]
    lines.append(_pace(results, took, "seeds"))
    absent = missing(seen) if len(results) >= _GATE_FROM else []
    lines += [f"NEVER REACHED: {name}" for name in absent]
    failed = sum(bool(one.violations) for one in results)
    lines.append(f"{failed} of {len(results)} seeds failed")
    return Report("\n".join(lines), not failed and not absent)


def run_crashes(workers: int, pairs: int) -> Report:
    """Kills at every point of every scenario, and at pairs of points."""
    begin = time.perf_counter()
    jobs = [
        Job(
            "crash", (name, kill_at), f"python -m tests.sim --scenario {name!r} --kill-at {' '.join(map(str, kill_at))}"
        )
        for name in SCENARIOS
        for kill_at in crash_worlds(name, pairs)
    ]
    results = list(run_jobs(jobs, workers))
    _, lines = _summary(results)
    lines.append(_pace(results, time.perf_counter() - begin, "crashes"))
    failed = sum(bool(one.violations) for one in results)
    lines.append(f"{failed} of {len(results)} were not survived")
    return Report("\n".join(lines), not failed)


def run_bugs(workers: int, most: int) -> Report:
    """Puts one bug after the other into the engine, and counts the seeds that it takes to find it."""
    lines, good = [], True
    for name in BUGS:
        found = find_bug(name, most, workers)
        good = good and found is not None
        said = f"found by seed {found[0]}: {found[1]}" if found else f"NOT FOUND in {most} seeds"
        lines.append(f"{name}: {said}")
    return Report("\n".join(lines), good)


def find_bug(name: str, most: int, workers: int = 1) -> tuple[int, str] | None:
    """The first seed that notices a bug, and what it says."""
    jobs = (Job("bug", (name, seed), str(seed)) for seed in range(most))
    found = [(int(one.again), one.violations[0]) for one in _until_found(run_jobs(jobs, workers)) if one.violations]
    return min(found, default=None)


def _until_found(results: Iterator[Result]) -> Iterator[Result]:
    for one in results:
        yield one
        if one.violations:
            return


def replay(seed: int | None, scenario: str | None, kill_at: tuple[int, ...]) -> int:
    """Runs one world again, and prints its history."""
    world = World(seed, keep=True) if seed is not None else scenario_world(scenario or "", kill_at, keep=True)
    outcome = world.run()
    lines = [*outcome.history, *(f"VIOLATION {text}" for text in outcome.violations), f"digest {outcome.digest}"]
    print("\n".join(lines))  # noqa: T201  # for people
    return 1 if outcome.violations else 0


def _summary(results: Iterable[Result]) -> tuple[Counter[str], list[str]]:
    seen: Counter[str] = Counter()
    lines = []
    for one in results:
        seen.update(one.seen)
        if one.violations:
            lines += [f"FAILED  {one.again}", *(f"    {text}" for text in one.violations[:5])]
    return seen, lines


def _pace(results: Sequence[Result], took: float, what: str) -> str:
    cpu, virtual = sum(one.cpu for one in results), sum(one.virtual for one in results)
    count = len(results)
    return (
        f"{count} {what} in {took:.1f} s: {count / took:.1f} a second, {count / max(cpu, 1e-9):.1f} a second of CPU; "
        f"{virtual / 3600:.1f} virtual hours"
    )
