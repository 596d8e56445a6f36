"""What `.gitignore` and `.dstackignore` leave out is what git leaves out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_core._client.code.scanning import Found, look_through
from tests.support.git import git

NAMES = ("a", "b", "ab", "a.py", "b.pyc", ".c", "d e")
PATTERNS = st.sampled_from(
    [
        *NAMES,
        *(
            "a/",
            "/a",
            "/a/",
            "a/b",
            "a/*",
            "*",
            "*.py",
            "!a",
            "!a/",
            "!a.py",
            "!a/b",
            "!*.py",
            "**",
            "**/b",
            "a/**",
            "!a/**",
        ),
        *(
            "a/**/b",
            "**/a/",
            "/*",
            "!/b",
            "/b/**",
            "*/",
            "*/b",
            "[ab]",
            "[!a]",
            "a?",
            "#a",
            "\\#a",
            "!",
            "/",
            "",
            "a ",
            "a\\ ",
        ),
        *("[", "a/**/", "/**", "!/**/", "d e", "*.py[co]", "b/../a", "./a", ".c", ".*", "a//b"),
    ]
)
FOLDERS = st.sampled_from(["", "a", "b", "a/b", "a/a", "b/ab", "ab/b"])
TREES = st.sets(st.tuples(FOLDERS, st.sampled_from(NAMES)).map(lambda both: "/".join(filter(None, both))), max_size=12)
IGNORES = st.dictionaries(FOLDERS, st.lists(PATTERNS, max_size=4), max_size=3)


def build(root: Path, files: set[str], ignores: Mapping[str, list[str]], name: str) -> None:
    """Makes a tree; where one name is a file and a folder, it is a folder."""
    folders = {str(parent) for file in files for parent in Path(file).parents} | set(ignores)
    folders |= {str(parent) for folder in ignores for parent in Path(folder).parents}
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for file in files - folders:
        (root / file).touch()
    for folder, lines in ignores.items():
        (root / folder / name).write_text("".join(f"{line}\n" for line in lines))


def seen(root: Path) -> set[str]:
    """What is brought along of a folder."""
    found = Found(str(root))
    look_through(str(root), found)
    assert found.problems == []
    return {*found.files, *found.links}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository."""
    path = tmp_path_factory.mktemp("ignoring")
    git(path, "init")
    return path


def empty(folder: Path) -> None:
    """Leaves nothing in a folder but git's own."""
    for entry in os.scandir(folder):
        if entry.name != ".git":
            shutil.rmtree(entry.path) if entry.is_dir() else Path(entry.path).unlink()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=TREES, ignores=IGNORES)
def test_the_same_files_as_git(folder: Path, files: set[str], ignores: dict[str, list[str]]) -> None:
    """Any tree with any patterns, in any of its folders: git itself names the same files."""
    empty(folder)
    build(folder, files, ignores, ".gitignore")
    theirs = git(folder, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    assert seen(folder) == {path for path in theirs if path}
