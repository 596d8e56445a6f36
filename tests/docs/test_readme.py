"""README and the examples do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.homes import Home, home

__all__ = ["home"]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(tag: str) -> str:
    """The fenced block after a comment, as a newcomer would copy it."""
    match = re.search(rf"<!-- {tag} -->\n```sh\n(?P<text>.*?)```", README, re.DOTALL)
    assert match, f"README has no block after <!-- {tag} -->"
    return match["text"]


def run(script: Path, home: Home) -> str:
    """Output of a program that must succeed, run by a new user."""
    done = subprocess.run(
        [sys.executable, script], env=home.env, cwd=home.path.parent, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace") + home.log()
    return done.stdout.decode()


def test_the_web_example_shows_its_page(home: Home) -> None:
    """`examples/web.py` serves a page from a task and fetches it through the forwarded port."""
    assert "<h1>Hello from a task</h1>" in run(ROOT / "examples/web.py", home)


@pytest.mark.parametrize("tag", ["first-run", "tests"])
def test_the_two_commands_name_files_that_exist(tag: str) -> None:
    """What the two blocks install and run is there."""
    words = re.findall(r"(?:\./)?(?:plugins|examples|requirements)/[\w./-]+", commands(tag))
    assert words
    assert [word for word in words if not (ROOT / word).exists()] == []


def test_the_first_run_needs_only_python_and_pip() -> None:
    """A newcomer has neither uv nor a cloud SDK."""
    programs_used = {line.split()[0] for line in commands("first-run").splitlines()}
    assert programs_used == {"python3", ".venv/bin/pip", ".venv/bin/python"}
    assert not re.search(r"dstack-(aws|azure|gcp|lambda)", commands("first-run"))


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_pinned_sets_record_no_address(path: Path) -> None:
    """Pinned sets name versions and hashes, and neither a registry nor a path of one machine."""
    text = path.read_text(encoding="utf-8")
    assert "--hash=sha256:" in text
    assert not re.search(r"://|--(extra-)?index-url|--find-links| @ |^(-e|\.|/)", text, re.MULTILINE)
