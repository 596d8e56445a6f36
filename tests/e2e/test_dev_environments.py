"""Dev environments on this computer, through the public API: opened, worked in, left alone, stopped."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack.api import Client, DevEnvironment, Run, RunStatus
from dstack_core._models.runs import Reason
from dstack_core.testing import wait_until
from tests.support.docker import Docker, docker, docker_engine
from tests.support.homes import Home, ended, processes

__all__ = ["docker", "docker_engine"]

LIMIT = 3
"""Seconds without anybody after which these dev environments end, if they do."""


def opening(run: Run) -> str:
    """What the run prints until it can be opened."""
    text = ""
    for chunk in run.logs():
        text += chunk.decode()
        if "It runs until" in text and text.endswith("\n"):
            return text
    raise AssertionError(f"{run.name} ended: {text}")


def folder_of(text: str) -> Path:
    """Its folder, as it is told."""
    found = re.search(r" is ready\. Its folder is (.*)", text)
    assert found
    return Path(found[1])


def line(text: str, title: str) -> str:
    """A way in, as it is told."""
    found = re.search(rf"  {title}: +(.*)", text)
    assert found, text
    return found[1]


def outlives(run: Run, seconds: float) -> None:
    """The run goes on for that long from now on."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until or finished(run), timeout=seconds + 30, what="the time")
    assert run.status is RunStatus.RUNNING, run.message


def finished(run: Run) -> bool:
    """Whether it has ended, as of now."""
    run.refresh()
    return run.status.is_finished


def ends_by_itself(run: Run) -> None:
    """For want of anybody at work, and says so."""
    ended(run)
    assert (run.status, run.reason) == (RunStatus.TERMINATED, Reason.INACTIVE)
    assert (run.message or "").startswith(f"nobody was at work in it for {LIMIT} s (inactivity_duration). Submit it")


