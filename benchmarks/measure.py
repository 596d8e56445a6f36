"""Clocks, memory and processes: how things are measured, whoever made them."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
import tty
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def run_program(python: Path, name: str, *args: str, env: Mapping[str, str], timeout: float = 600) -> Any:
    """Runs one of `programs/` with that interpreter; its last line of output is a JSON document, returned."""
    done = subprocess.run(
        [str(python), "-P", str(PROGRAMS / name), *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(args)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Import:
    """A statement that a program begins with, in the environment where it works."""

    python: Path
    statement: str
    env: Mapping[str, str]


def import_costs(subjects: Mapping[str, Import], repeat: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds that each takes in a fresh interpreter, and the memory of the process after it in MB.

    All take turns, so that a busy moment of the machine falls on all of them.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for _ in range(repeat + 1):
        for name, subject in subjects.items():
            samples[name].append(run_program(subject.python, "import_cost.py", subject.statement, env=subject.env))
    return {name: import_cost(taken[1:]) for name, taken in samples.items()}  # the first turn compiles


def import_cost(samples: list[dict[str, float]]) -> tuple[float, float]:
    """Medians of one subject's samples."""
    return 1000 * median(s["seconds"] for s in samples), median(s["megabytes"] for s in samples)


def terminal_speed(size: int) -> float:
    """MB/s that a bare pseudo-terminal of this machine moves from one process to another that does nothing with it."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    line = "The quick brown fox jumps over the lazy dog, again and again, until the spool is full and nothing is lost."
    with subprocess.Popen(["/bin/sh", "-c", f"yes '{line}' | head -c {size}"], stdout=theirs, stderr=theirs):
        os.close(theirs)
        read, start = 0, time.monotonic()
        while read < size:
            read += len(os.read(ours, 1 << 18))
        seconds = time.monotonic() - start
        os.close(ours)
    return size / seconds / 1e6


def resident_mb(pid: int) -> float:
    """Memory of a process now, in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has ended")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_cpu_percent(pid: int, seconds: float) -> float:
    """Share of one CPU that a process uses while nobody asks anything of it."""
    before, start = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return 100 * (cpu_seconds(pid) - before) / (time.monotonic() - start)
