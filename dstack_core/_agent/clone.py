"""A git repository in the job's folder, by the machine's own git, at its commit, and with no secret left behind.

A token goes through the environment of git's commands; a key lies in a file of the instance as long as they run. What
this machine's user or administrator configured for git does not count, so the same commit is the same files anywhere.
"""

from __future__ import annotations

import os
from binascii import b2a_base64

from .lean import quiet
from .spec import Failed
from .steps import Command, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from .steps import Steps

    Texts = Generator["Command", tuple[int, str], str]
    Answers = Generator["Command", tuple[int, str], tuple[int, str]]

PRIVATE = "git"
"""Folder in the instance's directory that holds the key while git runs."""

_LIMIT = 6 * 3600.0
_PROTOCOLS = "http:https:ssh:git"
# No hooks, no background work that outlives the command, no advice in what we show to people.
_CONFIG = (
    ("core.hooksPath", os.devnull),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    ("init.defaultBranch", "main"),
    ("advice.detachedHead", "false"),
)
_SSH = (
    "ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ConnectTimeout=30 -o ServerAliveInterval=30 "
    "-o LogLevel=ERROR"
)
_NO_GIT = (
    "The run has a git repository, and this machine has no git. Install git there, or submit the files themselves "
    "(LocalRepo), which needs none."
)
_AUTH = ("authentication failed", "could not read", "denied", "error: 401", "error: 403", "not found", "load key")
_NETWORK = (
    "could not resolve",
    "connection refused",
    "timed out",
    "failed to connect",
    "couldn't connect",
    "unreachable",
)
_CURES = {
    "its token": "Check that the token is valid and may read this repository, then "
    "client.repos.init(repo, oauth_token=...).",
    "its SSH key": "Check that the key has no passphrase and may read this repository, then "
    "client.repos.init(repo, git_identity_file=...).",
    "no credentials": "If it is private: client.repos.init(repo, oauth_token=...) for an HTTPS address, or "
    "git_identity_file=... for an SSH one.",
}


_LEAST = (2, 31)
_TOO_OLD = (
    "git %d.%d on this machine cannot be given a token without showing it. Install git 2.31 or newer there, "
    "or use an SSH key (git_identity_file)."
)


def clone(repo: dict[str, Any], folder: str, directory: str) -> Steps:
    """Fills `folder`, which is empty.

    Raises:
        Failed: with reason `code_failed`: git's words, which repository, with which credentials, and the cure.
    """
    git = which("git")
    if git is None:
        raise Failed("code_failed", _NO_GIT)
    private = os.path.join(directory, PRIVATE)
    os.makedirs(private, 0o700, exist_ok=True)
    try:
        yield from _Clone(git, repo, folder, private).steps()
    finally:
        forget(directory)


def forget(directory: str) -> None:
    """Removes the key, and whatever git and ssh wrote beside it."""
    private = os.path.join(directory, PRIVATE)
    with quiet:
        for name in os.listdir(private):
            os.unlink(os.path.join(private, name))
        os.rmdir(private)


