"""Repos on the server: known, and opened, with nothing readable in the database."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from dstack_core._engine.repos import RepoService
from dstack_core._engine.seams import real_seams
from dstack_core._models.repos import LocalRunRepoData, RemoteRunRepoData
from dstack_core._models.wire import InitRepoRequest, RepoCredentials
from dstack_core._store.store import Store
from dstack_core._store.tables import ProjectRow
from dstack_core._store.vault import Vault
from dstack_core.errors import ConfigurationError, NotFoundError, ServerClientError

pytestmark = pytest.mark.anyio

URL = "https://git.example.com/team/code.git"
DATA = RemoteRunRepoData(repo_host_name="git.example.com", repo_user_name="team", repo_name="code")
PROJECT = UUID(int=1)


@pytest.fixture
async def repos(store: Store, tmp_path: Path) -> RepoService:
    """The repos of a database with one project."""
    seams = real_seams()

    def write(session: Session) -> None:
        session.add(ProjectRow(id=PROJECT, name="main", created_at=seams.clock.now()))

    await store.transact(write)
    return RepoService(seams, store, Vault(tmp_path / "secret.key"))


def request(token: str | None = None) -> InitRepoRequest:
    """Initialises a repo, with a token or without."""
    return InitRepoRequest(
        repo_id="code", repo_data=DATA, credentials=RepoCredentials(clone_url=URL, oauth_token=token)
    )


async def opened(store: Store, repos: RepoService, project: UUID = PROJECT) -> RepoCredentials | None:
    """What opens the repo."""
    return await store.read(lambda session: repos.credentials(session, project, "code"))


async def test_a_repo_is_known_once_it_is_initialised(store: Store, repos: RepoService) -> None:
    """Before, there is none; after, its data is there, and whether something opens it."""
    with pytest.raises(NotFoundError, match=r"There is no repo 'code'.*client\.repos\.init"):
        await repos.get("main", "code")
    assert await opened(store, repos) is None
    await repos.init("main", request())
    assert (await repos.get("main", "code")).repo_data == DATA
    assert not (await repos.get("main", "code")).has_credentials
    await repos.init("main", request("token"))
    assert (await repos.get("main", "code")).has_credentials
    found = await opened(store, repos)
    assert found is not None
    assert (found.clone_url, found.oauth_token) == (URL, "token")
    assert await opened(store, repos, UUID(int=2)) is None


async def test_credentials_stay_until_there_are_new_ones(store: Store, repos: RepoService) -> None:
    """To initialise without a token takes none away; with another one replaces it."""
    await repos.init("main", request("first"))
    await repos.init("main", request())
    await repos.init("main", InitRepoRequest(repo_id="code", repo_data=LocalRunRepoData(repo_dir="/x")))
    found = await opened(store, repos)
    assert found is not None
    assert found.oauth_token == "first"
    await repos.init("main", request("second"))
    found = await opened(store, repos)
    assert found is not None
    assert found.oauth_token == "second"


async def test_the_database_has_no_secret_in_clear(store: Store, repos: RepoService, tmp_path: Path) -> None:
    """Neither the row nor an answer nor `repr` shows the token; another key says which repo it cannot open."""
    await repos.init("main", request("hush-hush"))
    rows = await store.read(lambda session: [str(row) for row in session.execute(text("SELECT * FROM repos"))])
    assert len(rows) == 1
    assert "hush-hush" not in rows[0]
    assert "hush-hush" not in (await repos.get("main", "code")).model_dump_json()
    assert "hush-hush" not in repr(request("hush-hush"))
    other = RepoService(real_seams(), store, Vault(tmp_path / "another.key"))
    with pytest.raises(ConfigurationError, match="What opens the repo 'code' cannot be decrypted"):
        await opened(store, other)
    await other.init("main", request("new"))
    found = await opened(store, other)
    assert found is not None
    assert found.oauth_token == "new"


async def test_projects_that_are_not_there(store: Store, repos: RepoService) -> None:
    """Each method says so."""
    for attempt in (repos.init("p", request()), repos.get("p", "code"), repos.check_project("p")):
        with pytest.raises(ServerClientError, match="There is no project 'p'"):
            await attempt
    assert await store.read(lambda session: session.scalars(select(ProjectRow.name)).all()) == ["main"]
