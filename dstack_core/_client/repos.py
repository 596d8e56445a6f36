"""`client.repos`: where the code of runs comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core.errors import ConfigurationError, NotFoundError

if TYPE_CHECKING:
    from os import PathLike

    from dstack_core._client.api import APIClient
    from dstack_core._client.code.repos import LocalRepo, RemoteRepo
    from dstack_core._models.repos import Repo
    from dstack_core._models.wire import RepoCredentials


class RepoCollection:
    """The repos of the project.

    A `RemoteRepo` is initialised once, so that jobs can clone it:

        repo = RemoteRepo.from_dir(".")
        client.repos.init(repo, git_identity_file="~/.ssh/id_ed25519")
        client.runs.submit(Task(commands=["python train.py"]), repo=repo)

    A `LocalRepo` and a `VirtualRepo` need no initialisation.
    """

    def __init__(self, api_client: APIClient, project: str) -> None:
        self._api = api_client
        self._project = project

    def init(
        self,
        repo: Repo,
        git_identity_file: str | PathLike[str] | None = None,
        oauth_token: str | None = None,
    ) -> None:
        """Makes a repo known to the server; for a `RemoteRepo`, together with what opens it.

        Whether it can be cloned is tried out first, from this computer: with the key or the token that is passed; or
        else as anybody, over HTTPS, and then as your own git does it. Key and token go to the server, which keeps them
        encrypted and gives them to jobs of this repo. Without them, those that the server has stay.

        Args:
            repo: the repo.
            git_identity_file: a private key, without a passphrase, that git may use to clone it.
            oauth_token: a token that git may use to clone it, over HTTPS.

        Raises:
            ConfigurationError: it cannot be cloned; says what was tried, what git said, and what to do.
            ServerUnavailableError: no server answered.
        """
        self._api.init_repo(
            self._project, repo.repo_id, repo.run_repo_data, self._credentials(repo, git_identity_file, oauth_token)
        )

    def is_initialized(self, repo: Repo) -> bool:
        """Whether the server knows this repo.

        Args:
            repo: the repo.
        """
        try:
            self._api.get_repo(self._project, repo.repo_id)
        except NotFoundError:
            return False
        return True

    def load(
        self,
        repo_dir: str | PathLike[str],
        local: bool = False,
        init: bool = False,
        git_identity_file: str | PathLike[str] | None = None,
        oauth_token: str | None = None,
    ) -> RemoteRepo | LocalRepo:
        """Makes a repo of a folder on this computer.

        Args:
            repo_dir: the folder.
            local: make it a `LocalRepo` even if it is a git repository.
            init: initialise it, and note it in `config.yml`: a `RemoteRepo` if the folder is a git repository, else a
                `LocalRepo`. Without this, it must have been done before.
            git_identity_file: as for `init`.
            oauth_token: as for `init`.

        Raises:
            ConfigurationError: it was not initialised, or cannot be; says what to do.
        """
        folder = Path(repo_dir).expanduser().resolve()
        if init:
            return self._initialized(folder, local, git_identity_file, oauth_token)
        return self._noted(folder, local)

    def _initialized(
        self, folder: Path, local: bool, key: str | PathLike[str] | None, token: str | None
    ) -> RemoteRepo | LocalRepo:
        from dstack_core._client.code.repos import LocalRepo, RemoteRepo
        from dstack_core._client.code.working import is_working_copy
        from dstack_core._client.config import config_path
        from dstack_core._client.noted_repos import RepoEntry, save_repo

        remote = not local and is_working_copy(str(folder))
        repo: RemoteRepo | LocalRepo = RemoteRepo.from_dir(folder) if remote else LocalRepo.from_dir(folder)
        self.init(repo, key, token)
        # With the folder that was passed: it may lie within the working copy.
        key_path = str(Path(key).expanduser().absolute()) if key is not None else None
        save_repo(config_path(), RepoEntry(str(folder), repo.repo_id, "remote" if remote else "local", key_path))
        return repo

    def _noted(self, folder: Path, local: bool) -> RemoteRepo | LocalRepo:
        from dstack_core._client.code.repos import LocalRepo, RemoteRepo
        from dstack_core._client.config import config_path
        from dstack_core._client.noted_repos import find_repo

        entry = find_repo(config_path(), str(folder))
        if entry is None or (local and entry.repo_type != "local"):
            raise ConfigurationError(_not_initialized(folder, local))
        repo: RemoteRepo | LocalRepo
        if entry.repo_type == "remote":
            repo = RemoteRepo(repo_id=entry.repo_id, local_repo_dir=folder)
        else:
            repo = LocalRepo(repo_id=entry.repo_id, repo_dir=folder)
        if not self.is_initialized(repo):
            raise ConfigurationError(_not_initialized(folder, local))
        return repo

    def _opens(self, repo: Repo) -> bool:
        """Whether the server has what opens the repo."""
        try:
            return self._api.get_repo(self._project, repo.repo_id).has_credentials
        except NotFoundError:
            return False

    def _credentials(self, repo: Repo, key: str | PathLike[str] | None, token: str | None) -> RepoCredentials | None:
        from dstack_core._client.code.repos import RemoteRepo, address_of

        if not isinstance(repo, RemoteRepo):
            return None
        from dstack_core._client.code.access import find_credentials

        if key is None and token is None and self._opens(repo):
            # As it was the last time. Whether it still does is for the job to find out.
            return None
        return find_credentials(address_of(repo), repo.repo_dir, key, token)

    def __repr__(self) -> str:
        return f"<RepoCollection of project '{self._project}'>"


def _not_initialized(folder: Path, local: bool) -> str:
    arguments = f"{str(folder)!r}, {'local=True, ' if local else ''}init=True"
    return f"The repo is not initialized: {folder}. Initialize it once: client.repos.load({arguments})."