class _Clone:
    def __init__(self, git: str, repo: dict[str, Any], folder: str, private: str) -> None:
        self._git, self._folder = git, folder
        self._url: str = repo["url"]
        self._branch: str | None = repo.get("branch")
        self._commit: str | None = repo.get("commit")
        self._identity = (("user.name", repo.get("user_name")), ("user.email", repo.get("user_email")))
        web = self._url.startswith(("http://", "https://"))
        token: str | None = repo.get("oauth_token") if web else None
        key: str | None = repo.get("private_key") if not web else None
        self._method = "its token" if token else "its SSH key" if key else "no credentials"
        header = _basic(token) if token else None
        self._secrets = [secret for secret in (token, header) if secret]
        self._env = _environment(private, _authorization(self._url, header) if header else [], key)

    def steps(self) -> Steps:
        """Fetches, checks out, and configures."""
        if self._secrets:
            yield from self._check_version()
        yield from self._must("init", "--quiet", "--template=", *_format_of(self._commit))
        yield from self._must("remote", "add", "--", "origin", self._url)
        found = yield from (self._newest() if self._commit is None else self._fetch_commit(self._commit))
        where = ["--detach"] if self._branch is None else ["-B", self._branch]
        yield from self._must("checkout", "--quiet", "--force", *where, found)
        modules = os.path.join(self._folder, ".gitmodules")
        if os.path.isfile(modules) and not os.path.islink(modules):
            yield from self._submodules()
        for name, value in self._identity:
            if value:
                yield from self._must("config", "--", name, value)

    # ------------------------------------------------------------------------------------------------ fetching --

    def _newest(self) -> Texts:
        """The newest commit of the branch, which is the default one unless given."""
        if self._branch is None:
            yield from self._find_branch()
        ref = "HEAD" if self._branch is None else "refs/heads/" + self._branch
        yield from self._must(*_FETCH, "--depth", "1", "origin", ref)
        return "FETCH_HEAD"

    def _find_branch(self) -> Steps:
        """The one that the server's HEAD is on, if it is on any."""
        heads = (yield from self._must("ls-remote", "--symref", "--", "origin", "HEAD")).splitlines()
        for line in heads:
            if line.startswith("ref: refs/heads/"):
                self._branch = line[len("ref: refs/heads/") :].partition("\t")[0]
        if not any(line.endswith("\tHEAD") for line in heads):
            raise Failed("code_failed", "The repository %s has no commits. Push one, then submit again." % self._url)

    def _check_version(self) -> Steps:
        words = (yield from self._must("version")).split()
        version = [int(part) for part in words[2].split(".")[:2]] if len(words) > 2 else [0, 0]
        if tuple(version) < _LEAST:
            raise Failed("code_failed", _TOO_OLD % tuple(version))

    def _fetch_commit(self, commit: str) -> Texts:
        """The commit alone if the server gives it out by its hash; else its branch, else everything."""
        if not commit or commit.strip("0123456789abcdef"):
            raise Failed("code_failed", "%r is no commit: a commit is named by its hash, in hexadecimal." % commit)
        ways = [["--depth", "1", "origin", commit], ["--tags", "origin", "+refs/heads/*:refs/remotes/origin/*"]]
        if self._branch is not None:
            ways.insert(1, ["origin", "+refs/heads/{0}:refs/remotes/origin/{0}".format(self._branch)])
        words = ""
        for way in ways:
            code, words = yield from self._run(*_FETCH, *way)
            if code and _is_hopeless(words):
                raise self._failure(words)
            if (yield from self._run("cat-file", "-e", commit + "^{commit}"))[0] == 0:
                return commit
            words = words if code else ""
        if words:
            raise self._failure(words)
        raise Failed("code_failed", _NO_COMMIT % (self._url, commit, self._method))

    def _submodules(self) -> Steps:
        """Shallow if their servers let us; else whole."""
        update = ["submodule", "--quiet", "update", "--init", "--recursive", "--force"]
        code, words = yield from self._run(*update, "--depth", "1")
        if code and not _is_hopeless(words):
            yield from self._run("submodule", "--quiet", "deinit", "--all", "--force")
            yield Command(["rm", "-rf", os.path.join(self._folder, ".git", "modules")])
            code, words = yield from self._run(*update)
        if code:
            raise self._failure(words, "A submodule of the repository")

    # ------------------------------------------------------------------------------------------------ commands --

    def _run(self, *arguments: str) -> Answers:
        return (yield Command([self._git, "-C", self._folder, *arguments], self._env, _LIMIT))

    def _must(self, *arguments: str) -> Texts:
        code, output = yield from self._run(*arguments)
        if code:
            raise self._failure(output)
        return output

    def _failure(self, words: str, what: str = "The repository") -> Failed:
        lower = words.lower()
        for secret in self._secrets:
            words = words.replace(secret, "***")
        said = "; ".join(line.strip() for line in words.splitlines()[-6:] if line.strip())
        # Asked for a name, git was not let in with what it had.
        turned_away = ", which the server refused" if self._secrets and "could not read username" in lower else ""
        message = "%s %s could not be cloned with %s%s. git says: %s. " % (
            what,
            self._url,
            self._method,
            turned_away,
            said,
        )
        if "cannot run ssh" in lower:
            return Failed("code_failed", message + "Install an SSH client (openssh-client) on the machine.")
        if "no space left" in lower:
            return Failed("code_failed", message + "Ask for a machine with a larger disk (resources).")
        if any(word in lower for word in _NETWORK):
            return Failed("code_failed", message + "Check the address, and that the machine reaches it.")
        if any(word in lower for word in _AUTH):
            return Failed("code_failed", message + _CURES[self._method])
        return Failed("code_failed", message + "Check the address, the branch and the commit.")


