"""Fresh Python environments for jobs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.real_agents import StartAgent

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

REPORT = """
python -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.prefix)'
echo $VIRTUAL_ENV
python -m pip --version | cut -c1-4
command -v pip
python -c 'import pytest' 2>/dev/null || echo fresh
"""


@pytest.fixture
def path_without_uv(tmp_path: Path) -> str:
    """A PATH with the system's programs, and neither uv nor another Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "cut", "cat", "sleep"):
        (tools / name).symlink_to(str(shutil.which(name)))
    return str(tools)


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    """A folder with uv alone, which the pins of the tests bring."""
    found = shutil.which("uv", path=f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}")
    assert found is not None, "uv is among the requirements of the tests"
    folder = tmp_path / "uv"
    folder.mkdir()
    (folder / "uv").symlink_to(found)
    return folder


@pytest.mark.parametrize("with_uv", [True, False])
def test_fresh_environment(start_agent: StartAgent, uv: Path, path_without_uv: str, with_uv: bool) -> None:
    """Of the version asked for, first on the PATH, with pip, and with nothing of ours in it."""
    agent = start_agent(env={"PATH": f"{uv}{os.pathsep}{os.environ['PATH']}" if with_uv else path_without_uv})
    assert agent.run(REPORT, python=VERSION)["status"] == "preparing"
    venv = str(agent.directory / "venv")
    assert agent.output().decode().splitlines() == [f"{VERSION} {venv}", venv, "pip ", f"{venv}/bin/pip", "fresh"]
    assert agent.wait()["exit_code"] == 0


def test_another_version_than_ours(start_agent: StartAgent) -> None:
    """Any that is installed here, on the PATH or by pyenv."""
    others = [name for name in ("3.12", "3.13", "3.10", "3.9") if name != VERSION and _installed(name)]
    if not others:
        pytest.skip("there is only one Python here")
    agent = start_agent()
    agent.run("python -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'", python=others[0])
    assert agent.output().decode().strip() == others[0]


def _installed(version: str) -> bool:
    return Path(f"/usr/bin/python{version}").exists() or any(Path.home().glob(f".pyenv/versions/{version}.*"))


def test_a_version_that_is_not_there(start_agent: StartAgent, path_without_uv: str) -> None:
    """Reason `start_failed`; the message names what is there, and the cure."""
    agent = start_agent(env={"PATH": path_without_uv})
    agent.run("true", python="3.99")
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("start_failed", None)
    for words in ("Python 3.99", f" {VERSION}", "uv"):
        assert words in state["message"]


def test_stop_while_the_environment_is_made(start_agent: StartAgent, path_without_uv: str) -> None:
    """The maker is stopped as well, and the job never runs."""
    uv = Path(path_without_uv) / "uv"
    uv.write_text(f"#!/bin/sh\necho > {path_without_uv}/begun\nsleep 600 & wait\n")
    uv.chmod(0o755)
    agent = start_agent(env={"PATH": path_without_uv})
    agent.run("touch ran", python=VERSION)
    agent.stop(30)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", None)
    assert not (agent.directory / "job/ran").exists()
    assert agent.job_processes() == set()


def test_what_uv_says_is_in_the_message(start_agent: StartAgent, path_without_uv: str) -> None:
    """Its own words, when it fails and nothing else can help."""
    uv = Path(path_without_uv) / "uv"
    uv.write_text("#!/bin/sh\necho 'the network is down' >&2\nexit 2\n")
    uv.chmod(0o755)
    agent = start_agent(env={"PATH": path_without_uv + os.pathsep})
    agent.run("true", python="3.99")
    assert "the network is down" in agent.wait()["message"]
