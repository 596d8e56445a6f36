"""Every fenced block of README and the documentation is executed, or read by what it is written for."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from dstack_core._cli.app import app
from dstack_core._client.config import load_projects
from dstack_core._models._base import UserModel
from dstack_core._models.configurations import Task
from dstack_core._models.profiles import Profile
from dstack_core._models.server_config import load_server_config
from dstack_core._models.services import DevEnvironment, Service
from tests.support.blocks import ROOT, Block, blocks, blocks_of, pages
from tests.support.homes import Home

# Pages whose programs are not run, with the reason. The list only shrinks.
NOT_RUN: dict[str, str] = {}
LANGUAGES = {"python", "yaml", "toml", "sh", "mermaid", "cases", ""}
CONFIGURATIONS: dict[str, type[UserModel]] = {"task": Task, "service": Service, "dev-environment": DevEnvironment}
# Parts of a program are put together, and run, by the test of the tutorial.
PROGRAMS = [block for block in blocks("python") if not block.part]
EXAMPLES = [block for block in PROGRAMS if not block.needs and block.page not in NOT_RUN]


@pytest.fixture
def user() -> Iterator[Home]:
    """A new user, whose home folder holds nothing and `.dstack`; whatever they start is gone after the test."""
    top = Path(tempfile.mkdtemp(prefix="dsk-"))
    home = Home(top / ".dstack")
    try:
        yield home
    finally:
        home.close()


def test_blocks_are_found() -> None:
    """Each fence of each page opens or closes a block that a test looks at."""
    for page in pages():
        found = list(blocks_of(page))
        assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(found) - page.read_text().startswith("```")
        assert {block.language for block in found} <= LANGUAGES


def test_pages_that_are_not_run_exist() -> None:
    """The list of exceptions names pages with programs."""
    assert NOT_RUN.keys() <= {block.page for block in blocks("python")}


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_programs_fit_on_a_page(block: Block) -> None:
    """A program is valid Python, and no line of it is longer than a page of the site is wide."""
    ast.parse(block.text if not block.part else "")
    assert block.page == "README.md" or max(map(len, block.text.splitlines())) <= 88


@pytest.mark.parametrize("block", [b for b in PROGRAMS if b.page not in NOT_RUN], ids=str)
def test_programs_use_names_that_exist(block: Block) -> None:
    """Also a program that cannot run here imports only what is there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dstack"):
            exec(compile(ast.Module([node], []), str(block), "exec"), {})  # noqa: S102  # a line of our own page


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_programs_run(block: Block, user: Home) -> None:
    """Every program that needs nothing special runs as it stands, for a new user on this computer."""
    done = user.run(block.text, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace") + user.log()
    assert b"Warning" not in done.stderr


# ------------------------------------------------------------------------------------------------------- files --


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read_by_what_it_is_for(block: Block, tmp_path: Path) -> None:
    """A configuration, a profile, and the files of client and server are what they look like."""
    file = tmp_path / "file.yml"
    file.write_text(block.text)
    document = yaml.safe_load(block.text)
    assert read(document, file)


def read(document: dict[str, Any], file: Path) -> object:
    """What the program reads from the file, found by its keys."""
    if "type" in document:
        return CONFIGURATIONS[document["type"]].model_validate(document)
    if "profiles" in document:
        return [Profile.model_validate(profile) for profile in document["profiles"]]
    if "url" in document["projects"][0]:
        return load_projects(file)
    return load_server_config(file).projects


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_valid(block: Block) -> None:
    """Project files parse, and name the entry-point group that is looked at."""
    assert "dstack.backends" in tomllib.loads(block.text)["project"]["entry-points"]


# ---------------------------------------------------------------------------------------------------- commands --


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_are_those_that_exist(block: Block) -> None:
    """The shell can read it; each `dstack` command is one of ours with options of its own, and each file is there."""
    assert subprocess.run(["sh", "-n", "-c", block.text], check=False).returncode == 0
    for words in commands(block):
        if words[0] == "dstack":
            check_dstack(words[1:])
        for word in words:
            if re.fullmatch(r"(?:\./)?(?:plugins|examples|requirements)/[\w./-]+", word):
                assert (ROOT / word).exists()


def check_dstack(words: list[str]) -> None:
    """Reads the words as the command line does, without carrying anything out."""
    if words[0] == "server":
        options = subprocess.run(
            [sys.executable, "-m", "dstack_core._server", "--help"], capture_output=True, check=True
        )
        assert [word for word in words if word.startswith("--") and word.encode() not in options.stdout] == []
        return
    command: Any = typer.main.get_command(app)
    name, rest = "dstack", words
    while hasattr(command, "get_command"):
        name, *rest = rest
        command = command.get_command(None, name)
        assert command is not None, f"there is no command 'dstack {' '.join(words)}'"
    command.make_context(name, list(rest))


@pytest.mark.parametrize("tag", ["first-run", "tests"])
def test_readme_has_the_blocks_that_ci_runs(tag: str) -> None:
    """The two blocks that CI copies out of README are found by their comments."""
    found = [block for block in blocks_of(ROOT / "README.md") if block.comment == tag]
    assert len(found) == 1
    assert found[0].language == "sh"
    assert os.linesep.join(map(" ".join, commands(found[0]))).count(".venv") >= 3
