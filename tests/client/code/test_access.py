"""Whether a repository can be cloned is tried out with real servers of git, over HTTP and over SSH."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack.api import ConfigurationError
from dstack_core._client.code.access import find_credentials
from dstack_core._client.code.address import Address
from dstack_core._models.wire import RepoCredentials
from tests.support.git import ENVIRONMENT, git, new_clone
from tests.support.git_servers import TOKEN, GitOverHttp, GitOverSsh, git_over_ssh

pytestmark = pytest.mark.usefixtures("own_home")

NOTHING_LISTENS = "http://127.0.0.1:9/team/code.git"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Git without the settings of this computer, and a home folder without keys."""
    for name in ("GIT_SSH_COMMAND", "SSH_AUTH_SOCK", "GIT_CONFIG_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", ENVIRONMENT["GIT_CONFIG_NOSYSTEM"])
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[GitOverHttp]:
    """A git server on the web with the private repository `team/code.git`."""
    new_clone(tmp_path)
    (tmp_path / "served" / "team").mkdir(parents=True)
    (tmp_path / "server.git").rename(tmp_path / "served" / "team" / "code.git")
    with GitOverHttp(tmp_path / "served") as server:
        yield server


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[GitOverSsh]:
    """A git server with SSH; its repositories are where they are on this computer."""
    if shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        if os.environ.get("DSTACK_REQUIRE_ROOT") == "1":
            pytest.fail("DSTACK_REQUIRE_ROOT is set, and there is no sshd; install Debian's openssh-server")
        pytest.skip("needs sshd")
    new_clone(tmp_path)
    with git_over_ssh(tmp_path) as server:
        yield server


def refusal(attempt: Callable[[], RepoCredentials]) -> str:
    """Why a repository cannot be cloned; never with the token."""
    with pytest.raises(ConfigurationError) as refused:
        attempt()
    assert TOKEN not in str(refused.value)
    return str(refused.value)


def test_a_public_repository_needs_nothing(web: GitOverHttp) -> None:
    """Anybody may clone it, and that is what jobs are told."""
    web.public = True
    found = find_credentials(Address.parse(f"{web.url}/team/code.git"))
    assert found == RepoCredentials(clone_url=f"{web.url}/team/code.git")


def test_a_token(web: GitOverHttp) -> None:
    """The right token opens a private repository; what is found out goes to the job."""
    url = f"{web.url}/team/code.git"
    found = find_credentials(Address.parse(url), oauth_token=TOKEN)
    assert (found.clone_url, found.oauth_token, found.private_key) == (url, TOKEN, None)
    assert TOKEN not in repr(found)


def test_a_wrong_token(web: GitOverHttp) -> None:
    """Which repo, what was tried, git's own words, and what to do; not the token, in any form."""
    said = refusal(lambda: find_credentials(Address.parse(f"{web.url}/team/code.git"), oauth_token="wrong-one"))
    assert "The repo 127.0.0.1/team/code cannot be cloned. Tried:\n  with the token (http://127.0.0.1:" in said
    assert "Check that the token is right, has not expired, and may read this repository." in said
    assert "wrong-one" not in said
    assert "d3Jvbmctb25l" not in said
    assert set(web.asked) - {None}, "the server was asked with a token"


def test_without_anything_both_ways_are_named(web: GitOverHttp) -> None:
    """A private repository and nothing that opens it: says what was tried and how to pass a key or a token."""
    said = refusal(lambda: find_credentials(Address.parse(f"{web.url}/team/code.git")))
    assert "  as anybody (http://127.0.0.1:" in said
    assert "  as your own git does it (http://127.0.0.1:" in said
    assert "git_identity_file='~/.ssh/id_ed25519'" in said
    assert "oauth_token=..." in said


def test_a_repository_that_is_not_there(web: GitOverHttp) -> None:
    """Git's own words say so."""
    said = refusal(lambda: find_credentials(Address.parse(f"{web.url}/team/nothing.git"), oauth_token=TOKEN))
    assert "not found" in said


def test_a_git_server_that_is_not_there() -> None:
    """An address where nobody listens is named."""
    said = refusal(lambda: find_credentials(Address.parse(NOTHING_LISTENS), oauth_token=TOKEN))
    assert "127.0.0.1" in said
    assert "Failed to connect" in said or "Could" in said or "refused" in said


def test_the_token_of_an_address(web: GitOverHttp) -> None:
    """A token that was written into the address is taken out of it, and tried."""
    url = f"{web.url}/team/code.git".replace("http://", f"http://{TOKEN}@")
    found = find_credentials(Address.parse(url))
    assert (found.clone_url, found.oauth_token) == (f"{web.url}/team/code.git", TOKEN)
    wrong = Address.parse(url.replace(TOKEN, "someone:wrong-one"))
    said = refusal(lambda: find_credentials(wrong))
    assert "with the token of its address" in said
    assert "wrong-one" not in said


