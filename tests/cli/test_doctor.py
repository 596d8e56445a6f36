"""`dstack doctor`, with a real server and real instances on this computer."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from dstack.api import Client, Run, Task
from tests.cli.test_commands import dstack
from tests.support.homes import Home, ended

SLEEPER = Task(commands=["sleep 1000"], stop_duration=0)


def running(client: Client, name: str) -> Run:
    """A run whose instance is there."""
    run = client.runs.submit(SLEEPER, run_name=name)
    run.attach()
    run.detach()
    return run


def database_files(home: Home) -> list[Path]:
    """The database, with what SQLite keeps beside it."""
    return sorted((home.path / "server").glob("server.db*"))


def test_a_healthy_home_needs_nobody(client: Client, home: Home) -> None:
    """The instance of a run, with its name, and exit code 0; as JSON as well."""
    run = running(client, "sleeper")
    shown = dstack(home, "doctor")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "sleeper" in shown.stdout
    assert "is in use" in shown.stdout
    assert "Nothing needs a person." in shown.stdout
    found = json.loads(dstack(home, "doctor", "--json").stdout)
    assert [(one["run_name"], one["verdict"], one["cost"]) for one in found["instances"]] == [("sleeper", "ours", 0.0)]
    assert dstack(home, "doctor", "--fix", "--yes").returncode == 0
    run.refresh()
    assert run.status.value == "running"
    run.stop(abort=True)
    ended(run)


def test_a_restored_database_is_found_out(client: Client, home: Home) -> None:
    """An old copy of the database is put back while an instance runs: nothing is ended, and a person is asked."""
    client.runs.list()
    home.kill_server(signal.SIGTERM)
    copies = home.path / "copies"
    copies.mkdir()
    for file in database_files(home):
        shutil.copy(file, copies)
    running(client, "later")
    home.kill_server()
    for file in database_files(home):
        file.unlink()
    for file in copies.iterdir():
        shutil.copy(file, home.path / "server")
    shown = dstack(home, "doctor")
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert "restored from a copy" in shown.stdout
    assert "has lost its intent" in shown.stdout
    refused = dstack(home, "doctor", "--confirm-restore", given="n\n")
    assert refused.returncode == 1
    assert dstack(home, "doctor").returncode == 1
    confirmed = dstack(home, "doctor", "--confirm-restore", "--yes")
    assert confirmed.returncode == 0, confirmed.stdout + confirmed.stderr
    assert "too young to be judged" in confirmed.stdout
    assert len(home.agents()) == 1


def test_what_another_database_left_is_shown_and_not_touched(client: Client, home: Home) -> None:
    """A new database has a new owner: the instances of the old one belong to somebody else."""
    running(client, "left")
    home.kill_server()
    for file in database_files(home):
        file.unlink()
    shown = dstack(home, "doctor", "--fix", "--yes")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    own, others = shown.stdout.split("Instances of other owners")
    assert "none" in own
    assert "dstack-" in others
    assert len(home.agents()) == 1


def test_a_sweeper_that_is_told_nonsense_does_not_start(home: Home) -> None:
    """The variable has two values."""
    home.env["DSTACK_SWEEPER"] = "perhaps"
    refused = dstack(home, "doctor")
    assert refused.returncode != 0
    assert "neither 'on' nor 'report'" in refused.stderr


@pytest.mark.parametrize("value", ["on", "report"])
def test_a_sweeper_that_only_reports_says_so(home: Home, value: str) -> None:
    """In the report."""
    home.env["DSTACK_SWEEPER"] = value
    assert ("only reports" in dstack(home, "doctor").stdout) is (value == "report")
