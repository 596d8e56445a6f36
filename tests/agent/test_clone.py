"""Git repositories in the job's folder, from real servers: the right files, and no secret anywhere."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.archives import archive, run_with
from tests.support.git_hosts import GitServer, Repository, SshServer, git
from tests.support.real_agents import LONG, RealAgent, StartAgent

TOKEN = "t0k3n-hush-hush"


@pytest.fixture
def repository(git_server: GitServer) -> Repository:
    """`me/code`, with three commits on `main` and one on `side`."""
    repository = git_server.repository("me/code")
    repository.commit({"a.txt": "one", "gone.txt": "gone", "dir/b.txt": "b"})
    repository.commit({"a.txt": "two"})
    repository.commit({"a.txt": "three"})
    repository.commit({"a.txt": "side"}, branch="side")
    git(repository.copy, "checkout", "--quiet", "main")
    return repository


def commits_of(repository: Repository, branch: str = "main") -> list[str]:
    """All commits of a branch, oldest first."""
    return git(repository.copy, "rev-list", "--reverse", branch).split()


def cloned(agent: RealAgent, url: str, shell: str = "cat a.txt", **repo: object) -> str:
    """The output of a job in a clone."""
    agent.run(shell, repo={"url": url, **repo})
    state = agent.wait()
    assert (state["exit_code"], state["message"]) == (0, None)
    return agent.output().decode().strip()


def refused(agent: RealAgent, url: str, **repo: object) -> str:
    """The message of a job that could not be given its clone."""
    agent.run("touch ran", repo={"url": url, **repo})
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("code_failed", None)
    assert not (agent.directory / "job/ran").exists()
    return str(state["message"])


@pytest.fixture(autouse=True)
def nothing_private_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever happens, the folder for the key is gone at the end."""
    agent: RealAgent = request.getfixturevalue("agent")
    yield
    assert not (agent.directory / "git").exists()


# ------------------------------------------------------------------------------------------------ what is cloned --


def test_the_newest_commit_of_the_default_branch(agent: RealAgent, git_server: GitServer) -> None:
    """Whatever it is called; on a branch of that name, with its files clean."""
    repository = git_server.repository("me/code", branch="trunk")
    repository.commit({"a.txt": "old"}, branch="trunk")
    newest = repository.commit({"a.txt": "new", "run.sh": "x"}, branch="trunk")
    shell = "git rev-parse HEAD; git branch --show-current; git status --porcelain; cat a.txt"
    assert cloned(agent, git_server.url_of("me/code"), shell).split() == [newest, "trunk", "new"]


