"""A git repository on this computer: its base, which the git server has, and all that differs from it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dstack_core._client.code.git import GitAnswer, run_git
from dstack_core._client.code.scanning import Found, RulesByFolder, look_through
from dstack_core.errors import ConfigurationError

_SUBMODULE = "160000"
_DSTACK_IGNORE = (".dstackignore",)
_MANY = 200
"""Branches that one call of git is told."""


class Base(NamedTuple):
    """The newest commit of this copy's history that the git server has.

    Attributes:
        remote: the git server, as this copy calls it.
        branch: a branch there that has the commit.
        commit: its hash.
    """

    remote: str
    branch: str
    commit: str


class _Branch(NamedTuple):
    remote: str
    name: str
    ref: str


class WorkingCopy:
    """A git repository with its files.

    Args:
        folder: a folder in it.

    Raises:
        ConfigurationError: it is no git repository, or has no commits.
    """

    def __init__(self, folder: str) -> None:
        top = run_git("rev-parse", "--show-toplevel", folder=folder)
        if not top.ok:
            raise ConfigurationError(_no_copy(folder, top.error))
        self.root = os.path.realpath(os.fsdecode(top.output.removesuffix(b"\n")))
        if not self._git("rev-parse", "--verify", "--quiet", "HEAD^{commit}").ok:
            raise ConfigurationError(
                f"RemoteRepo: {self.root} has no commits yet. Make one (git add ., git commit) and push it, or use a "
                "LocalRepo, which brings the files along."
            )

    def _git(self, *arguments: str) -> GitAnswer:
        return run_git(*arguments, folder=self.root)

    def setting(self, name: str) -> str | None:
        """A setting of git."""
        return self._git("config", "--get", name).text or None

    def url(self, remote: str) -> str:
        """The address of a git server."""
        return self._git("remote", "get-url", remote).text

    # -- the base ----------------------------------------------------------------------------------------------------

    def base(self) -> Base:
        """The newest commit of this copy's history that the git server has.

        Raises:
            ConfigurationError: the git server has none of them.
        """
        upstream = self._upstream()
        for branches in ([upstream] if upstream else [], list(self._branches())):
            commit = self._common([branch.ref for branch in branches])
            if commit is not None:
                branch = upstream if branches == [upstream] and upstream else self._with(commit, branches)
                return Base(branch.remote, branch.name, commit)
        raise ConfigurationError(
            f"RemoteRepo: No remote branch is configured for {self.root}. Run 'git push --set-upstream origin BRANCH', "
            "or use a LocalRepo, which brings the files along."
        )

    def _upstream(self) -> _Branch | None:
        """The branch that the current one follows; `None` if it follows none of a git server."""
        head = self._git("symbolic-ref", "--quiet", "HEAD")
        if not head.ok:
            return None
        shape = "%(upstream:remotename)%00%(upstream:remoteref)%00%(upstream)%00"
        remote, name, ref, *_ = self._git("for-each-ref", f"--format={shape}", head.text).fields() or ("", "", "")
        if remote in ("", ".") or not ref:
            return None
        return _Branch(remote, name.removeprefix("refs/heads/"), ref)

    def _branches(self) -> Iterator[_Branch]:
        """All branches of git servers that this copy has heard of."""
        remotes = sorted(self._git("remote").text.splitlines(), key=len, reverse=True)
        shape = "--format=%(refname)%00%(symref)%00"
        fields = self._git("for-each-ref", shape, "refs/remotes").fields()
        for ref, target in zip(fields[::2], fields[1::2], strict=True):
            short = ref.strip().removeprefix("refs/remotes/")
            remote = next((remote for remote in remotes if short.startswith(f"{remote}/")), None)
            if remote is not None and not target:
                yield _Branch(remote, short.removeprefix(f"{remote}/"), ref.strip())

    def _common(self, refs: list[str]) -> str | None:
        """The newest commit of HEAD's history that one of these has."""
        while refs:
            found = [self._git("merge-base", "HEAD", *some).text for some in _batches(refs)]
            refs = [commit for commit in dict.fromkeys(found) if commit]
            if len(found) == 1:
                return refs[0] if refs else None
        return None

    def _with(self, commit: str, branches: Iterable[_Branch]) -> _Branch:
        """A branch that has a commit: the one that is named first, but the usual ones before others."""
        answer = self._git("for-each-ref", f"--contains={commit}", "--format=%(refname)", "refs/remotes")
        having = set(answer.text.split())
        found = [branch for branch in branches if branch.ref in having]
        return min(found, key=lambda branch: (branch.name not in ("main", "master"), branch.remote != "origin"))

    # -- what differs from it ----------------------------------------------------------------------------------------

    def differences(self, commit: str) -> Found:
        """All that this copy has and the commit has not, and the names of what the commit alone has.

        Raises:
            ConfigurationError: a submodule has changes that cannot be brought along.
        """
        found = Found(self.root)
        for path, other_kind in self._changed(commit).items():
            if other_kind:
                # What is there must go first: a link, say, where there is a file now.
                found.deleted.append(path)
            self._add(path, found)
        self._add_new(found)
        return found

    def _changed(self, commit: str) -> dict[str, bool]:
        """Paths known to git that differ between the commit and what is there, and whether another kind of entry is."""
        options = ("--raw", "-z", "--no-renames", "--no-ext-diff", "--ignore-submodules=none", "--no-abbrev")
        answer = self._git("diff", *options, commit, "--")
        if not answer.ok:
            raise ConfigurationError(f"RemoteRepo: {self.root} cannot be compared with commit {commit}: {answer.error}")
        fields = answer.fields()
        changes = list(zip(fields[::2], fields[1::2], strict=True))
        if modules := [path for change, path in changes if _is_submodule(change)]:
            raise ConfigurationError(self._about(modules))
        return {path: change.endswith("T") for change, path in changes}

    def _about(self, modules: list[str]) -> str:
        names = ", ".join(repr(name) for name in modules)
        return (
            f"RemoteRepo: in {self.root}, the submodule {names} has changes that the commit on the git server does not "
            "have. Commit and push them in the submodule, then commit and push the new state of the submodule here; or "
            "use a LocalRepo, which brings the files along."
        )

    def _add(self, path: str, found: Found) -> None:
        try:
            entry = os.lstat(os.path.join(self.root, path))
        except (FileNotFoundError, NotADirectoryError):
            entry = None
        if entry is None or stat.S_ISDIR(entry.st_mode):
            # A folder took the place of a file; what is in it has entries of its own.
            found.deleted.append(path)
        else:
            found.add(path, entry)

    def _add_new(self, found: Found) -> None:
        """Adds what git does not know and is told to ignore by nobody."""
        rules = RulesByFolder(self.root, _DSTACK_IGNORE)
        for written in self._git("ls-files", "-z", "--others", "--exclude-standard").fields():
            path = written.removesuffix("/")
            is_folder = path != written
            if rules.ignores(path, is_folder):
                continue
            if is_folder:
                # A repository of its own, which is no submodule: git does not look into it.
                look_through(self.root, found, path)
            else:
                self._add(path, found)


def is_working_copy(folder: str) -> bool:
    """Whether a folder is in a git repository."""
    return run_git("rev-parse", "--show-toplevel", folder=folder).ok


def _is_submodule(change: str) -> bool:
    """Whether a line of `git diff --raw` is about a submodule that is still there."""
    before, after, *_, status = change[1:].split(" ")
    return _SUBMODULE in (before, after) and status != "D"


def _batches(refs: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(refs), _MANY):
        yield refs[start : start + _MANY]


def _no_copy(folder: str, error: str) -> str:
    if "dubious ownership" in error:
        return f"RemoteRepo: git does not trust {folder}: {error}"
    if "must be run in a work tree" in error:
        return f"RemoteRepo: {folder} is a git repository without files. Pass a clone of it."
    return f"RemoteRepo: {folder} is not a git repository. Run 'git init', or use a LocalRepo."
