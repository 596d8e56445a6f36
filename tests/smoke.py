"""Run by `nox -s wheels` where only the built wheels are installed: the API imports, a task runs, the command answers.

`python -I tests/smoke.py HOME`, with the home folder to use, which is made.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def main(home: Path) -> None:
    """Everything a newcomer's first minute touches."""
    home.mkdir(parents=True, exist_ok=True)
    os.environ.update(HOME=str(home), DSTACK_HOME=str(home / "dstack"), DSTACK_SERVER_IDLE_SECONDS="1")
    run_a_task()
    version = importlib.metadata.version("dstack-core")
    assert version in output("version"), "`dstack version` names the installed version"
    assert "local" in output("backends"), "`dstack backends` lists what is installed"


def run_a_task() -> None:
    """Submits a task, reads what it prints, and sees it done."""
    import dstack.api
    from dstack.api import Client, RunStatus, Task

    assert Path(dstack.api.__file__).is_relative_to(sys.prefix), f"not the wheel: {dstack.api.__file__}"
    run = Client.from_config().runs.submit(Task(commands=["echo hi"]))
    assert b"".join(run.logs()) == b"hi\n"
    run.refresh()
    assert run.status is RunStatus.DONE, run.status


def output(*arguments: str) -> str:
    """What the command `dstack` prints."""
    command = Path(sysconfig.get_path("scripts")) / "dstack"
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