_FETCH = ("fetch", "--quiet", "--no-recurse-submodules", "--force")
_NO_COMMIT = (
    "The repository %s has no commit %s (looked for with %s: by its hash, then on all branches and tags). "
    "Push it (git push), or ask for another one (repo_hash)."
)


def _is_hopeless(words: str) -> bool:
    """Whether git was refused for a reason that another request would meet, too."""
    lower = words.lower()
    if "not our ref" in lower or "remote ref" in lower or "unadvertised" in lower:
        return False
    return any(word in lower for word in _AUTH + _NETWORK)


def _format_of(commit: str | None) -> list[str]:
    return ["--object-format=sha256"] if commit and len(commit) == 64 else []


def _basic(token: str) -> str:
    """Which user name is asked for besides a token differs; this one is accepted by all that want a certain one."""
    return b2a_base64(b"oauth2:" + token.encode(), newline=False).decode()


def _authorization(url: str, header: str) -> list[tuple[str, str]]:
    """For this host and no other, whichever the submodules are on."""
    scheme, _, host = url.split("/", 3)[:3]
    return [("http.%s//%s/.extraHeader" % (scheme, host), "Authorization: Basic " + header)]


def _environment(private: str, config: list[tuple[str, str]], key: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SSH_ASKPASS", "LC_"))}
    env.update(
        HOME=private,
        XDG_CONFIG_HOME=private,
        LC_ALL="C",
        GIT_CONFIG_NOSYSTEM="1",
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_ATTR_NOSYSTEM="1",
        GIT_TERMINAL_PROMPT="0",
        GIT_ALLOW_PROTOCOL=_PROTOCOLS,
        GIT_HTTP_LOW_SPEED_LIMIT="1",
        GIT_HTTP_LOW_SPEED_TIME="300",
        GIT_SSH_VARIANT="ssh",
        GIT_SSH_COMMAND=_ssh_command(private, key),
    )
    pairs = [*_CONFIG, *config]
    env["GIT_CONFIG_COUNT"] = str(len(pairs))
    for number, (name, value) in enumerate(pairs):
        env["GIT_CONFIG_KEY_%d" % number] = name
        env["GIT_CONFIG_VALUE_%d" % number] = value
    return env


def _ssh_command(private: str, key: str | None) -> str:
    """With a key, that one alone; without, whatever this machine's user has."""
    # ssh takes a percent sign for the begin of a token, and a space for the end of a name.
    known = 'UserKnownHostsFile="%s"' % os.path.join(private, "known_hosts").replace("%", "%%")
    command = "%s -o %s" % (_SSH, _quoted(known))
    if key is None:
        return command
    path = os.path.join(private, "key")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        # OpenSSH reads no key whose last line has no end.
        file.write(key.replace("\r\n", "\n").strip() + "\n")
    return "%s -F none -o IdentitiesOnly=yes -o IdentityAgent=none -i %s" % (command, _quoted(path.replace("%", "%%")))


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"