def test_the_user_s_own_git(web: GitOverHttp, tmp_path: Path) -> None:
    """What the user's own set-up opens is good enough, if nobody passed anything; with a token it is not asked."""
    helper = f"!f() {{ echo username=oauth2; echo password={TOKEN}; }}; f"
    git(tmp_path, "config", "--file", str(tmp_path / "gitconfig"), "credential.helper", helper)
    address = Address.parse(f"{web.url}/team/code.git")
    assert find_credentials(address) == RepoCredentials(clone_url=f"{web.url}/team/code.git")
    assert "with the token" in refusal(lambda: find_credentials(address, oauth_token="wrong-one"))


def test_secrets_are_in_no_list_of_processes(web: GitOverHttp) -> None:
    """While git runs, nobody else on this computer sees the token in a command line."""
    seen: list[bytes] = []
    allows = web.allows

    def look(header: str | None) -> bool:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(entry.read_bytes())
            except OSError:
                continue
        return allows(header)

    web.allows = look  # type: ignore[method-assign]  # the test looks while git waits for its answer
    find_credentials(Address.parse(f"{web.url}/team/code.git"), oauth_token=TOKEN)
    assert any(b"ls-remote" in command for command in seen)
    assert not any(TOKEN.encode() in command for command in seen)


def test_no_question_is_asked(web: GitOverHttp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that would ask the user for a password is not started."""
    script = tmp_path / "ask"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\necho {TOKEN}\n")
    script.chmod(0o755)
    monkeypatch.setenv("GIT_ASKPASS", str(script))
    monkeypatch.setenv("SSH_ASKPASS", str(script))
    done = threading.Thread(target=refusal, args=(lambda: find_credentials(Address.parse(f"{web.url}/team/code.git")),))
    done.start()
    done.join(60)
    assert not done.is_alive()
    assert not (tmp_path / "asked").exists()


def test_a_key(ssh: GitOverSsh, tmp_path: Path) -> None:
    """The right key opens a repository over SSH; its text goes to the job."""
    url = ssh.url(tmp_path / "server.git")
    found = find_credentials(Address.parse(url), git_identity_file=ssh.key)
    assert (found.clone_url, found.private_key, found.oauth_token) == (url, ssh.key.read_text(), None)
    assert "PRIVATE" not in repr(found)


def test_a_wrong_key(ssh: GitOverSsh, tmp_path: Path) -> None:
    """Which repo, which key, the words of SSH, and what to do."""
    address = Address.parse(ssh.url(tmp_path / "server.git"))
    said = refusal(lambda: find_credentials(address, git_identity_file=ssh.other_key))
    assert f"  with the key {ssh.other_key} (ssh://" in said
    assert "Permission denied" in said
    assert "Check that the git server knows this key" in said


def test_what_is_no_key(tmp_path: Path) -> None:
    """A file that is not there, and the public half of a key."""
    address = Address.parse("git@git.example.com:team/code.git")
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA me\n")
    for name, says in (("nowhere", "cannot be read: No such file"), ("id.pub", "is no private key")):
        with pytest.raises(ConfigurationError, match=says):
            find_credentials(address, git_identity_file=tmp_path / name)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_what_is_no_token(token: str) -> None:
    """What could not stand in a header is refused, and not repeated."""
    with pytest.raises(ConfigurationError, match="this is no token") as refused:
        find_credentials(Address.parse("https://git.example.com/team/code"), oauth_token=token)
    assert not token or token not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "plain", "web_form", "ssh_form"),
    [
        ("https://h/a/b.git", "https://h/a/b.git", "https://h/a/b.git", "git@h:a/b.git"),
        ("http://t:x-oauth-basic@h:81/a/b/", "http://h:81/a/b", "http://h:81/a/b", "git@h:a/b"),
        ("git@h:a/b.git", "git@h:a/b.git", "https://h/a/b.git", "git@h:a/b.git"),
        ("ssh://me@h:22/g/a/b", "ssh://me@h:22/g/a/b", "https://h/g/a/b", "ssh://me@h:22/g/a/b"),
        ("git@h:/srv/a/b.git", "git@h:/srv/a/b.git", "https://h/srv/a/b.git", "git@h:/srv/a/b.git"),
    ],
)
def test_an_address_for_each_protocol(url: str, plain: str, web_form: str, ssh_form: str) -> None:
    """The same repository over HTTPS and over SSH, never with a secret."""
    address = Address.parse(url)
    assert (address.plain(), address.web(), address.ssh()) == (plain, web_form, ssh_form)
    assert "x-oauth" not in repr(address)
