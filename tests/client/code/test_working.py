"""A git repository on this computer: where its history meets that of the git server, and what differs from there."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from dstack.api import ConfigurationError, RemoteRepo
from dstack_core._client.code.repos import tree_of_repo
from dstack_core._models.code import CodeManifest
from tests.support.git import ENVIRONMENT, commit, git, new_clone

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Git without the settings of this computer."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A clone with one commit, pushed."""
    return new_clone(tmp_path)


def overlay(copy: Path) -> CodeManifest:
    """What is brought along beyond the commit."""
    return tree_of_repo(RemoteRepo.from_dir(copy)).manifest


def paths(copy: Path) -> list[str]:
    """The files that are brought along."""
    return [file.path for file in overlay(copy).files]


def test_a_clean_copy_brings_nothing_along(copy: Path) -> None:
    """All that there is can be cloned."""
    assert overlay(copy) == CodeManifest()
    data = RemoteRepo.from_dir(copy).run_repo_data
    assert (data.repo_branch, data.repo_hash) == ("main", git(copy, "rev-parse", "HEAD"))


def test_all_that_was_not_pushed_comes_along(copy: Path) -> None:
    """Commits, staged and unstaged changes, binaries, new files, modes and links; what is ignored does not."""
    base = git(copy, "rev-parse", "HEAD")
    commit(copy, committed="1", binary=bytes(range(256)), tool="#!/bin/sh\n", linked="x")
    (copy / "staged").write_text("2")
    git(copy, "add", "staged")
    (copy / "first").write_text("changed\n")
    (copy / "binary").write_bytes(b"\0\xff" * 3)
    (copy / "tool").chmod(0o755)
    (copy / "linked").unlink()
    (copy / "linked").symlink_to("first")
    (copy / "new dir").mkdir()
    (copy / "new dir" / "new\nfile").write_text("3")
    (copy / ".gitignore").write_text("ignored\n")
    (copy / ".dstackignore").write_text("home\nnot this/\n")
    for name in ("ignored", "home", "not this/x"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    found = overlay(copy)
    assert RemoteRepo.from_dir(copy).run_repo_data.repo_hash == base
    assert {file.path: file.executable for file in found.files} == {
        ".dstackignore": False,
        ".gitignore": False,
        "binary": False,
        "committed": False,
        "first": False,
        "new dir/new\nfile": False,
        "staged": False,
        "tool": True,
    }
    assert [(link.path, link.target) for link in found.links] == [("linked", "first")]
    assert found.deleted == ()


def test_what_was_deleted_is_named(copy: Path) -> None:
    """Deleted and committed, deleted and not committed, renamed, and replaced by another kind of entry."""
    commit(copy, gone="1", removed="2", moved="3", file="4", folder__inner="5", linked="6")
    git(copy, "push")
    (copy / "gone").unlink()
    git(copy, "rm", "removed")
    git(copy, "commit", "-m", "removed")
    git(copy, "mv", "moved", "elsewhere")
    (copy / "file").unlink()
    (copy / "file").mkdir()
    (copy / "file" / "inner").write_text("7")
    (copy / "folder" / "inner").unlink()
    (copy / "folder").rmdir()
    (copy / "folder").write_text("8")
    (copy / "linked").unlink()
    (copy / "linked").symlink_to("first")
    found = overlay(copy)
    assert found.deleted == ("file", "folder/inner", "gone", "linked", "moved", "removed")
    assert [file.path for file in found.files] == ["elsewhere", "file/inner", "folder"]
    assert [link.path for link in found.links] == ["linked"]


def test_the_archive_of_the_changes(copy: Path) -> None:
    """`write_code_file` has the changed and new files, the same bytes each time."""
    (copy / "first").write_text("changed\n")
    first, second = io.BytesIO(), io.BytesIO()
    repo = RemoteRepo.from_dir(copy)
    assert repo.write_code_file(first) == repo.write_code_file(second)
    with tarfile.open(fileobj=io.BytesIO(first.getvalue())) as archive:
        member = archive.extractfile("first")
        assert member is not None
        assert (archive.getnames(), member.read()) == (["first"], b"changed\n")


def test_a_repository_without_commits(tmp_path: Path) -> None:
    """There is nothing that could be cloned: says so, and what to do."""
    git(tmp_path, "init")
    with pytest.raises(ConfigurationError, match=r"has no commits yet\. Make one .*git commit.*, or use a LocalRepo"):
        RemoteRepo.from_dir(tmp_path)


def test_a_repository_without_files(tmp_path: Path) -> None:
    """A bare repository has no working copy."""
    git(tmp_path, "init", "--bare", "bare.git")
    with pytest.raises(ConfigurationError, match="is a git repository without files"):
        RemoteRepo.from_dir(tmp_path / "bare.git")


def test_nothing_was_pushed(copy: Path) -> None:
    """A git server with none of this history is no base."""
    for cut in (("update-ref", "-d", "refs/remotes/origin/main"), ("remote", "remove", "origin")):
        git(copy, *cut)
        with pytest.raises(
            ConfigurationError, match=r"No remote branch is configured.*git push --set-upstream.*LocalRepo"
        ):
            RemoteRepo.from_dir(copy)


def test_a_detached_head(copy: Path) -> None:
    """The newest commit that some branch of the git server has is the base, and the rest comes along."""
    first = git(copy, "rev-parse", "HEAD")
    commit(copy, second="2")
    git(copy, "push")
    git(copy, "checkout", "--detach", first)
    assert RemoteRepo.from_dir(copy).run_repo_data.repo_hash == first
    assert overlay(copy) == CodeManifest()
    commit(copy, third="3")
    data = RemoteRepo.from_dir(copy).run_repo_data
    assert (data.repo_branch, data.repo_hash) == ("main", first)
    assert paths(copy) == ["third"]


def test_a_branch_that_follows_none(copy: Path) -> None:
    """A new branch has the base that it shares with the git server's, and names a branch that has it."""
    commit(copy, second="2")
    git(copy, "push")
    git(copy, "push", "origin", "main:a-release")
    pushed = git(copy, "rev-parse", "HEAD")
    git(copy, "checkout", "-b", "topic", "--no-track")
    commit(copy, third="3")
    git(copy, "checkout", "-b", "local-upstream", "--track", "topic")
    for branch in ("topic", "local-upstream"):
        git(copy, "checkout", branch)
        data = RemoteRepo.from_dir(copy).run_repo_data
        assert (data.repo_branch, data.repo_hash) == ("main", pushed)
        assert paths(copy) == ["third"]


def test_a_branch_behind_or_apart_from_its_upstream(copy: Path) -> None:
    """What the git server has beyond this copy's history does not count."""
    first = git(copy, "rev-parse", "HEAD")
    commit(copy, theirs="theirs")
    git(copy, "push")
    git(copy, "reset", "--hard", first)
    commit(copy, ours="ours")
    assert RemoteRepo.from_dir(copy).run_repo_data.repo_hash == first
    assert paths(copy) == ["ours"]
    assert overlay(copy).deleted == ()


def test_many_branches_of_the_git_server(copy: Path) -> None:
    """With more branches than a command takes, the base is still the newest of all."""
    git(copy, "branch", "--unset-upstream")
    commit(copy, second="2")
    newest = git(copy, "rev-parse", "HEAD")
    old = git(copy, "rev-parse", "HEAD~1")
    lines = "".join(f"create refs/remotes/origin/b{number:03} {old}\n" for number in range(450))
    git(copy, "update-ref", "--stdin", given=f"{lines}create refs/remotes/origin/newest {newest}\n")
    data = RemoteRepo.from_dir(copy).run_repo_data
    assert (data.repo_branch, data.repo_hash) == ("newest", newest)


def test_a_folder_within_the_repository(copy: Path) -> None:
    """The repo is the whole repository, whichever of its folders is passed."""
    commit(copy, deep__down="x")
    repo = RemoteRepo.from_dir(copy / "deep")
    assert repo.repo_dir == str(copy)
    assert paths(copy / "deep") == ["deep/down"]


def test_submodules(copy: Path, tmp_path: Path) -> None:
    """One that is as its recorded commit says is the job's to clone; any change of it is refused, with its name."""
    inner = new_clone(tmp_path / "inner")
    git(copy, "submodule", "add", str(tmp_path / "inner" / "server.git"), "libs/inner")
    with pytest.raises(ConfigurationError, match="the submodule 'libs/inner' has changes"):
        overlay(copy)
    commit(copy)
    git(copy, "push")
    assert overlay(copy) == CodeManifest()
    module = copy / "libs" / "inner"
    (module / "new").write_text("x")
    with pytest.raises(
        ConfigurationError, match=r"the submodule 'libs/inner' has .*Commit and push.*or use a LocalRepo"
    ):
        overlay(copy)
    (module / "new").unlink()
    (module / "first").write_text("changed")
    with pytest.raises(ConfigurationError, match="'libs/inner'"):
        overlay(copy)
    git(module, "-c", "user.name=T", "commit", "-am", "inside")
    with pytest.raises(ConfigurationError, match="'libs/inner'"):
        overlay(copy)
    git(copy, "submodule", "update", "--force", "libs/inner")
    git(copy, "rm", "--force", "libs/inner")
    assert overlay(copy).deleted == ("libs/inner",)
    assert inner.exists()


def test_a_repository_inside_that_git_knows_nothing_of(copy: Path) -> None:
    """Its files come along like others, without its `.git`, and by the ignore rules above it."""
    (copy / ".gitignore").write_text("*.pyc\n")
    inner = copy / "vendor" / "inner"
    inner.mkdir(parents=True)
    git(inner, "init")
    commit(inner, code="x", also__more="y")
    (inner / "code.pyc").write_text("z")
    assert paths(copy) == [".gitignore", "vendor/inner/also/more", "vendor/inner/code"]


def test_a_file_that_git_stores_in_another_form(copy: Path) -> None:
    """Line ends that git converts are no change; it is git who is asked."""
    (copy / ".gitattributes").write_text("*.txt text eol=crlf\n")
    (copy / "dos.txt").write_bytes(b"a\r\nb\r\n")
    commit(copy)
    git(copy, "push")
    os.utime(copy / "dos.txt")
    assert overlay(copy) == CodeManifest()


def test_names_in_another_encoding_and_quotes(copy: Path) -> None:
    """Names that git would quote come through as they are."""
    for name in ("ä", 'with "quotes"', "tab\there", "-dash", "a b"):
        (copy / name).write_text("x")
    assert set(paths(copy)) == {"ä", 'with "quotes"', "tab\there", "-dash", "a b"}


def test_links_out_of_the_repository_are_refused(copy: Path) -> None:
    """The rules are those of a folder."""
    (copy / "out").symlink_to("/etc/passwd")
    with pytest.raises(ConfigurationError, match="'out' is a link that leads to an absolute path"):
        overlay(copy)


def test_another_repository_in_the_environment_is_left_aside(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a git hook, whose environment names the repository that it runs for."""
    other = new_clone(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    (copy / "new").write_text("x")
    assert paths(copy) == ["new"]


def test_a_computer_without_git(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what is missing."""
    monkeypatch.setenv("PATH", str(copy))
    with pytest.raises(ConfigurationError, match=r"git is not installed on this computer.*LocalRepo"):
        RemoteRepo.from_dir(copy)


def test_an_address_has_nothing_to_bring_along() -> None:
    """Only what the git server has gets to the job."""
    repo = RemoteRepo.from_url("https://git.example.com/team/code")
    assert tree_of_repo(repo).manifest == CodeManifest()
