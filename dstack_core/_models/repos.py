"""Where the code of a run comes from: memory (virtual), a folder (local), or a git repository (remote).

A repo is an ordinary object on the user's computer; its `run_repo_data` is what the server is told about it. Local and
remote ones, which look at files, are in `_client/code/repos.py`.
"""

import io
from pathlib import PurePosixPath
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field

from dstack_core._models._base import shown
from dstack_core._models.code import path_problem
from dstack_core.errors import ConfigurationError

__all__ = [
    "AnyRunRepoData",
    "LocalRunRepoData",
    "RemoteRunRepoData",
    "Repo",
    "VirtualRepo",
    "VirtualRunRepoData",
]


class _RunRepoData(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class VirtualRunRepoData(_RunRepoData):
    """The server's view of a `VirtualRepo`."""

    repo_type: Literal["virtual"] = "virtual"


class LocalRunRepoData(_RunRepoData):
    """The server's view of a `LocalRepo`.

    Attributes:
        repo_dir: the folder on the user's computer, for people.
    """

    repo_type: Literal["local"] = "local"
    repo_dir: str


class RemoteRunRepoData(_RunRepoData):
    """The server's view of a `RemoteRepo`: where to clone from, and what to check out.

    Attributes:
        repo_host_name: host of the git server.
        repo_port: its port; `None` for the usual one.
        repo_user_name: the path on the host without its last part, as `"huggingface"`.
        repo_name: the last part, as `"transformers"`.
        repo_branch: the branch; `None` for the default one.
        repo_hash: the commit; `None` for the newest.
        repo_config_name: the user's name for commits made in the job.
        repo_config_email: the user's address for them.
    """

    repo_type: Literal["remote"] = "remote"
    repo_host_name: str
    repo_port: int | None = None
    repo_user_name: str
    repo_name: str
    repo_branch: str | None = None
    repo_hash: str | None = None
    repo_config_name: str | None = None
    repo_config_email: str | None = None


AnyRunRepoData = Annotated[VirtualRunRepoData | LocalRunRepoData | RemoteRunRepoData, Field(discriminator="repo_type")]


class Repo:
    """Base of the three kinds.

    Attributes:
        repo_id: identifies the repository within a project.
        repo_dir: the folder on this computer; `None` if there is none.
        run_repo_data: what the server is told.
    """

    repo_id: str
    repo_dir: str | None = None
    run_repo_data: VirtualRunRepoData | LocalRunRepoData | RemoteRunRepoData

    def __repr__(self) -> str:
        return f"{type(self).__name__}(repo_id={self.repo_id!r})"

    def write_code_file(self, fp: BinaryIO) -> str:
        """Writes what runs bring along as a tar archive, the same bytes for the same files.

        Args:
            fp: a binary file.

        Returns:
            The archive's SHA-256, in hexadecimal.
        """
        raise NotImplementedError


class VirtualRepo(Repo):
    """Files that are put together in the program; by default none.

    Args:
        repo_id: identifies the repository within a project.
    """

    def __init__(self, repo_id: str) -> None:
        if not repo_id:
            raise ConfigurationError("VirtualRepo: repo_id must not be empty")
        self.repo_id = repo_id
        self.run_repo_data = VirtualRunRepoData()
        self.files: dict[str, bytes] = {}

    def add_file(self, path: str, content: bytes) -> None:
        """Adds a file, or replaces it.

        Args:
            path: where it goes, relative to the repository's root, with `/` between folders.
            content: its bytes.

        Raises:
            ConfigurationError: the path leads out of the repository.
        """
        place = str(PurePosixPath(path))
        if path_problem(place):
            raise ConfigurationError(f"{shown(path)} leads out of the repository: write a relative path without '..'")
        self.files[place] = bytes(content)

    def add_file_from_package(self, package: str, path: str) -> None:
        """Adds a file that an installed package contains, under the same path.

        Args:
            package: the package's import name.
            path: path of the file within the package.

        Raises:
            ConfigurationError: there is no such package or file.
        """
        from importlib.resources import files

        try:
            content = files(package).joinpath(path).read_bytes()
        except (ModuleNotFoundError, OSError) as error:
            raise ConfigurationError(f"there is no file {shown(path)} in package '{package}': {error}") from None
        self.add_file(path, content)

    def write_code_file(self, fp: BinaryIO) -> str:
        """Writes the files as a tar archive, the same bytes for the same files.

        Args:
            fp: a file to write bytes to.

        Returns:
            The archive's SHA-256, in hexadecimal.
        """
        from hashlib import sha256

        archive = _tar(self.files)
        fp.write(archive)
        return sha256(archive).hexdigest()


def _tar(files: dict[str, bytes]) -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
