"""Prints a table: each mutant, the case that caught it, and what its author reads.

`python -m tests.mutants` runs the case that each mutant names. With `--full` each mutant goes through the whole suite
until the first case fails, which takes minutes; with names, only those.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.mutants._run import Result


def main(arguments: list[str]) -> int:
    """The number of mutants that got through."""
    from tests.mutants._run import run
    from tests.mutants.backends import MUTANTS

    names = [one for one in arguments if not one.startswith("-")]
    chosen = [one for one in MUTANTS if not names or one.name in names]
    with tempfile.TemporaryDirectory() as folder:
        if "--full" in arguments:
            found = [result for one in chosen for result in run(Path(folder), [one.name], "-x")]
        else:
            found = run(Path(folder), [f"{one.name}::{one.caught_by}" for one in chosen])
    caught: dict[str, Result] = {}
    for result in found:
        if result.message:
            caught.setdefault(result.mutant, result)
    for one in chosen:
        print("\n".join(row(one.name, caught.get(one.name))))  # noqa: T201  # for people
    print(f"{len(caught)} of {len(chosen)} mutants were caught")  # noqa: T201  # for people
    return len(chosen) - len(caught)


def row(name: str, result: Result | None) -> list[str]:
    """A mutant, the case, and the message."""
    if result is None:
        return [f"{name:26} --- not caught ---"]
    lines = result.message.removeprefix("AssertionError: ").splitlines()
    return [f"{name:26} {result.case}", *(f"{'':26}   {line}" for line in lines), ""]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "nimbus"))
    sys.exit(main(sys.argv[1:]))
