"""What a dev environment runs, and the text that says how to open it, run by the shells that there are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dstack.api import ConfigurationError, DevEnvironment, Profile
from dstack_core._engine.dev_environments import reached_by
from dstack_core._engine.specs import agent_job_spec, job_specs, script_of
from dstack_core._models.instances import Endpoint
from dstack_core._models.profiles import SpotPolicy
from dstack_core._models.runs import JobSpec, RunSpec

SHELLS = [shell for shell in (["bash"], ["dash"], ["busybox", "sh"], ["sh"]) if shutil.which(shell[0])]
STOP = "It runs until you stop it: dstack stop a-run\n"
GOES = "What is in its folder goes with it: push it, or copy it, before that.\n"
SSH = Endpoint(ssh_host="192.0.2.1", ssh_port=22, ssh_user="ubuntu")


def spec_of(configuration: DevEnvironment, **profile: object) -> JobSpec:
    """The one job of a dev environment."""
    (spec,) = job_specs(RunSpec(configuration=configuration, profile=Profile(**profile)), "a-run")  # type: ignore[arg-type]  # fields by name
    return spec


def printed(configuration: DevEnvironment, folder: Path, env: dict[str, str] | None = None) -> str:
    """What the job prints, the same in every shell; it does not wait here."""
    *commands, stay = spec_of(configuration).commands
    assert stay == "exec sleep 2147483647"
    outputs = {
        subprocess.run(
            [*shell, "-c", script_of(tuple(commands))],
            cwd=folder,
            env={"PATH": os.environ["PATH"], **(env or {})},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for shell in SHELLS
    }
    assert len(outputs) == 1
    return outputs.pop()


def lines(text: str) -> dict[str, str]:
    """The ways in, by what they are called."""
    found = [line.strip().split(":  ", 1) for line in text.splitlines() if line.startswith("  ")]
    return {title.rstrip(":"): what.strip() for title, what in found}


@pytest.mark.parametrize(
    ("ide", "title", "uri", "command"),
    [
        ("vscode", "VS Code", "vscode://vscode-remote/ssh-remote+a-run/w", "code --remote ssh-remote+a-run /w"),
        ("cursor", "Cursor", "cursor://vscode-remote/ssh-remote+a-run/w", "cursor --remote ssh-remote+a-run /w"),
        (
            "windsurf",
            "Windsurf",
            "windsurf://vscode-remote/ssh-remote+a-run/w",
            "windsurf --remote ssh-remote+a-run /w",
        ),
        ("zed", "Zed", "zed://ssh/a-run/w", "zed ssh://a-run/w"),
    ],
)
def test_on_a_machine_that_is_reached_over_ssh(tmp_path: Path, ide: str, title: str, uri: str, command: str) -> None:
    """The IDE goes through the name of the run, and so does a shell."""
    configuration = DevEnvironment(ide=ide)  # type: ignore[arg-type]  # one of the four
    spec = spec_of(configuration)
    told = reached_by(SSH, spec, agent_job_spec(spec))
    text = printed(configuration, tmp_path, told.env)
    assert lines(text.replace(str(tmp_path), "/w")) == {
        f"Open in {title}": uri,
        "or in a terminal": command,
        "Shell in it": "ssh a-run",
        "First, and keep it open": "dstack attach a-run",
    }


def test_no_ide_on_a_machine_that_is_reached_over_ssh(tmp_path: Path) -> None:
    """A shell is all there is to open."""
    assert lines(printed(DevEnvironment(), tmp_path, {"DSTACK_SSH_HOST": "a-run"})) == {
        "Shell in it": "ssh a-run",
        "First, and keep it open": "dstack attach a-run",
    }


def test_a_machine_that_is_not_reached_over_ssh_has_no_such_name() -> None:
    """On this computer the job is told nothing of SSH."""
    spec = spec_of(DevEnvironment(ide="vscode"))
    told = agent_job_spec(spec)
    assert reached_by(Endpoint(unix_socket=Path("/x/agent.sock")), spec, told) == told


def test_folders_with_any_name(tmp_path: Path) -> None:
    """Encoded in the address, in quotes for the shell, and as they are for people."""
    folder = tmp_path / "a b%c" / "ö?#"
    folder.mkdir(parents=True)
    text = printed(DevEnvironment(ide="vscode"), folder)
    assert f"Its folder is {folder}\n" in text
    assert lines(text) == {
        "Open in VS Code": f"vscode://file{tmp_path}/a%20b%25c/ö%3F%23",
        "or in a terminal": f"code '{folder}'",
    }
    quoted = tmp_path / "it's"
    quoted.mkdir()
    assert lines(printed(DevEnvironment(ide="vscode"), quoted))["or in a terminal"] == f'code "{quoted}"'


@pytest.mark.parametrize("strict", ["set -eu", "IFS=/", "cd /"])
def test_init_may_change_the_shell(tmp_path: Path, strict: str) -> None:
    """Whatever it sets, and wherever it goes, the folder to open is the one where it began."""
    before = printed(DevEnvironment(ide="zed"), tmp_path)
    assert printed(DevEnvironment(ide="zed", init=[strict]), tmp_path) == before


def test_the_python_of_the_environment_is_named(tmp_path: Path) -> None:
    """So that an IDE can be told which one to use."""
    text = printed(DevEnvironment(ide="vscode"), tmp_path, {"VIRTUAL_ENV": "/x/venv"})
    assert lines(text)["Python"] == "/x/venv/bin/python"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {},
            STOP + "It ends by itself after 6 h in any case.\n" + GOES,
        ),
        (
            {"inactivity_duration": "90m", "max_duration": "off", "working_dir": "/"},
            STOP + "It ends by itself after 90 min without anybody at work.\n",
        ),
        (
            {"inactivity_duration": "off", "max_duration": "off", "working_dir": "/"},
            STOP,
        ),
    ],
)
def test_the_text_says_when_it_ends(tmp_path: Path, fields: dict[str, str], said: str) -> None:
    """By which limits, and what becomes of the files."""
    assert printed(DevEnvironment(ide="vscode", **fields), tmp_path).endswith(f"\n\n{said}")  # type: ignore[arg-type]  # fields by name


def test_defaults() -> None:
    """On demand, for 6 hours, whatever nobody does; what is set wins."""
    spec = spec_of(DevEnvironment(ide="vscode"))
    assert spec.requirements.spot_policy is SpotPolicy.ONDEMAND
    assert (spec.max_duration, spec.inactivity_duration, spec.ide) == (6 * 3600, None, "vscode")
    spec = spec_of(DevEnvironment(max_duration="off", inactivity_duration="2h"), spot_policy="auto")
    assert spec.requirements.spot_policy is SpotPolicy.AUTO
    assert (spec.max_duration, spec.inactivity_duration, spec.ide) == (None, 7200, None)
    assert agent_job_spec(spec).inactivity == 7200


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"entrypoint": "/bin/x"}, "'entrypoint' has no use"), ({"version": "1.80"}, "'version' is not carried out")],
)
def test_what_cannot_be_carried_out_is_refused(fields: dict[str, str], words: str) -> None:
    """With what to do instead, rather than passed over."""
    with pytest.raises(ConfigurationError, match=words):
        spec_of(DevEnvironment(ide="vscode", **fields))  # type: ignore[arg-type]  # fields by name


def test_no_time_at_all_is_no_limit_for_inactivity() -> None:
    """0 would end it at once, which nobody wants to write."""
    with pytest.raises(ConfigurationError, match="inactivity_duration: 0 would end it at once: write 'off' for never"):
        DevEnvironment(inactivity_duration="0s")


@pytest.mark.parametrize(("ide", "hint"), [("vscode", True), ("zed", False), (None, False)])
@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_what_an_ide_must_be_told_of_podman(tmp_path: Path, ide: str | None, hint: bool, engine: str) -> None:
    """It looks for docker by itself; one that does not look into containers needs no hint."""
    env = {"DSTACK_CONTAINER": "c", "DSTACK_CONTAINER_ENGINE": engine, "DSTACK_CONTAINER_AUTHORITY": "attached"}
    found = lines(printed(DevEnvironment(ide=ide, image="x"), tmp_path, env))  # type: ignore[arg-type]  # one of the four
    assert found["Shell in it"] == f"{engine} exec -it c sh"
    assert ("Before that" in found) == (hint and engine == "podman")
