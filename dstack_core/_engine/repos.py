"""The repos that a project knows, and what opens the private ones."""

from __future__ import annotations

import json
from datetime import datetime
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import bindparam, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._engine.seams import Seams
from dstack_core._models.repos import AnyRunRepoData
from dstack_core._models.runs import RunStatus
from dstack_core._models.wire import InitRepoRequest, RepoCredentials, RepoInfo
from dstack_core._store.store import Store
from dstack_core._store.tables import ProjectRow, RepoRow, RunRow
from dstack_core._store.vault import Vault
from dstack_core.errors import NotFoundError, ServerClientError

_PROJECT = select(ProjectRow.id).where(ProjectRow.name == bindparam("name"))
_REPO = select(RepoRow).where(RepoRow.project_id == bindparam("project_id"), RepoRow.repo_id == bindparam("repo_id"))
_FINISHED = [status.value for status in RunStatus if status.is_finished]
_DATA: TypeAdapter[AnyRunRepoData] = TypeAdapter(AnyRunRepoData)


class RepoService:
    """Repos of all projects.

    Args:
        seams: clock and ids.
        store: the database.
        vault: encrypts what opens a private repo.
    """

    def __init__(self, seams: Seams, store: Store, vault: Vault) -> None:
        self._seams = seams
        self._store = store
        self._vault = vault

    async def init(self, project: str, request: InitRepoRequest) -> None:
        """Makes a repo known, or its credentials new. Credentials without a secret do not replace any with one.

        Raises:
            ServerClientError: there is no such project.
            ConfigurationError: the credentials cannot be encrypted.
        """

        def write(session: Session) -> None:
            self._write(session, _project_id(session, project), request)

        try:
            await self._store.transact(write)
        except IntegrityError:
            # Another server has written it just now.
            await self._store.transact(write)

    async def get(self, project: str, repo_id: str) -> RepoInfo:
        """A repo, without what opens it.

        Raises:
            NotFoundError: it was never initialised.
        """

        def find(session: Session) -> RepoInfo | None:
            row = _row(session, _project_id(session, project), repo_id)
            return (
                None
                if row is None
                else RepoInfo(
                    repo_id=repo_id,
                    repo_data=_DATA.validate_json(row.repo_data),
                    has_credentials=_has_secret(self._opened(row)),
                )
            )

        found = await self._store.read(find)
        if found is None:
            raise NotFoundError(f"There is no repo '{repo_id}' in project '{project}'. {_INIT}")
        return found

    async def check_project(self, project: str) -> None:
        """Raises `ServerClientError` unless there is such a project."""
        await self._store.read(lambda session: _project_id(session, project))

    def credentials(self, session: Session, project_id: UUID, repo_id: str) -> RepoCredentials | None:
        """What opens a repo, in the middle of a transaction; `None` if it is not known, or open to all.

        Raises:
            ConfigurationError: it cannot be decrypted.
        """
        row = _row(session, project_id, repo_id)
        return self._opened(row) if row is not None else None

    async def code_in_use(self) -> set[str]:
        """The manifests of the runs that have not ended."""

        def look(session: Session) -> set[str]:
            specs = session.scalars(select(RunRow.spec).where(RunRow.status.not_in(_FINISHED)))
            found = {json.loads(spec).get("repo_code_hash") for spec in specs}
            return {code_hash for code_hash in found if code_hash}

        return await self._store.read(look)

    def _write(self, session: Session, project_id: UUID, request: InitRepoRequest) -> None:
        now = self._seams.clock.now()
        row = _row(session, project_id, request.repo_id)
        if row is None:
            row = self._new_row(project_id, request.repo_id, now)
            session.add(row)
        row.repo_data = request.repo_data.model_dump_json()
        row.updated_at = now
        if request.credentials is not None and not self._keeps_more(row, request.credentials):
            row.credentials = self._vault.encrypt(request.credentials.model_dump_json())

    def _new_row(self, project_id: UUID, repo_id: str, now: datetime) -> RepoRow:
        return RepoRow(
            id=self._seams.ids.uuid7(),
            project_id=project_id,
            repo_id=repo_id,
            repo_data="",
            created_at=now,
            updated_at=now,
        )

    def _keeps_more(self, row: RepoRow, new: RepoCredentials) -> bool:
        return not _has_secret(new) and _has_secret(self._opened(row))

    def _opened(self, row: RepoRow) -> RepoCredentials | None:
        if row.credentials is None:
            return None
        what = f"What opens the repo '{row.repo_id}'"
        return RepoCredentials.model_validate_json(self._vault.decrypt(row.credentials, what))


_INIT = "Make it known with client.repos.init(repo)."


def check_known(session: Session, project_id: UUID, repo_id: str) -> None:
    """Raises `ServerClientError` unless this repo was initialised."""
    if _row(session, project_id, repo_id) is None:
        raise ServerClientError(f"The repo '{repo_id}' is not initialized. {_INIT}")


def _row(session: Session, project_id: UUID, repo_id: str) -> RepoRow | None:
    return session.scalars(_REPO, {"project_id": project_id, "repo_id": repo_id}).one_or_none()


def _has_secret(credentials: RepoCredentials | None) -> bool:
    return credentials is not None and bool(credentials.private_key or credentials.oauth_token)


def _project_id(session: Session, name: str) -> UUID:
    found = session.scalars(_PROJECT, {"name": name}).one_or_none()
    if found is None:
        raise ServerClientError(f"There is no project '{name}' on this server. Use project_name='main'.")
    return found
