"""Metrics: the whole tree together, and the GPUs as nvidia-smi sees them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dstack_core.testing import wait_until
from tests.support.real_agents import LONG, RealAgent, StartAgent

NVIDIA_SMI = """#!/bin/sh
echo "$@" >>{calls}
echo 'NVIDIA L4, 37, 1024, 23034'
echo 'NVIDIA A100-SXM4-40GB, [N/A], 5, 40960'
"""


def metrics(agent: RealAgent) -> dict[str, Any]:
    """Of job `1`, now."""
    return agent.get("/v1/jobs/1/metrics")


def test_the_whole_tree_counts(agent: RealAgent) -> None:
    """Children and grandchildren: how many, what they use, and what they had used when they ended."""
    busy = "sum(i * i for i in range(3_000_000))"
    child = f'{sys.executable} -c "b = bytearray(50 << 20); {busy}; print(1); import time; time.sleep(600)"'
    agent.run(f"{sys.executable} -c '{busy}'; {child} & {child} & wait")
    wait_until(lambda: agent.log()[0].count(b"1\n") == 2, timeout=LONG, what="both children")
    found = metrics(agent)
    assert found["processes"] == 3
    assert found["memory_mib"] > 100
    assert found["cpu_seconds"] > 0.1
    assert found["at"].endswith("+00:00")
    agent.stop(0)
    agent.wait()
    assert metrics(agent)["processes"] == 0
    assert metrics(agent)["cpu_seconds"] >= found["cpu_seconds"]


def test_cpu_time_of_ended_children_stays(agent: RealAgent) -> None:
    """It only grows, although the processes that used it come and go."""
    agent.run(f"for i in 1 2 3 4 5; do {sys.executable} -c 'sum(i * i for i in range(2_000_000))'; done; sleep 600")
    last = 0.0

    def grown() -> bool:
        nonlocal last
        now = metrics(agent)
        assert now["cpu_seconds"] >= last - 0.02
        last = now["cpu_seconds"]
        return bool(now["processes"] == 2 and last > 0.3)

    wait_until(grown, timeout=LONG, what="the five to have ended")


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> Path:
    """A folder with an `nvidia-smi` that reports two GPUs, and notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(calls=folder / "calls"))
    program.chmod(0o755)
    return folder


def test_gpus(start_agent: StartAgent, nvidia_smi: Path) -> None:
    """Name, utilisation and memory of each; what the driver does not know is zero."""
    agent = start_agent(env={"PATH": f"{nvidia_smi}:{os.environ['PATH']}", "DSTACK_GPUS": ""})
    agent.run("sleep 600")
    assert metrics(agent)["gpus"] == [
        {"name": "NVIDIA L4", "utilization_percent": 37.0, "memory_used_mib": 1024.0, "memory_total_mib": 23034.0},
        {
            "name": "NVIDIA A100-SXM4-40GB",
            "utilization_percent": 0.0,
            "memory_used_mib": 5.0,
            "memory_total_mib": 40960.0,
        },
    ]


@pytest.mark.parametrize(("granted", "gpus", "expected"), [("GPU-a,GPU-b", "all", "GPU-a,GPU-b"), ("", [1, 3], "1,3")])
def test_only_the_gpus_of_the_job(
    start_agent: StartAgent, nvidia_smi: Path, granted: str, gpus: object, expected: str
) -> None:
    """Those that the instance was given, or that the job names."""
    agent = start_agent(env={"PATH": f"{nvidia_smi}:{os.environ['PATH']}", "DSTACK_GPUS": granted})
    agent.run("sleep 600", gpus=gpus)
    metrics(agent)
    assert f"--id={expected}" in (nvidia_smi / "calls").read_text()


def test_no_gpus(start_agent: StartAgent, tmp_path: Path) -> None:
    """Without nvidia-smi the list is empty."""
    agent = start_agent(env={"PATH": str(tmp_path)})
    agent.run(argv=["/bin/sleep", "600"])
    assert metrics(agent)["gpus"] == []
