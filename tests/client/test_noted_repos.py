"""The section `repos` of `config.yml`: read, and written without a touch to the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dstack.api import ConfigurationError
from dstack_core._client.config import load_projects
from dstack_core._client.noted_repos import RepoEntry, find_repo, save_repo

PROJECTS = """\
# my servers
projects:
- name: main   # the usual one
  url: http://127.0.0.1:3000
  token: 0123
  default: true
"""
ONE = RepoEntry("/src/one", "one-12345678", "local")
TWO = RepoEntry("/src/two", "007", "remote", "/home/me/.ssh/id")


@pytest.fixture
def path(own_home: Path) -> Path:
    """Where the file is, in a folder that is not there yet."""
    return own_home / "config.yml"


def write(path: Path, text: str) -> None:
    """Writes the file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_a_file_is_made(path: Path) -> None:
    """Without a file there is no repo; the first one makes it, for this user alone."""
    assert find_repo(path, "/src/one") is None
    save_repo(path, ONE)
    save_repo(path, TWO)
    assert [find_repo(path, "/src/one"), find_repo(path, "/src/two")] == [ONE, TWO]
    assert find_repo(path, "/src") is None
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PROJECTS, PROJECTS),
        (PROJECTS.rstrip(), PROJECTS),
        (f"{PROJECTS}repos: []\n", PROJECTS),
        (f"{PROJECTS}repos:\n", PROJECTS),
        (f"repos:\n- path: /src/one\n  repo_id: x\n  repo_type: local\n# more\n{PROJECTS}", f"# more\n{PROJECTS}"),
        (f"repos: [{{path: /src/one, repo_id: x, repo_type: local}}]\n{PROJECTS}", PROJECTS),
    ],
)
def test_the_rest_stays_as_it_is_written(path: Path, before: str, after: str) -> None:
    """Comments, order and quotes of what people wrote are kept; the repo of the same folder is replaced."""
    write(path, before)
    path.chmod(0o640)
    save_repo(path, ONE)
    section = "repos:\n- path: /src/one\n  repo_id: one-12345678\n  repo_type: local\n"
    assert path.read_text().replace(section, "") == after
    assert path.read_text().count(section) == 1
    assert load_projects(path)[0].token == "0123"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "before", ["{projects: [{name: main, url: 'http://a', token: 0123, default: true}]}", PROJECTS + "...\n"]
)
def test_other_ways_to_write_the_same(path: Path, before: str) -> None:
    """Where no lines can be put in, the file is written anew, with the same contents."""
    write(path, before)
    projects = load_projects(path)
    save_repo(path, TWO)
    save_repo(path, ONE)
    assert load_projects(path) == projects
    assert projects[0].token == "0123"
    assert [find_repo(path, "/src/one"), find_repo(path, "/src/two")] == [ONE, TWO]


def test_other_keys_and_other_entries_stay(path: Path) -> None:
    """What an older or newer client noted about another folder is kept."""
    write(path, "repos:\n- {path: /else, repo_id: 0x1f, repo_type: remote, ssh_key_path: /k, more: yes}\n")
    save_repo(path, ONE)
    assert "more: 'yes'" in path.read_text()
    assert find_repo(path, "/else") == RepoEntry("/else", "0x1f", "remote", "/k")


def test_a_linked_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    """Who keeps the file elsewhere finds it changed there."""
    real = tmp_path / "dotfiles.yml"
    real.write_text(PROJECTS)
    path.parent.mkdir()
    path.symlink_to(real)
    save_repo(path, ONE)
    assert path.is_symlink()
    assert find_repo(real, "/src/one") == ONE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("projects: []\nrepos: 5\n", r"config\.yml, line 2: an entry of 'repos'"),
        ("repos:\n- path: /x\n", "line 1: an entry of 'repos' has a path, a repo_id"),
        ("repos:\n- {path: /x, repo_id: y, repo_type: svn}\n", "one of local, remote"),
        ("- a\n", "line 1: the file is made of `key: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_read(path: Path, text: str, says: str) -> None:
    """File, line and what is allowed; and the file is not written over."""
    write(path, text)
    with pytest.raises(ConfigurationError, match=says):
        find_repo(path, "/x")
    with pytest.raises(ConfigurationError, match=says):
        save_repo(path, ONE)
    assert path.read_text() == text


SAVES = """
import sys
from pathlib import Path
from dstack_core._client.noted_repos import RepoEntry, save_repo
for number in range(20):
    save_repo(Path(sys.argv[1]), RepoEntry(f"/src/{sys.argv[2]}/{number}", "x", "local"))
"""


def test_several_programs_at_once(path: Path) -> None:
    """None of them loses what another one wrote."""
    programs = [subprocess.Popen([sys.executable, "-c", SAVES, str(path), str(n)]) for n in range(3)]
    assert [program.wait(60) for program in programs] == [0, 0, 0]
    assert all(find_repo(path, f"/src/{n}/{number}") for n in range(3) for number in range(20))