@contextmanager
def terminal(command: list[str], folder: Path | None = None) -> Iterator[None]:
    """A program that somebody works with, until the end of the block."""
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin
        assert shell.stdout
        shell.stdin.write(b"echo here\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == b"here\n"
        yield
        shell.communicate()


@pytest.mark.parametrize(
    ("ide", "uri", "command"),
    [("vscode", "vscode://file", "code"), ("cursor", "cursor://file", "cursor"), ("zed", "zed://file", "zed")],
)
def test_it_says_how_to_open_it_and_stays(client: Client, home: Home, ide: str, uri: str, command: str) -> None:
    """The folder that is told is there, with what `init` did in it; it stays until stopped."""
    configuration = DevEnvironment(ide=ide, init=["echo one", "echo two > file"])  # type: ignore[arg-type]  # one of the four
    run = client.runs.submit(configuration, run_name="a-run")
    text = opening(run)
    folder = folder_of(text)
    assert text.startswith("one\n")
    assert (folder / "file").read_text() == "two\n"
    assert re.search(rf"  Open in .*: +{uri}{folder}\n", text)
    assert line(text, "or in a terminal") == f"{command} {folder}"
    run.refresh()
    assert run.status is RunStatus.RUNNING
    run.stop()
    assert ended(run).status is RunStatus.TERMINATED
    wait_until(lambda: not [p for p in processes(home.path) if "_server" not in p[1]], what="an empty tree")


def test_no_ide(client: Client) -> None:
    """The folder, and how to get there."""
    text = opening(client.runs.submit(DevEnvironment()))
    assert line(text, "Go there") == f"cd {folder_of(text)}"


def test_an_init_command_that_fails(client: Client) -> None:
    """Fails the run with its exit code; what comes after it does not run, and nothing is said to be ready."""
    run = client.runs.submit(DevEnvironment(ide="vscode", init=["echo one", "exit 7", "echo two"]))
    assert b"".join(run.logs()) == b"one\n"
    ended(run)
    assert (run.status, run.exit_code, run.reason) == (RunStatus.FAILED, 7, Reason.EXITED_WITH_ERROR)


def test_the_plan_shows_the_defaults(client: Client) -> None:
    """On demand, and at most 6 hours."""
    (job,) = client.runs.get_plan(DevEnvironment(ide="vscode")).job_plans
    assert (job.job_spec.requirements.spot_policy.value, job.job_spec.max_duration) == ("on-demand", 6 * 3600)


def test_max_duration_ends_it(client: Client) -> None:
    """As any run, whoever is at work."""
    run = client.runs.submit(DevEnvironment(ide="vscode"), max_duration=1)
    with terminal(["/bin/sh"], folder_of(opening(run))):
        assert ended(run).reason is Reason.MAX_DURATION_EXCEEDED


def test_a_terminal_in_the_folder_keeps_it(client: Client) -> None:
    """Until the terminal is closed; then it ends by itself."""
    run = client.runs.submit(DevEnvironment(ide="vscode", inactivity_duration=LIMIT))
    with terminal(["/bin/sh"], folder_of(opening(run))):
        outlives(run, 2 * LIMIT)
    ends_by_itself(run)


def test_a_client_that_is_attached_keeps_it(client: Client) -> None:
    """Until it detaches; its ports are forwarded meanwhile."""
    run = client.runs.submit(DevEnvironment(ide="vscode", inactivity_duration=LIMIT, ports=["*:18425"]))
    assert run.attach()
    assert run.ports == {18425: 18425}
    outlives(run, 2 * LIMIT)
    run.detach()
    ends_by_itself(run)


def test_attached_across_a_crash_of_the_server(client: Client, home: Home) -> None:
    """The next server takes note of who is attached, and the agent has not forgotten meanwhile."""
    run = client.runs.submit(DevEnvironment(ide="vscode", inactivity_duration=15))
    with run:
        assert run.attach()
        home.kill_server(signal.SIGKILL)
        outlives(run, 20)
    assert ended(run).reason is Reason.INACTIVE


def test_nobody_and_a_server_that_is_gone(client: Client, home: Home) -> None:
    """It ends without a server, too, and the next one learns why."""
    run = client.runs.submit(DevEnvironment(ide="vscode", inactivity_duration=LIMIT))
    opening(run)
    home.kill_server(signal.SIGKILL)
    wait_until(lambda: not jobs_of(home), timeout=60, what="the end of the job")
    ends_by_itself(run)


def jobs_of(home: Home) -> list[str]:
    """What runs in a home and is a job's."""
    return [command for _, command in processes(home.path) if command.startswith("sleep 2147483647")]


def test_off_is_never(client: Client) -> None:
    """Nobody at work, and it stays."""
    run = client.runs.submit(DevEnvironment(ide="vscode", inactivity_duration="off"))
    opening(run)
    outlives(run, LIMIT)


# ------------------------------------------------------------------------------------------------------ containers --


@pytest.fixture
def inside(docker: Docker, client: Client) -> Iterator[tuple[Docker, Client]]:
    """A client whose server finds the container engine."""
    yield docker, client
    for run in client.runs.list():
        run.stop(abort=True)
        ended(run)


@pytest.mark.docker
@pytest.mark.parametrize("ide", ["vscode", "cursor"])
def test_in_a_container(inside: tuple[Docker, Client], ide: str) -> None:
    """The address names the container that is really there, and the folder in it; the shell's command works."""
    docker, client = inside
    run = client.runs.submit(DevEnvironment(ide=ide, image=docker.image(), working_dir="/tmp", init=["touch here"]))  # type: ignore[arg-type]  # one of the four
    text = opening(run)
    title = {"vscode": "VS Code", "cursor": "Cursor"}[ide]
    found = re.fullmatch(rf"{ide}://vscode-remote/attached-container\+([0-9a-f]+)/tmp", line(text, f"Open in {title}"))
    assert found
    name = json.loads(bytes.fromhex(found[1]))["containerName"]
    assert docker("inspect", "--format", "{{.Name}}", name.removeprefix("/")) == name
    command = {"vscode": "code", "cursor": "cursor"}[ide]
    wanted = f"{command} --folder-uri vscode-remote://attached-container+{found[1]}/tmp"
    assert line(text, "or in a terminal") == wanted
    enter = [word for word in shlex.split(line(text, "Shell in it")) if word != "-it"]
    assert subprocess.check_output([*enter, "-c", "ls /tmp"], env=docker.env).split() == [b"here"]


@pytest.mark.docker
@pytest.mark.parametrize(("ide", "lines"), [("zed", 1), ("windsurf", 2), (None, 1)])
def test_in_a_container_that_the_ide_cannot_open(inside: tuple[Docker, Client], ide: str | None, lines: int) -> None:
    """A shell in it, and for Windsurf the command of its own that asks for the container's name."""
    docker, client = inside
    text = opening(client.runs.submit(DevEnvironment(ide=ide, image=docker.image())))  # type: ignore[arg-type]  # one of the four
    name = line(text, "Shell in it").split()[-2]
    assert docker("inspect", "--format", "{{.Name}}", name) == f"/{name}"
    assert len(re.findall(r"^  \S", text, re.MULTILINE)) == lines
    assert ide != "windsurf" or line(text, "Open in Windsurf").endswith(f"Attach to Running Container, {name}")


@pytest.mark.docker
def test_a_session_in_the_container_keeps_it(inside: tuple[Docker, Client]) -> None:
    """Until it is closed; then the dev environment ends by itself, and so does its container."""
    docker, client = inside
    run = client.runs.submit(DevEnvironment(ide="vscode", image=docker.image(), inactivity_duration=LIMIT))
    enter = shlex.split(line(opening(run), "Shell in it").replace("-it", "-i"))
    with terminal([docker.program, *enter[1:]]):
        outlives(run, 2 * LIMIT)
    ends_by_itself(run)
    wait_until(lambda: enter[-2] not in docker("ps", "--all", "--format", "{{.Names}}"), what="no container")


def test_every_ide_is_tested() -> None:
    """What the model accepts as an IDE, the text knows."""
    from dstack_core._engine.dev_environments import _IDES

    said = DevEnvironment.model_json_schema()["properties"]["ide"]
    accepted = itertools.chain.from_iterable(choice.get("enum", []) for choice in said["anyOf"])
    assert sorted(accepted) == sorted(_IDES)
