"""The simulation from the command line: many seeds, one seed again, crash points, deliberate bugs.

python -m tests.sim --seeds 500        500 seeds on all cores, with what they reached
python -m tests.sim --seed 17          one history in words
python -m tests.sim --crashes          a kill at every point where a side effect is crossed
python -m tests.sim --bugs             how many seeds it takes to find each deliberate bug
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.sim.runner import Report, replay, run_bugs, run_crashes, run_seeds


def main(arguments: list[str] | None = None) -> int:
    """Runs what the arguments say; 0 when all invariants held and everything was reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many (500)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    parser.add_argument("--seed", type=int, help="run this one, and print its history")
    parser.add_argument("--kill-at", type=int, nargs="*", default=[], help="with --scenario: numbers of points")
    parser.add_argument("--scenario", help="run this scenario of the crash points, and print its history")
    parser.add_argument("--crashes", action="store_true", help="enumerate the crash points")
    parser.add_argument("--pairs", type=int, default=100, help="with --crashes: random pairs for each scenario (100)")
    parser.add_argument("--bugs", action="store_true", help="look for deliberate bugs")
    given = parser.parse_args(arguments)
    if given.seed is not None or given.scenario is not None:
        return replay(given.seed, given.scenario, tuple(given.kill_at))
    report: Report
    if given.crashes:
        report = run_crashes(given.workers, given.pairs)
    elif given.bugs:
        report = run_bugs(given.workers, given.seeds)
    else:
        report = run_seeds(range(given.first, given.first + given.seeds), given.workers)
    print(report.text)  # noqa: T201  # for people
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
