"""The code of a job, as its agent is told: which archive to unpack, which repository to clone, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from uuid import UUID

from sqlalchemy.orm import Session

from dstack_core._engine.repos import RepoService
from dstack_core._models.repos import RemoteRunRepoData
from dstack_core._models.runs import JobSpec
from dstack_core._models.wire import RepoCredentials
from dstack_core._store import CodeIncomplete
from dstack_core._store.code import CodeStore
from dstack_core._store.store import Store
from dstack_core._store.tables import RunRow
from dstack_core._transport import AgentCode, AgentConnection, AgentRefused, AgentRepo
from dstack_core.errors import ConfigurationError

_ELSEWHERE, _NO_ROOM = 409, 507


class CodeUnavailable(Exception):
    """A job cannot have its code. The text is for people, with the cure."""


class JobCode:
    """What the jobs of this server start with.

    Args:
        store: the database.
        code: archives.
        repos: what opens private repositories. It is decrypted for the moment in which an agent is told, and kept
            nowhere else.
    """

    def __init__(self, store: Store, code: CodeStore, repos: RepoService) -> None:
        self._store = store
        self._code = code
        self._repos = repos

    async def archive_of(self, spec: JobSpec) -> AgentCode | None:
        """The archive of a job's code; `None` if it has no files of its own.

        Raises:
            CodeUnavailable: the server does not have it any more.
        """
        if spec.code_hash is None:
            return None
        try:
            manifest = await self._code.manifest(spec.code_hash)
            empty = not (manifest.files or manifest.links or manifest.folders)
            size = 0 if empty else await self._code.archive_size(spec.code_hash)
        except (CodeIncomplete, OSError) as error:
            raise CodeUnavailable(str(error)) from error
        if empty and not manifest.deleted:
            return None
        return AgentCode(hash=spec.code_hash, size=size, deleted=manifest.deleted)

    async def repo_of(self, run_id: UUID, spec: JobSpec) -> AgentRepo | None:
        """The repository that a job is to clone, with what opens it; `None` if it clones none.

        Raises:
            CodeUnavailable: what opens it cannot be decrypted.
        """
        repo_id, data = spec.repo_id, spec.repo_data
        if repo_id is None or data is None:
            return None

        def look(session: Session) -> RepoCredentials | None:
            return self._repos.credentials(session, session.get_one(RunRow, run_id).project_id, repo_id)

        try:
            credentials = await self._store.read(look)
        except ConfigurationError as error:
            raise CodeUnavailable(str(error)) from error
        return AgentRepo(
            url=credentials.clone_url if credentials is not None else _open_address(data),
            branch=data.repo_branch,
            commit=data.repo_hash,
            oauth_token=credentials.oauth_token if credentials is not None else None,
            private_key=credentials.private_key if credentials is not None else None,
            user_name=data.repo_config_name,
            user_email=data.repo_config_email,
        )

    async def send(
        self, agent: AgentConnection, archive: AgentCode, woken: asyncio.Event, answered: Callable[[], None]
    ) -> bool:
        """Sends what the agent does not have yet, from where it stands; calls `answered` with each sign of life.

        Returns:
            True when the agent has all of it; False if `woken` came first. The next call goes on, from any server.

        Raises:
            AgentUnreachable: it does not answer (any more).
            AgentRefused: it will not take it.
            CodeUnavailable: a part of it is not on the server any more, or the machine has no room.
        """
        stuck_at = -1
        while (position := await agent.code_size(archive.hash)) < archive.size:
            answered()
            try:
                if not await self._send_from(position, agent, archive, woken, answered):
                    return False
            except AgentRefused as refused:
                if refused.status == _NO_ROOM:
                    raise CodeUnavailable(f"{refused}. {_LARGER}") from refused
                # Perhaps another server sends as well, until it finds that it lost its lease.
                if refused.status != _ELSEWHERE or position == stuck_at:
                    raise
                stuck_at = position
            except (CodeIncomplete, OSError) as error:
                raise CodeUnavailable(str(error)) from error
        return True

    async def _send_from(
        self,
        position: int,
        agent: AgentConnection,
        archive: AgentCode,
        woken: asyncio.Event,
        answered: Callable[[], None],
    ) -> bool:
        async with aclosing(self._code.archive(archive.hash, position)) as pieces:
            async for piece in pieces:
                position = await agent.put_code(archive.hash, position, piece)
                answered()
                # After each piece, so that however often it is woken it gets on.
                if woken.is_set():
                    return False
        return True


_LARGER = "Ask for a machine with a larger disk (resources=Resources(disk=...)), or leave files out (.dstackignore)"


def _open_address(data: RemoteRunRepoData) -> str:
    """Where a repository is that nobody said more about."""
    port = f":{data.repo_port}" if data.repo_port else ""
    return f"https://{data.repo_host_name}{port}/{data.repo_user_name}/{data.repo_name}.git"
