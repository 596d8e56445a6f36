"""A pytest of its own over mutants, and what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).parents[2]
SUITE = "tests/mutants/suite.py"


@dataclass(frozen=True)
class Result:
    """What became of one case.

    Attributes:
        mutant: the class of the backend.
        case: its name, with its parameters.
        message: why it failed; empty when it passed.
    """

    mutant: str
    case: str
    message: str = ""


def run(folder: Path, cases: Sequence[str], *options: str) -> list[Result]:
    """Runs cases, as `MUTANT::case` or `MUTANT`, and returns what became of each, in order."""
    report = folder / f"report-{uuid4()}.jsonl"
    paths = [str(ROOT), str(ROOT / "tests/support/nimbus")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"),
            *("-p", "tests.mutants._report", *options),
            *(f"{SUITE}::Test{case}" for case in cases),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MUTANTS_REPORT": str(report)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return [_result(json.loads(line)) for line in report.read_text().splitlines()]


def _result(line: dict[str, str]) -> Result:
    _, mutant, case = line["id"].split("::")
    return Result(mutant.removeprefix("Test"), case, line["message"])