def test_a_branch(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Its newest commit, on a branch of its name, and no history."""
    shell = "cat a.txt; echo; git branch --show-current; git rev-list HEAD | wc -l"
    assert cloned(agent, git_server.url_of("me/code"), shell, branch="side").split() == ["side", "side", "1"]


@pytest.mark.parametrize("branch", ["main", None])
def test_a_commit_by_its_hash(
    agent: RealAgent, git_server: GitServer, repository: Repository, branch: str | None
) -> None:
    """That commit alone travels; it is checked out under the branch's name, or detached without one."""
    old = commits_of(repository)[1]
    shell = "cat a.txt; echo; git rev-parse HEAD; git rev-list HEAD | wc -l; git branch --show-current"
    found = cloned(agent, git_server.url_of("me/code"), shell, branch=branch, commit=old).split()
    assert found == ["two", old, "1", *([branch] if branch else [])]


@pytest.mark.parametrize("branch", ["main", "side", "deleted", None])
def test_a_server_that_gives_no_commit_by_its_hash(
    agent: RealAgent, git_server: GitServer, repository: Repository, branch: str | None
) -> None:
    """The branch is fetched, or everything, until the commit is found."""
    git_server.modern = False
    old = commits_of(repository)[0]
    assert cloned(agent, git_server.url_of("me/code"), branch=branch, commit=old) == "one"
    head = (agent.directory / "job/.git/HEAD").read_text().strip()
    assert head == (f"ref: refs/heads/{branch}" if branch else old)


def test_a_short_hash(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """No server gives that out, but the branch has it."""
    short = commits_of(repository)[1][:10]
    assert cloned(agent, git_server.url_of("me/code"), branch="main", commit=short) == "two"


def test_a_server_whose_head_is_on_no_branch(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Its commit is checked out, detached."""
    git(repository.path, "update-ref", "--no-deref", "HEAD", commits_of(repository)[0])
    shell = "cat a.txt; echo; git branch --show-current"
    assert cloned(agent, git_server.url_of("me/code"), shell) == "one"


def test_who_commits_in_the_job(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """The user's own name and address, in this clone alone; nothing waits for a key to be pressed."""
    shell = "git commit -q --allow-empty -m x && git log -1 --format='%an <%ae>'"
    identity = {"user_name": "Ada L", "user_email": "ada@example.org"}
    assert cloned(agent, git_server.url_of("me/code"), shell, **identity) == "Ada L <ada@example.org>"


def test_what_the_machines_user_configured_does_not_count(
    start_agent: StartAgent, git_server: GitServer, repository: Repository, tmp_path: Path
) -> None:
    """Another address, other line ends, hooks, credentials of the machine: none of them changes what is cloned."""
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    (home / "hooks/post-checkout").write_text("#!/bin/sh\necho hooked > a.txt\n")
    (home / "hooks/post-checkout").chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\nautocrlf = true\nhooksPath = {home}/hooks\n"
        f'[url "http://127.0.0.1:9/"]\ninsteadOf = {git_server.url}/\n'
        f"[init]\ntemplateDir = {home}\n[http]\nextraHeader = X-Machine: 1\n"
    )
    (home / ".netrc").write_text("machine 127.0.0.1 login machine password secret\n")
    env = {"HOME": str(home), "GIT_DIR": str(home), "GIT_CONFIG_PARAMETERS": "'core.bare=true'"}
    agent = start_agent(env=env)
    agent.run("cat a.txt", repo={"url": git_server.url_of("me/code")})
    assert agent.output() == b"three"
    assert {authorization for _, authorization in git_server.asked} == {""}


def test_submodules(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """At their recorded commits, which are not their newest, and theirs within them."""
    url = _with_submodules(git_server, repository)
    shell = "cat sub/s.txt sub/inner/i.txt; git submodule status --recursive | cut -c1 | tr ' ' ="
    assert cloned(agent, url, shell) == "s1i1=\n="


@pytest.mark.parametrize("modern", [True, False])
def test_private_submodules(agent: RealAgent, git_server: GitServer, repository: Repository, modern: bool) -> None:
    """On the same host they are opened by the same token, also where no commit is given out by its hash."""
    url = _with_submodules(git_server, repository)
    git_server.token, git_server.modern = TOKEN, modern
    assert cloned(agent, url, "cat sub/s.txt sub/inner/i.txt", oauth_token=TOKEN) == "s1i1"


def _with_submodules(git_server: GitServer, repository: Repository) -> str:
    inner, sub = git_server.repository("me/inner"), git_server.repository("me/sub")
    inner.commit({"i.txt": "i1"})
    git(sub.copy, "submodule", "--quiet", "add", git_server.url_of("me/inner"), "inner")
    sub.commit({"s.txt": "s1"})
    inner.commit({"i.txt": "i2"})
    git(repository.copy, "submodule", "--quiet", "add", git_server.url_of("me/sub"), "sub")
    repository.push()
    sub.commit({"s.txt": "s2"})
    return git_server.url_of("me/code")


def test_a_submodule_that_cannot_be_had(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """The job fails, and the message says that it was a submodule."""
    url = _with_submodules(git_server, repository)
    shutil.rmtree(git_server.root / "me/sub.git")
    message = refused(agent, url)
    assert "A submodule of the repository" in message
    assert "me/sub.git" in message


def test_the_users_changes_are_laid_over_the_commit(
    agent: RealAgent, git_server: GitServer, repository: Repository
) -> None:
    """What was deleted is gone with its empty folder, what was changed is changed, what is new is there."""
    data = archive({"a.txt": b"changed", "new/c.txt": b"new", "dir2": b"a file"})
    shell = "git status --porcelain -uall; cat a.txt new/c.txt; test ! -e dir && echo no dir"
    repo = {"url": git_server.url_of("me/code"), "branch": "main", "commit": commits_of(repository)[1]}
    run_with(agent, data, shell, deleted=["gone.txt", "dir/b.txt", "never.txt"], repo=repo)
    expected = " M a.txt\n D dir/b.txt\n D gone.txt\n?? dir2\n?? new/c.txt\nchangednewno dir\n"
    assert agent.output().decode() == expected


def test_only_deletions(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Without an archive there is nothing to send."""
    code = {"hash": "a" * 64, "size": 0, "deleted": ["gone.txt"]}
    agent.run("ls -1", repo={"url": git_server.url_of("me/code")}, code=code)
    assert agent.output() == b"a.txt\ndir\n"


def test_a_folder_over_a_link_of_the_repository(
    agent: RealAgent, git_server: GitServer, repository: Repository, tmp_path: Path
) -> None:
    """A link that was committed is no way out of the folder: it is replaced."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (repository.copy / "data").symlink_to(outside)
    repository.push()
    run_with(agent, archive({"data/x": b"mine"}), "cat data/x", repo={"url": git_server.url_of("me/code")})
    assert agent.output() == b"mine"
    assert list(outside.iterdir()) == []


def test_working_dir_through_a_link_of_the_repository(
    agent: RealAgent, git_server: GitServer, repository: Repository, tmp_path: Path
) -> None:
    """Where it leads out of the folder it is refused."""
    (repository.copy / "out").symlink_to(tmp_path)
    repository.push()
    agent.run("true", repo={"url": git_server.url_of("me/code")}, working_dir="out")
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert "working_dir 'out' leads out" in state["message"]


# ----------------------------------------------------------------------------------------------------- refused --


def test_an_unknown_commit(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Which repository, which commit, where it was looked for, and what to do."""
    message = refused(agent, git_server.url_of("me/code"), branch="main", commit="1" * 40)
    for words in (git_server.url_of("me/code"), "no commit " + "1" * 40, "no credentials", "git push"):
        assert words in message


@pytest.mark.parametrize("commit", ["--upload-pack=touch ran", "HEAD", "", "main"])
def test_a_commit_that_is_none(agent: RealAgent, git_server: GitServer, repository: Repository, commit: str) -> None:
    """Only a hash names one; nothing else reaches git's command line."""
    assert "is no commit" in refused(agent, git_server.url_of("me/code"), commit=commit)


def test_an_unknown_branch(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Git's own words, and what to check."""
    message = refused(agent, git_server.url_of("me/code"), branch="nowhere")
    assert "refs/heads/nowhere" in message
    assert "Check the address, the branch" in message


def test_a_repository_without_commits(agent: RealAgent, git_server: GitServer) -> None:
    """Is said so."""
    git_server.repository("me/code")
    assert "has no commits" in refused(agent, git_server.url_of("me/code"))


def test_a_server_that_is_not_there(agent: RealAgent) -> None:
    """Git's own words, and what to check."""
    message = refused(agent, "http://127.0.0.1:9/me/code.git", commit="1" * 40)
    assert "machine reaches it" in message


@pytest.mark.parametrize("url", ["file:///etc", "ext::sh -c 'touch ran'", "/etc", "--upload-pack=touch ran"])
def test_only_network_addresses(agent: RealAgent, url: str) -> None:
    """Nothing of the machine itself can be cloned, and no address is a command."""
    assert "could not be cloned" in refused(agent, url)


def test_no_git(start_agent: StartAgent, tmp_path: Path, agent: RealAgent) -> None:
    """What to install, or to use instead."""
    bare = start_agent(env={"PATH": str(tmp_path)})
    message = refused(bare, "https://example.org/me/code")
    for words in ("no git", "Install git", "LocalRepo"):
        assert words in message


def test_a_git_that_is_too_old_for_a_token(start_agent: StartAgent, tmp_path: Path, agent: RealAgent) -> None:
    """It would not take the token from its environment: this is said, instead of what the server says then."""
    (tmp_path / "git").write_text("#!/bin/sh\necho git version 2.30.9\n")
    (tmp_path / "git").chmod(0o755)
    old = start_agent(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert "Install git 2.31" in refused(old, "https://example.org/me/code", oauth_token=TOKEN)


# ----------------------------------------------------------------------------------------------------- secrets --


@contextmanager
def watched(secrets: tuple[str, ...]) -> Iterator[list[bytes]]:
    """All command lines of the machine that show a secret, while the block runs."""
    seen: list[bytes] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue
                if any(secret.encode() in line for secret in secrets):
                    seen.append(line)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join(60)


def files_with(folder: Path, secret: str) -> list[Path]:
    """Files below a folder that hold a secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


BASIC = "b2F1dGgyOnQwazNuLWh1c2gtaHVzaA=="


@pytest.mark.parametrize("right", [True, False])
def test_a_token(agent: RealAgent, git_server: GitServer, repository: Repository, right: bool) -> None:
    """Opens the repository, or the message says what to do; it is in no command line, file, log or message."""
    git_server.token = TOKEN if right else "another"
    url = git_server.url_of("me/code")
    with watched((TOKEN, BASIC)) as seen:
        if right:
            assert cloned(agent, url, commit=commits_of(repository)[0], oauth_token=TOKEN) == "one"
        else:
            message = refused(agent, url, commit=commits_of(repository)[0], oauth_token=TOKEN)
            for words in (url, "with its token, which the server refused", "could not read Username", "oauth_token="):
                assert words in message
    assert ("Basic " + BASIC) in {authorization for _, authorization in git_server.asked}
    assert seen == []
    for secret in (TOKEN, BASIC):
        assert files_with(agent.directory, secret) == []
        assert secret not in str(agent.state())
    config = agent.directory / "job/.git/config"
    assert "extraheader" not in config.read_text().lower()


def test_a_private_repository_without_credentials(
    agent: RealAgent, git_server: GitServer, repository: Repository
) -> None:
    """Nobody is asked for a password; the message says what to pass."""
    git_server.token = TOKEN
    message = refused(agent, git_server.url_of("me/code"))
    for words in ("with no credentials", "could not read Username", "oauth_token=", "git_identity_file="):
        assert words in message


def test_a_token_goes_to_its_own_host_alone(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """A submodule on another host does not get it."""
    other = git_server.url.replace("127.0.0.1", "localhost")
    sub = git_server.repository("me/sub")
    sub.commit({"s.txt": "s1"})
    git(repository.copy, "submodule", "--quiet", "add", f"{other}/me/sub.git", "sub")
    repository.push()
    git_server.asked.clear()
    assert cloned(agent, git_server.url_of("me/code"), "cat sub/s.txt", oauth_token=TOKEN) == "s1"
    given = {("sub.git" in path, authorization) for path, authorization in git_server.asked}
    assert given == {(True, ""), (False, f"Basic {BASIC}")}


@pytest.mark.parametrize("ends", ["\n", "", "\r\n"])
def test_a_key(agent: RealAgent, ssh_server: SshServer, repository: Repository, ends: str, tmp_path: Path) -> None:
    """Opens the repository over SSH; nothing of it is left, and the user's own list of hosts is not touched."""
    body = ssh_server.key.split("\n")[2]
    key = (ends or "\n").join(ssh_server.key.strip().split("\n")) + ends
    known = Path.home() / ".ssh/known_hosts"
    before = known.read_bytes() if known.exists() else None
    with watched((body,)) as seen:
        url = ssh_server.url_of(repository.path)
        assert cloned(agent, url, commit=commits_of(repository)[0], private_key=key) == "one"
    assert seen == []
    assert files_with(agent.directory, body) == []
    assert (known.read_bytes() if known.exists() else None) == before


def test_a_wrong_key(agent: RealAgent, ssh_server: SshServer, repository: Repository) -> None:
    """Which repository, with what, the server's answer, and what to do."""
    url = ssh_server.url_of(repository.path)
    message = refused(agent, url, branch="main", private_key=ssh_server.other_key)
    for words in (url, "with its SSH key", "Permission denied", "git_identity_file="):
        assert words in message


def test_a_key_that_is_none(agent: RealAgent, ssh_server: SshServer, repository: Repository) -> None:
    """OpenSSH's own words about it, without its text."""
    message = refused(agent, ssh_server.url_of(repository.path), private_key="hush-hush")
    assert "git_identity_file=" in message
    assert "hush" not in message


# ---------------------------------------------------------------------------------------------------- stopping --


def test_stop_while_it_clones(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """At once, with all of git's processes."""
    git_server.hold.set()
    agent.run("touch ran", repo={"url": git_server.url_of("me/code")})
    assert git_server.held.wait(LONG)
    agent.stop(LONG)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", None)
    assert agent.job_processes() == set()
    assert not (agent.directory / "job/ran").exists()


@pytest.mark.parametrize("how", ["stop", "kill the agent"])
def test_the_key_is_gone_whatever_ends_the_clone(agent: RealAgent, how: str) -> None:
    """A server that never answers, and an end in the middle: no key is left, no process."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        agent.run("true", repo={"url": f"ssh://me@127.0.0.1:{port}/x/y.git", "private_key": "hush-hush"})
        connection, _ = silent.accept()
        with connection:
            key = agent.directory / "git/key"
            assert key.read_text() == "hush-hush\n"
            assert key.stat().st_mode & 0o777 == 0o600
            assert key.parent.stat().st_mode & 0o777 == 0o700
            _end(how, agent)
    assert files_with(agent.directory, "hush-hush") == []
    assert agent.job_processes() == set()


def _end(how: str, agent: RealAgent) -> None:
    if how == "stop":
        agent.stop(LONG)
        assert agent.wait()["reason"] == "stopped"
    else:
        os.kill(agent.pid, signal.SIGKILL)
        agent.process.wait(LONG)


def test_the_agent_answers_while_it_clones(agent: RealAgent, git_server: GitServer, repository: Repository) -> None:
    """Its loop waits for nobody."""
    git_server.hold.set()
    agent.run("cat a.txt", repo={"url": git_server.url_of("me/code")}, code={"hash": "a" * 64, "size": 0})
    assert git_server.held.wait(LONG)
    assert agent.state()["status"] == "preparing"
    git_server.release()
    assert agent.output() == b"three"
