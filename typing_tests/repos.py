"""Repos: making one, and making it known. What speaks to a server needs one to run."""

import io
from pathlib import Path
from typing import assert_type

from dstack.api import Client, LocalRepo, RemoteRepo, Task, VirtualRepo


def virtual() -> None:
    """Files from the program."""
    repo = VirtualRepo("files")
    repo.add_file("main.py", b"print(1)")
    repo.add_file_from_package("json", "__init__.py")
    assert_type(repo.repo_id, str)
    assert_type(repo.repo_dir, str | None)
    assert_type(repo.write_code_file(io.BytesIO()), str)


def local() -> None:
    """A folder, by text and by path."""
    assert_type(LocalRepo(repo_dir=".").repo_dir, str)
    assert_type(LocalRepo(repo_dir=Path(), repo_id="mine"), LocalRepo)
    assert_type(LocalRepo.from_dir("."), LocalRepo)


def remote() -> None:
    """A git repository, by its address."""
    assert_type(RemoteRepo(repo_url="https://git.example.com/a/b.git", repo_branch="main"), RemoteRepo)
    assert_type(RemoteRepo.from_url("git@git.example.com:a/b.git", repo_hash="0" * 40), RemoteRepo)


def working_copy() -> None:
    """A git repository, by a working copy of it."""
    RemoteRepo(local_repo_dir=Path())
    RemoteRepo.from_dir(".")


def known(client: Client) -> None:
    """Making repos known, and using them for a run."""
    repo = client.repos.load(".", local=True, init=True, git_identity_file="~/.ssh/id_ed25519", oauth_token="...")
    assert_type(repo, RemoteRepo | LocalRepo)
    assert_type(client.repos.is_initialized(repo), bool)
    client.repos.init(repo, git_identity_file=Path("~/.ssh/id_ed25519"), oauth_token="...")
    client.runs.submit(Task(commands=["true"]), repo=repo, working_dir="src")
