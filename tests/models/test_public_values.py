"""Values and errors of the API that programs make or read themselves."""

from __future__ import annotations

from dstack.api import BackendNotInstalledError, Memory, PortUsedError, RemoteRepo


def test_a_size_is_made_of_a_number_of_mib() -> None:
    """`Memory.from_mib` is the size that its text says."""
    assert Memory.from_mib(mib=24576) == Memory("24GB") == 24576


def test_an_address_comes_with_branch_commit_and_id() -> None:
    """What is given beside an address is what the server is told."""
    repo = RemoteRepo(repo_url="https://git.example.com/a/b", repo_branch="main", repo_hash="f" * 40, repo_id="mine")
    assert repo.repo_id == "mine"
    told = repo.run_repo_data.model_dump()
    assert (told["repo_branch"], told["repo_hash"]) == ("main", "f" * 40)
    assert RemoteRepo.from_url("https://git.example.com/a/b", "main", "f" * 40).run_repo_data == repo.run_repo_data


def test_a_taken_port_says_who_has_it_and_what_to_write() -> None:
    """The error knows port and holder, and its text has two ways out."""
    error = PortUsedError(port=8080, holder="nginx (pid 812)", job_port=80)
    assert (error.port, error.holder) == (8080, "nginx (pid 812)")
    assert "8081:80" in str(error)
    assert "*:80" in str(error)


def test_a_backend_that_is_not_installed_says_how_to_install_it() -> None:
    """The error knows the backend, and its text has the line for pip."""
    error = BackendNotInstalledError(backend="aws")
    assert error.backend == "aws"
    assert "pip install dstack-aws" in str(error)
