"""The script that is process 1 of a container, in a process-id namespace of its own, without an engine around it."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from dstack_core._agent.container import _SHELL

PROGRAM = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done"
TRIES = 20


@pytest.mark.root
@pytest.mark.parametrize("shell", ["sh", "bash", "busybox sh"])
def test_the_programs_own_exit_code_survives_a_stop(shell: str) -> None:
    """However soon the program ends after the signal, which a shell may learn before or while it waits again."""
    argv = shell.split()
    if shutil.which(argv[0]) is None:
        pytest.skip(f"there is no {argv[0]} here")
    script = _SHELL.replace("/dev/dstack-terminal", "/dev/null/none")
    codes = Counter(_stopped([*argv, "-c", script, "sh", *argv, "-c", PROGRAM]) for _ in range(TRIES))
    assert codes == {7: TRIES}


def _stopped(argv: list[str]) -> int:
    """Runs it as process 1, sends it SIGTERM once the program is ready, and returns its exit code."""
    process = subprocess.Popen(["unshare", "--pid", "--fork", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", first], check=True)
        return process.wait(60)
