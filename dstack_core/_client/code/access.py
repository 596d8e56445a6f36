"""Whether a git repository can be cloned, and what with. Nothing of it shows in a list of processes."""

from __future__ import annotations

import os
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstack_core._client.code.address import Address
from dstack_core._client.code.git import run_git
from dstack_core._home import home
from dstack_core._models.wire import RepoCredentials
from dstack_core.errors import ConfigurationError

TIMEOUT = 60.0
"""Seconds that a git server has for its answer."""
ANONYMOUS_TIMEOUT = 20.0
"""The same where there may be no server of the web at all."""

_NAME = "dstack"
# As few of the user's settings as possible: what works here is to work on another computer.
_BARE = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ASKPASS": "",
    "SSH_ASKPASS": "",
    "SSH_ASKPASS_REQUIRE": "never",
}
# No ~/.netrc, either.
_NO_HOME = {"HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull}
# A window that asks is as bad as a prompt.
_QUIET = {"GIT_ASKPASS": "", "SSH_ASKPASS": "", "SSH_ASKPASS_REQUIRE": "never", "GCM_INTERACTIVE": "never"}


@dataclass(frozen=True)
class _Attempt:
    """A way to open a repository.

    Attributes:
        label: for people.
        url: the address, without a secret.
        settings: of git, by name. May be secret.
        env: for git.
        timeout: seconds.
        credentials: what the job gets if this works.
        folder: where git runs; by default in no repository, whose own settings would count.
    """

    label: str
    url: str
    credentials: RepoCredentials
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout: float = TIMEOUT
    folder: str = "/"


def find_credentials(
    address: Address,
    folder: str | None = None,
    git_identity_file: str | os.PathLike[str] | None = None,
    oauth_token: str | None = None,
) -> RepoCredentials:
    """What a job needs to clone a repository, tried out here.

    Tried, in this order: the key and the token that were given, and nothing else then. Otherwise as anybody, over
    HTTPS; with a token that is a part of the address; and as this user's git would do it, without a question.

    Args:
        address: of the repository.
        folder: its working copy, if there is one.
        git_identity_file: a private key.
        oauth_token: a token.

    Raises:
        ConfigurationError: nothing works; says which repo, what was tried, what git said, and what to do.
    """
    attempts = list(_attempts(address, folder, git_identity_file, oauth_token))
    said: list[str] = []
    for attempt in attempts:
        answer = _ask(attempt)
        if answer is None:
            return attempt.credentials
        said.append(f"  {attempt.label} ({attempt.url}): {_without_secrets(answer, address, oauth_token)}")
    lines = "\n".join(said)
    cure = _cure(git_identity_file is not None, oauth_token is not None)
    raise ConfigurationError(f"The repo {address.place} cannot be cloned. Tried:\n{lines}\n{cure}")


def _attempts(
    address: Address,
    folder: str | None,
    git_identity_file: str | os.PathLike[str] | None,
    oauth_token: str | None,
) -> Iterator[_Attempt]:
    if git_identity_file is not None:
        yield _with_key(address, Path(git_identity_file).expanduser().absolute())
    if oauth_token is not None:
        yield _with_token(address, oauth_token, "with the token")
    if git_identity_file is not None or oauth_token is not None:
        return
    yield _as_anybody(address)
    if address.secret is not None:
        yield _with_token(address, address.secret, "with the token of its address")
    yield _as_user(address, folder)


def _with_key(address: Address, key: Path) -> _Attempt:
    hosts = home() / "ssh" / "known_hosts"
    hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = {
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": f'"{hosts}" ~/.ssh/known_hosts',
    }
    command = ["ssh", "-F", os.devnull, "-i", str(key)]
    command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return _Attempt(
        label=f"with the key {key}",
        url=address.ssh(),
        credentials=RepoCredentials(clone_url=address.ssh(), private_key=_read_key(key)),
        env={**_BARE, "GIT_SSH_COMMAND": shlex.join(command)},
    )


def _read_key(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigurationError(f"git_identity_file: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        text = ""
    if "PRIVATE KEY-----" not in text:
        raise ConfigurationError(f"git_identity_file: {path} is no private key. The file to pass has no '.pub'.")
    return text


def _with_token(address: Address, token: str, label: str) -> _Attempt:
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise ConfigurationError("oauth_token: this is no token, which is made of printable characters without spaces.")
    return _Attempt(
        label=label,
        url=address.web(),
        credentials=RepoCredentials(clone_url=address.web(), oauth_token=token),
        settings={f"http.{address.web()}.extraHeader": f"Authorization: Basic {_basic(token)}"},
        env={**_BARE, **_NO_HOME},
    )


def _basic(token: str) -> str:
    """What all git servers take for a token: it is the password, and the user is nobody in particular."""
    return b64encode(f"oauth2:{token}".encode()).decode()


def _as_anybody(address: Address) -> _Attempt:
    return _Attempt(
        label="as anybody",
        url=address.web(),
        credentials=RepoCredentials(clone_url=address.web()),
        env={**_BARE, **_NO_HOME},
        timeout=ANONYMOUS_TIMEOUT,
    )


def _as_user(address: Address, folder: str | None) -> _Attempt:
    ssh = os.environ.get("GIT_SSH_COMMAND") or run_git("config", "--get", "core.sshCommand").text or "ssh"
    return _Attempt(
        label="as your own git does it",
        url=address.plain(),
        credentials=RepoCredentials(clone_url=address.plain()),
        env={**_QUIET, "GIT_SSH_COMMAND": f"{ssh} -o BatchMode=yes"},
        folder=folder or "/",
    )


def _ask(attempt: _Attempt) -> str | None:
    """What git says against it; `None` if the repository answers."""
    settings = {f"remote.{_NAME}.url": attempt.url, **attempt.settings}
    env = {**attempt.env, **_as_environment(settings)}
    answer = run_git("ls-remote", _NAME, "HEAD", folder=attempt.folder, env=env, timeout=attempt.timeout)
    return None if answer.ok else answer.error or "git says nothing"


def _as_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings as git takes them from its environment, after those that are there."""
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    env = {"GIT_CONFIG_COUNT": str(first + len(settings))}
    for number, (name, value) in enumerate(settings.items(), start=first):
        env |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return env


def _without_secrets(text: str, address: Address, token: str | None) -> str:
    for secret in (token, address.secret):
        if secret:
            text = text.replace(secret, "***").replace(_basic(secret), "***")
    text = re.sub(r"//[^/@\s]+@", "//", text)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _cure(key: bool, token: bool) -> str:
    if key:
        return (
            "Check that the git server knows this key and lets it read this repository, and that the key has no "
            "passphrase. Then: client.repos.init(repo, git_identity_file=...)."
        )
    if token:
        return (
            "Check that the token is right, has not expired, and may read this repository. "
            "Then: client.repos.init(repo, oauth_token=...)."
        )
    return (
        "If it is private, pass what opens it: client.repos.init(repo, git_identity_file='~/.ssh/id_ed25519') or "
        "client.repos.init(repo, oauth_token=...). If not, check its address."
    )
