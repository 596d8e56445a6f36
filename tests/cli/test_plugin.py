"""`dstack plugin new`: a package that is complete, and nothing overwritten."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dstack_core import __version__
from dstack_core._cli.scaffold import ABOUT, SUFFIX, Package
from dstack_core.errors import ConfigurationError
from tests.support.homes import Home

DSTACK = [sys.executable, "-m", "dstack_core._cli"]
TEMPLATE = Path(__file__).parents[2] / "dstack_core" / "_cli" / "template"
WORDS = ("yourcloud", "YourCloud", "Your Cloud", "0.0.0.core")


def plugin(home: Home, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `dstack plugin` in a folder of its own."""
    folder = home.path.parent / "work"
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [*DSTACK, "plugin", *args], env=home.env, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def written(folder: Path) -> dict[str, str]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_package_is_written(home: Home) -> None:
    """Every file is named with what it is for, and the commands that run its tests are said."""
    done = plugin(home, "new", "nimbus")
    assert (done.returncode, done.stderr) == (0, "")
    files = written(home.path.parent / "work" / "dstack-nimbus")
    assert set(files) == {Package("nimbus", "Nimbus").filled(path) for path in ABOUT}
    assert all(re.search(rf"^  {re.escape(path)}( |$)", done.stdout, re.MULTILINE) for path in files)
    assert done.stdout.startswith("Wrote a backend 'nimbus', for the example cloud Nimbus, to dstack-nimbus:\n")
    assert "\n  cd dstack-nimbus\n" in done.stdout
    assert not home.path.exists(), "no server was needed"


def test_every_file_of_the_template_is_written() -> None:
    """A file that is in the template and not in the list would be shipped and never written."""
    found = {path.relative_to(TEMPLATE).as_posix() for path in TEMPLATE.rglob("*") if path.is_file()}
    assert found == {f"{path}{SUFFIX}" for path in ABOUT}


@pytest.mark.parametrize("name", ["nimbus", "x", "my-own-cloud-2", "a" * 30])
def test_names_of_all_kinds_fill_the_template(name: str) -> None:
    """No word of the template is left, in a text or a path, and what must be valid is."""
    package = Package.of(name)
    files = package.files()
    assert [path for path, text in files.items() if any(word in path + text for word in WORDS)] == []
    module = f"dstack_{name.replace('-', '_')}"
    project = tomllib.loads(files["pyproject.toml"])
    assert project["project"]["name"] == f"dstack-{name}"
    assert project["project"]["entry-points"]["dstack.backends"] == {name: module}
    assert project["tool"]["uv"]["build-backend"]["module-name"] == module
    assert f"dstack-core>={__version__}" in project["project"]["dependencies"]
    assert yaml.safe_load(files[".github/workflows/tests.yml"])["jobs"]
    programs = [ast.parse(text) for path, text in files.items() if path.endswith(".py")]
    assert len(programs) == 3


def test_what_the_author_reads_is_short() -> None:
    """A backend is under 300 lines, and its tests are under 20."""
    files = Package.of("nimbus").files()
    sizes = {path: text.count("\n") for path, text in files.items() if path.endswith(".py")}
    tests = sizes.pop("tests/test_nimbus.py")
    assert tests < 20
    assert sum(sizes.values()) < 300


def test_a_title_is_for_people(home: Home) -> None:
    """It stands where people read, and the name where programs do; one with a word of the template stays as it is."""
    done = plugin(home, "new", "nimbus", "--title", "yourcloud of Jürgen & Co.", "--directory", "a b")
    assert done.returncode == 0, done.stderr
    assert "\n  cd 'a b'\n" in done.stdout
    files = written(home.path.parent / "work" / "a b")
    assert 'title="yourcloud of Jürgen & Co.",' in files["dstack_nimbus/__init__.py"]
    assert files["README.md"].startswith("# yourcloud of Jürgen & Co.")


def test_a_title_is_made_from_the_name() -> None:
    """Each part of the name is a word of it."""
    assert Package.of("my-cloud").title == "My Cloud"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nimbus", "'Nimbus' cannot name a backend. 'nimbus' could. A name has lower-case letters"),
        ("my_cloud", "'my-cloud' could."),
        ("my--cloud", "'my-cloud' could."),
        ("cloud-", "'cloud' could."),
        ("2-cloud", "'cloud' could."),
        ("", "'' cannot name a backend. A name has"),
        ("../x", "'x' could."),
        ("größe", "'gr-e' could."),
        ("nimbus\n", "'nimbus' could."),
        ("core", "dstack-core is the core itself"),
        ("dstack-nimbus", "Say 'nimbus'"),
        ("a" * 31, "too long to name a backend: at most 30"),
    ],
)
def test_names_that_cannot_be(name: str, words: str) -> None:
    """Refused with what could be written instead."""
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        Package.of(name)


@pytest.mark.parametrize("title", ["", "  ", 'a "good" one', "back\\slash", "two\nlines", "bell\a", "x" * 61])
def test_titles_that_cannot_be(title: str) -> None:
    """Whatever could not stand between quotation marks is refused, with the rule."""
    with pytest.raises(ConfigurationError, match="cannot be a title: write 1 to 60 characters on one line"):
        Package.of("nimbus", title)


def test_mistakes_are_one_line(home: Home) -> None:
    """On standard error, without a traceback, and nothing is written."""
    done = plugin(home, "new", "Nimbus")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dstack: 'Nimbus' cannot name a backend. 'nimbus' could.")
    assert done.stderr.count("\n") == 1
    assert written(home.path.parent / "work") == {}


def test_nothing_is_overwritten(home: Home) -> None:
    """One file that exists, even as a link to nowhere, and none of them is written; other files are in nobody's way."""
    folder = home.path.parent / "work" / "dstack-nimbus"
    (folder / "tests").mkdir(parents=True)
    (folder / "LICENSE").write_text("mine")
    (folder / "README.md").symlink_to("nowhere")
    done = plugin(home, "new", "nimbus")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "dstack: Nothing was written: dstack-nimbus/README.md exists. Choose another folder with --directory DIR.\n"
    )
    assert written(folder) == {"LICENSE": "mine"}
    (folder / "README.md").unlink()
    assert plugin(home, "new", "nimbus").returncode == 0
    assert written(folder)["LICENSE"] == "mine"
    assert len(written(folder)) == len(ABOUT) + 1


def test_a_folder_that_is_a_file(home: Home) -> None:
    """Said with the place and the system's own words."""
    (home.path.parent / "work").mkdir()
    (home.path.parent / "work" / "file").write_text("")
    done = plugin(home, "new", "nimbus", "--directory", os.path.join("file", "deeper"))  # noqa: PTH118  # an argument
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dstack: Cannot write file/deeper: Not a directory.")


def test_what_is_meant_by_plugin_is_shown(home: Home) -> None:
    """`dstack plugin` alone lists what there is to say after it."""
    assert "\n  new " in plugin(home).stdout + plugin(home).stderr
    assert "--directory DIR" in plugin(home, "new", "--help").stdout
