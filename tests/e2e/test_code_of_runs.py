"""Code from the program to the job, through a real server: files in memory, a folder, a git repository with changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from dstack.api import Client, LocalRepo, RemoteRepo, RunStatus, Task, VirtualRepo
from tests.support.docker import Docker, docker, docker_engine
from tests.support.git_hosts import GitServer, git, git_server
from tests.support.homes import Home, ended

__all__ = ["docker", "docker_engine", "git_server"]

TOKEN = "t0k3n-hush-hush"


@pytest.fixture(params=["process", pytest.param("container", marks=[pytest.mark.docker, pytest.mark.root])])
def image(request: pytest.FixtureRequest) -> str | None:
    """The image of the task: none for a process of this computer."""
    if request.param == "process":
        return None
    engine: Docker = request.getfixturevalue("docker")
    return engine.image()


def test_files_that_a_program_put_together(image: str | None, client: Client) -> None:
    """The job finds what was added, where its commands begin."""
    repo = VirtualRepo(repo_id="made-up")
    repo.add_file("data.txt", b"from memory\n")
    repo.add_file("src/more.txt", b"more\n")
    run = client.runs.submit(configuration=Task(image=image, commands=["cat data.txt src/more.txt"]), repo=repo)
    assert b"".join(run.logs()) == b"from memory\nmore\n"


def test_a_folder_of_this_computer(image: str | None, client: Client, tmp_path: Path) -> None:
    """With what its rules do not leave out; links, modes, empty and large files as they are."""
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    big = os.urandom(9_000_000)
    (folder / "big.bin").write_bytes(big)
    (folder / "empty").touch()
    (folder / "run.sh").write_text("#!/bin/sh\necho ran $(cat ../link)\n")
    (folder / "src/run.sh").symlink_to("../run.sh")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("secret.txt")
    (folder / "secret.txt").write_text("by a link")
    (folder / "left.out").write_text("")
    (folder / ".dstackignore").write_text("left.out\n")
    task = Task(image=image, commands=["./run.sh", "ls ..", "cat ../big.bin | wc -c"])
    client.repos.init(LocalRepo(repo_dir=folder))
    run = client.runs.submit(configuration=task, repo=LocalRepo(repo_dir=folder), working_dir="src")
    expected = ["ran", "by", "a", "link", "big.bin", "empty", "link", "run.sh", "secret.txt", "src", str(len(big))]
    assert b"".join(run.logs()).decode().split() == expected


def test_a_private_repository_with_changes(
    image: str | None, client: Client, git_server: GitServer, home: Home
) -> None:
    """The commit that was pushed, and over it all that was not; the token stays encrypted, and out of every file."""
    repository = git_server.repository("me/code")
    repository.commit({"a.txt": "committed\n", "gone.txt": "x", "kept.txt": "kept\n"})
    git_server.token = TOKEN
    copy = repository.copy
    git(copy, "remote", "set-url", "origin", git_server.url_of("me/code"))
    git(copy, "config", "branch.main.remote", "origin")
    git(copy, "config", "branch.main.merge", "refs/heads/main")
    git(copy, "update-ref", "refs/remotes/origin/main", "HEAD")
    (copy / "a.txt").write_text("changed\n")
    (copy / "gone.txt").unlink()
    (copy / "new.bin").write_bytes(bytes(range(256)))
    repo = RemoteRepo(local_repo_dir=copy)
    client.repos.init(repo, oauth_token=TOKEN)
    task = Task(image=image, commands=["cat a.txt kept.txt", "ls", "wc -c < new.bin", "cat .git/HEAD"])
    run = client.runs.submit(configuration=task, repo=repo)
    expected = ["changed", "kept", "a.txt", "kept.txt", "new.bin", "256", "ref:", "refs/heads/main"]
    assert b"".join(run.logs()).decode().split() == expected
    ended(run)
    assert files_with(home.path, TOKEN.encode()) == []


def files_with(folder: Path, secret: bytes) -> list[Path]:
    """Files below a folder that hold a secret; those that go away meanwhile hold nothing."""
    found = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(OSError):
                if secret in path.read_bytes():
                    found.append(path)
    return found


def test_a_private_repository_that_closed(client: Client, git_server: GitServer) -> None:
    """The token is worth nothing any more when the job is to clone: the run says which repo, how, and what to do."""
    git_server.repository("me/code").commit({"a.txt": ""})
    git_server.token = TOKEN
    repo = RemoteRepo.from_url(git_server.url_of("me/code"), repo_branch="main")
    client.repos.init(repo, oauth_token=TOKEN)
    git_server.token = "another"
    run = ended(client.runs.submit(configuration=Task(commands=["true"]), repo=repo))
    assert run.status is RunStatus.FAILED
    for words in (git_server.url_of("me/code"), "with its token", "client.repos.init(repo, oauth_token="):
        assert words in (run.message or "")


def test_a_server_that_dies_while_it_sends(client: Client, home: Home, tmp_path: Path) -> None:
    """The next one goes on, and the job gets every byte."""
    folder = tmp_path / "project"
    folder.mkdir()
    big = os.urandom(1 << 20) * 200
    (folder / "big.bin").write_bytes(big)
    repo = LocalRepo(repo_dir=folder)
    client.repos.init(repo)
    run = client.runs.submit(configuration=Task(commands=["sha256sum < big.bin"]), repo=repo)
    home.kill_server()
    assert b"".join(run.logs()).split()[0].decode() == hashlib.sha256(big).hexdigest()


def test_a_working_dir_that_the_code_does_not_have(client: Client) -> None:
    """The run fails and says what there is."""
    repo = VirtualRepo(repo_id="made-up")
    repo.add_file("src/a.txt", b"")
    run = ended(client.runs.submit(configuration=Task(commands=["true"]), repo=repo, working_dir="scr"))
    assert run.status is RunStatus.FAILED
    assert "no folder 'scr'" in (run.message or "")
    assert "'src'" in (run.message or "")
