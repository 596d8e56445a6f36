"""Virtual, local and remote repositories as they stand on the user's computer."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dstack.api import LocalRepo, RemoteRepo
from dstack_core._models.repos import (
    AnyRunRepoData,
    LocalRunRepoData,
    RemoteRunRepoData,
    VirtualRepo,
    VirtualRunRepoData,
)
from dstack_core.errors import ConfigurationError


def git(folder: Path, *arguments: str) -> str:
    """Runs git, with an identity and no settings of this computer."""
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main")
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_virtual_repository_holds_files_in_memory() -> None:
    """Files are added, replaced, and packed into the same archive each time."""
    repo = VirtualRepo("mine")
    repo.add_file("src/train.py", b"print(1)")
    repo.add_file("data.bin", b"\0\xff")
    repo.add_file("./src/train.py", b"print(2)")
    assert (repo.repo_id, repo.repo_dir, repo.run_repo_data) == ("mine", None, VirtualRunRepoData())
    first, second = io.BytesIO(), io.BytesIO()
    digest = repo.write_code_file(first)
    assert repo.write_code_file(second) == digest == hashlib.sha256(first.getvalue()).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(first.getvalue())) as archive:
        members = [archive.extractfile(name) for name in archive.getnames()]
        contents = {name: file.read() for name, file in zip(archive.getnames(), members, strict=True) if file}
    assert contents == {"data.bin": b"\0\xff", "src/train.py": b"print(2)"}


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "."])
def test_files_stay_inside_the_repository(path: str) -> None:
    """An absolute path, or one that leads out, is refused."""
    with pytest.raises(ConfigurationError, match="leads out of the repository"):
        VirtualRepo("mine").add_file(path, b"")


def test_a_file_of_a_package() -> None:
    """A file that an installed package ships is added under its own path."""
    repo = VirtualRepo("mine")
    repo.add_file_from_package("dstack_core", "errors.py")
    assert b"ConfigurationError" in repo.files["errors.py"]
    for package, path in (("dstack_core", "no.py"), ("no_such_package", "x")):
        with pytest.raises(ConfigurationError, match="there is no file"):
            repo.add_file_from_package(package, path)


def test_a_virtual_repository_needs_an_id() -> None:
    """The empty name is no name."""
    with pytest.raises(ConfigurationError, match="repo_id"):
        VirtualRepo("")


def test_a_local_repository_is_a_folder(tmp_path: Path) -> None:
    """Its id comes from name and path, so two folders of one name differ, and one is the same each time."""
    for parent in ("a", "b"):
        (tmp_path / parent / "My Code").mkdir(parents=True)
    one, other = (LocalRepo(repo_dir=tmp_path / parent / "My Code") for parent in ("a", "b"))
    assert one.repo_id.startswith("my-code-")
    assert one.repo_id == LocalRepo.from_dir(str(tmp_path / "a" / "My Code")).repo_id != other.repo_id
    assert one.run_repo_data == LocalRunRepoData(repo_dir=str(tmp_path / "a" / "My Code"))
    assert LocalRepo(repo_dir=tmp_path, repo_id="x").repo_id == "x"
    with pytest.raises(ConfigurationError, match="is not a folder"):
        LocalRepo(repo_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("url", "host", "port", "user", "name"),
    [
        ("https://github.com/a/b", "github.com", None, "a", "b"),
        ("https://github.com/a/b.git", "github.com", None, "a", "b"),
        ("https://token@host.org:8443/a/b/", "host.org", 8443, "a", "b"),
        ("git@github.com:a/b.git", "github.com", None, "a", "b"),
        ("ssh://git@host.org:2222/group/sub/b.git", "host.org", 2222, "group/sub", "b"),
    ],
)
def test_addresses_of_remote_repositories(url: str, host: str, port: int | None, user: str, name: str) -> None:
    """HTTPS, SSH and the short form of SSH are read; credentials in them are dropped."""
    repo = RemoteRepo.from_url(url, repo_branch="main", repo_hash="abc")
    assert repo.run_repo_data == RemoteRunRepoData(
        repo_host_name=host, repo_port=port, repo_user_name=user, repo_name=name, repo_branch="main", repo_hash="abc"
    )
    assert repo.repo_dir is None
    assert "token" not in repo.run_repo_data.model_dump_json()


def test_one_repository_has_one_id() -> None:
    """All addresses of a repository give the same id."""
    ids = {RemoteRepo(repo_url=url).repo_id for url in ("https://github.com/a/b", "git@github.com:a/b.git")}
    assert len(ids) == 1


@pytest.mark.parametrize(
    "url", ["", "secret", "https://secret@host", "ftp://secret@host/a/b", "https://host/a b/secret"]
)
def test_an_address_that_cannot_be_read(url: str) -> None:
    """The message says how an address is written, and does not repeat this one."""
    with pytest.raises(ConfigurationError, match="the address cannot be read") as refusal:
        RemoteRepo(repo_url=url)
    assert "secret" not in str(refusal.value)


def test_a_remote_repository_has_one_source(tmp_path: Path) -> None:
    """A folder or an address, not both and not neither."""
    with pytest.raises(ConfigurationError, match="either 'local_repo_dir' or 'repo_url'"):
        RemoteRepo()
    with pytest.raises(ConfigurationError, match="either 'local_repo_dir' or 'repo_url'"):
        RemoteRepo(local_repo_dir=tmp_path, repo_url="https://github.com/a/b")


def test_a_working_copy_tells_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branch and commit are those that the git server has, not what was committed here since."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ConfigurationError, match="is not a git repository"):
        RemoteRepo.from_dir(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    git(tmp_path, "init", "--bare", "server.git")
    git(copy, "init")
    git(copy, "commit", "--allow-empty", "-m", "first")
    with pytest.raises(ConfigurationError, match=r"No remote branch is configured.*git push --set-upstream"):
        RemoteRepo(local_repo_dir=copy)
    git(copy, "remote", "add", "origin", str(tmp_path / "server.git"))
    git(copy, "push", "--set-upstream", "origin", "main")
    git(copy, "remote", "set-url", "origin", "git@example.com:team/code.git")
    pushed = git(copy, "rev-parse", "HEAD")
    git(copy, "commit", "--allow-empty", "-m", "second")
    git(copy, "config", "user.name", "Ann")
    repo = RemoteRepo.from_dir(copy)
    assert repo.repo_dir == str(copy)
    assert repo.run_repo_data == RemoteRunRepoData(
        repo_host_name="example.com",
        repo_user_name="team",
        repo_name="code",
        repo_branch="main",
        repo_hash=pushed,
        repo_config_name="Ann",
    )


def test_the_data_of_a_repository_goes_through_json(tmp_path: Path) -> None:
    """The server tells the three kinds apart by `repo_type`."""
    adapter: TypeAdapter[AnyRunRepoData] = TypeAdapter(AnyRunRepoData)
    for repo in (VirtualRepo("a"), LocalRepo(repo_dir=tmp_path), RemoteRepo(repo_url="https://github.com/a/b")):
        assert adapter.validate_python(repo.run_repo_data.model_dump(mode="json")) == repo.run_repo_data


def test_repositories_show_their_id() -> None:
    """`repr` has the kind and the id."""
    assert repr(VirtualRepo("mine")) == "VirtualRepo(repo_id='mine')"
