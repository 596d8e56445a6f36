"""Repos whose files are on this computer, or at a git server: `LocalRepo` and `RemoteRepo`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dstack_core._client.code.address import Address
from dstack_core._models.repos import LocalRunRepoData, RemoteRunRepoData, Repo, VirtualRepo
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._client.code.tree import Tree

Progress = Callable[[int], None]


def _silent(_: int) -> None:
    pass


class LocalRepo(Repo):
    """A folder of this computer: runs get its files, without those that `.gitignore` or `.dstackignore` name.

    Both are read in every folder, as git reads them; `.dstackignore` has the last word. `.git` stays at home. Links
    are brought along as links; one that leads out of the folder is refused.

    Args:
        repo_dir: the folder.
        repo_id: identifies the repo within a project; made from the folder's name and path if not given.

    Raises:
        ConfigurationError: there is no such folder.
    """

    repo_dir: str
    run_repo_data: LocalRunRepoData

    def __init__(self, *, repo_dir: str | Path, repo_id: str | None = None) -> None:
        folder = Path(repo_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigurationError(f"LocalRepo: {folder} is not a folder. Pass the folder that holds your code.")
        self.repo_dir = str(folder)
        self.repo_id = repo_id or _slug(folder.name, str(folder))
        self.run_repo_data = LocalRunRepoData(repo_dir=self.repo_dir)

    @classmethod
    def from_dir(cls, repo_dir: str | Path) -> LocalRepo:
        """The repo of a folder.

        Args:
            repo_dir: the folder.

        Raises:
            ConfigurationError: there is no such folder.
        """
        return cls(repo_dir=repo_dir)

    def write_code_file(self, fp: BinaryIO) -> str:
        """Writes the files that runs get as a tar archive, the same bytes for the same files.

        Args:
            fp: a binary file.

        Returns:
            The archive's SHA-256, in hexadecimal.

        Raises:
            ConfigurationError: something in the folder cannot be sent; says what, and what to do.
        """
        return _write(self, fp)


class RemoteRepo(Repo):
    """A git repository that both this computer and the job can reach.

    With `local_repo_dir`, a run gets what is in that folder now: the job clones the newest commit of its history
    that the git server has, and the rest is brought along: commits that were not pushed, changes that were not
    committed, and new files that `.gitignore` and `.dstackignore` do not name. With `repo_url` the job clones, and
    nothing else.

    Args:
        repo_id: identifies the repo within a project; made from its address if not given.
        local_repo_dir: a working copy on this computer, some of whose history was pushed.
        repo_url: the address to clone from, as `"https://github.com/user/name"` or `"git@github.com:user/name.git"`.
        repo_branch: the branch, with `repo_url`; the default one if not given.
        repo_hash: the commit, with `repo_url`; the newest one if not given.

    Raises:
        ConfigurationError: it is no git repository, has no commits, nothing of it was pushed, or the address cannot be
            read.
    """

    run_repo_data: RemoteRunRepoData

    def __init__(
        self,
        *,
        repo_id: str | None = None,
        local_repo_dir: str | Path | None = None,
        repo_url: str | None = None,
        repo_branch: str | None = None,
        repo_hash: str | None = None,
    ) -> None:
        if (local_repo_dir is None) == (repo_url is None):
            raise ConfigurationError("RemoteRepo: pass either 'local_repo_dir' or 'repo_url'")
        if local_repo_dir is not None:
            self._look_at(Path(local_repo_dir).expanduser().resolve())
        else:
            self._address = Address.parse(str(repo_url))
            self.run_repo_data = _data(self._address, repo_branch, repo_hash)
        self.repo_id = repo_id or _remote_id(self.run_repo_data)

    def _look_at(self, folder: Path) -> None:
        from dstack_core._client.code.working import WorkingCopy

        copy = WorkingCopy(str(folder))
        base = copy.base()
        self.repo_dir = copy.root
        self._address = Address.parse(copy.url(base.remote))
        who = {"repo_config_name": copy.setting("user.name"), "repo_config_email": copy.setting("user.email")}
        self.run_repo_data = _data(self._address, base.branch, base.commit).model_copy(update=who)

    @classmethod
    def from_dir(cls, repo_dir: str | Path) -> RemoteRepo:
        """The repo of a working copy.

        Args:
            repo_dir: the working copy.

        Raises:
            ConfigurationError: it is no git repository, or its branch follows none.
        """
        return cls(local_repo_dir=repo_dir)

    @classmethod
    def from_url(cls, repo_url: str, repo_branch: str | None = None, repo_hash: str | None = None) -> RemoteRepo:
        """The repo at an address.

        Args:
            repo_url: the address to clone from.
            repo_branch: the branch; the default one if not given.
            repo_hash: the commit; the newest one if not given.

        Raises:
            ConfigurationError: the address cannot be read.
        """
        return cls(repo_url=repo_url, repo_branch=repo_branch, repo_hash=repo_hash)

    def write_code_file(self, fp: BinaryIO) -> str:
        """Writes what runs get beyond the commit (changed and new files) as a tar archive.

        The same bytes for the same files. What was deleted is not in it.

        Args:
            fp: a binary file.

        Returns:
            The archive's SHA-256, in hexadecimal.

        Raises:
            ConfigurationError: something in the folder cannot be sent; says what, and what to do.
        """
        return _write(self, fp)


def tree_of_repo(repo: Repo, progress: Progress = _silent) -> Tree:
    """What a run with this repo brings along, as it is now.

    Args:
        repo: the repo.
        progress: told of bytes that were read.

    Raises:
        ConfigurationError: something cannot be sent; says what, and what to do.
    """
    if isinstance(repo, VirtualRepo):
        return _in_memory(repo)
    from dstack_core._client.code.memory import FileMemory
    from dstack_core._client.code.scanning import Found, look_through, tree_of

    if isinstance(repo, RemoteRepo) and repo.repo_dir is not None:
        from dstack_core._client.code.working import WorkingCopy

        found = WorkingCopy(repo.repo_dir).differences(str(repo.run_repo_data.repo_hash))
    elif isinstance(repo, LocalRepo):
        found = Found(repo.repo_dir)
        look_through(repo.repo_dir, found)
    else:
        return _in_memory(None)
    return tree_of(found, FileMemory(f"{type(repo).__name__} {found.root}"), progress)


def _in_memory(repo: VirtualRepo | None) -> Tree:
    from dstack_core._client.code.tree import MemoryTree
    from dstack_core._models.code import problems, shown_list

    tree = MemoryTree(repo.files if repo else {})
    if found := list(problems(tree.manifest)):
        raise ConfigurationError(f"{repo!r} cannot be sent:\n{shown_list(found)}")
    return tree


def _write(repo: Repo, fp: BinaryIO) -> str:
    from dstack_core._client.code.reading import ChangedError
    from dstack_core._client.code.tree import write_tar

    try:
        return write_tar(tree_of_repo(repo), fp)
    except ChangedError as error:
        raise error.advice() from None


def address_of(repo: RemoteRepo) -> Address:
    """Where a repo is cloned from."""
    return repo._address  # noqa: SLF001  # of this module; users are shown `run_repo_data`


def _data(address: Address, branch: str | None, commit: str | None) -> RemoteRunRepoData:
    return RemoteRunRepoData(
        repo_host_name=address.host,
        repo_port=address.port,
        repo_user_name=address.owner,
        repo_name=address.name,
        repo_branch=branch,
        repo_hash=commit,
    )


def _slug(name: str, whole: str) -> str:
    from hashlib import sha256

    readable = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:32] or "repo"
    return f"{readable}-{sha256(whole.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _remote_id(data: RemoteRunRepoData) -> str:
    port = f":{data.repo_port}" if data.repo_port else ""
    return _slug(data.repo_name, f"{data.repo_host_name}{port}/{data.repo_user_name}/{data.repo_name}")
