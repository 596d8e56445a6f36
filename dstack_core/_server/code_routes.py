"""Repos, and the code of runs on its way in: the routes under `repos/` and `code/` (see `_models/wire.py`).

Code comes in as a stream, and is stored as it comes: whatever the size of a body, a few chunks of it are in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from dstack_core._models.code import CHUNK, MANIFEST_LIMIT
from dstack_core._models.wire import (
    CHUNK_HEAD,
    GetRepoRequest,
    InitRepoRequest,
    MissingChunks,
    MissingChunksRequest,
    RepoInfo,
)
from dstack_core._server.bodies import DRAIN_LIMIT, answer, body_of, empty_answer, project_of, read
from dstack_core._store import CodeIncomplete, CodeRefused
from dstack_core.errors import NotFoundError, ServerClientError

Handler = Callable[[Request], Awaitable[Response]]

FLUSH = 4 << 20
"""Bytes of chunks that are stored together. Until then they are in memory."""
MANY = 256
"""Small chunks that are stored together."""


class Code(Protocol):
    """What the store does for these routes (`_store.code.CodeStore`)."""

    async def missing(self, hashes: Sequence[str]) -> list[str]:
        """Which chunks are not here."""

    async def put_chunks(self, chunks: Sequence[tuple[str, bytes]]) -> None:
        """Stores chunks."""

    async def put_manifest(self, manifest_hash: str, body: bytes) -> None:
        """Stores a manifest."""

    async def has_manifest(self, manifest_hash: str) -> bool:
        """Whether it is here with all of its chunks."""


class Repos(Protocol):
    """What the engine does for these routes (`_engine.repos.RepoService`)."""

    async def init(self, project: str, request: InitRepoRequest) -> None:
        """Makes a repo known."""

    async def get(self, project: str, repo_id: str) -> RepoInfo:
        """A repo."""

    async def check_project(self, project: str) -> None:
        """Raises unless there is such a project."""


class CodeApi:
    """The handlers."""

    def __init__(self, code: Code, repos: Repos) -> None:
        self._code = code
        self._repos = repos

    def routes(self) -> Iterator[tuple[str, str, Handler]]:
        """Method, path, handler."""
        project = "/api/project/{project}"
        yield "POST", f"{project}/repos/init", self.init
        yield "POST", f"{project}/repos/get", self.get
        yield "POST", f"{project}/code/missing", self.missing
        yield "PUT", f"{project}/code/chunks", self.put_chunks
        yield "PUT", f"{project}/code/manifests/{{hash}}", self.put_manifest
        yield "GET", f"{project}/code/manifests/{{hash}}", self.has_manifest

    async def init(self, request: Request) -> Response:
        """Makes a repo known."""
        body = await read(request, InitRepoRequest)
        await self._repos.init(project_of(request), body)
        return empty_answer()

    async def get(self, request: Request) -> Response:
        """A repo."""
        body = await read(request, GetRepoRequest)
        return answer(await self._repos.get(project_of(request), body.repo_id))

    async def missing(self, request: Request) -> Response:
        """Which chunks to send."""
        body = await read(request, MissingChunksRequest)
        await self._repos.check_project(project_of(request))
        with _refusals():
            return answer(MissingChunks(hashes=tuple(await self._code.missing(body.hashes))))

    async def put_chunks(self, request: Request) -> Response:
        """Stores chunks as they come. Those before a refused or broken one are kept."""
        await self._repos.check_project(project_of(request))
        pieces = request.stream()
        try:
            with _refusals():
                await self._store(pieces)
        except Exception:
            await _drain(pieces)
            raise
        return empty_answer()

    async def _store(self, pieces: AsyncIterator[bytes]) -> None:
        chunks = ChunkReader()
        try:
            async for piece in pieces:
                chunks.feed(piece)
                if chunks.size >= FLUSH or len(chunks.whole) >= MANY:
                    await self._code.put_chunks(chunks.take())
            chunks.finish()
        finally:
            # When the client is gone, too: what has arrived need not come again.
            await self._code.put_chunks(chunks.take())

    async def put_manifest(self, request: Request) -> Response:
        """Stores a manifest."""
        await self._repos.check_project(project_of(request))
        cure = "Leave files out with a .dstackignore file."
        body = await body_of(request, MANIFEST_LIMIT, cure)
        with _refusals():
            await self._code.put_manifest(request.path_params["hash"], body)
        return empty_answer()

    async def has_manifest(self, request: Request) -> Response:
        """Whether there is nothing to send."""
        await self._repos.check_project(project_of(request))
        name = request.path_params["hash"]
        with _refusals():
            if await self._code.has_manifest(name):
                return empty_answer()
        raise NotFoundError(f"The code {name} is not here.")


class ChunkReader:
    """Takes a stream of chunks apart (see `CHUNK_HEAD`).

    Attributes:
        whole: chunks that are complete, with their names.
        size: bytes in `whole`.
    """

    def __init__(self) -> None:
        self.whole: list[tuple[str, bytes]] = []
        self.size = 0
        self._rest = bytearray()

    def feed(self, piece: bytes) -> None:
        """Adds the next bytes of the stream.

        Raises:
            CodeRefused: a chunk is too large.
        """
        self._rest += piece
        position = 0
        while (end := self._end(position)) is not None:
            name = self._rest[position : position + 32].hex()
            self.whole.append((name, bytes(self._rest[position + CHUNK_HEAD : end])))
            self.size += end - position - CHUNK_HEAD
            position = end
        if position:
            del self._rest[:position]

    def _end(self, position: int) -> int | None:
        """Where the chunk that begins there ends; `None` if that is not here yet."""
        if len(self._rest) < position + CHUNK_HEAD:
            return None
        size = int.from_bytes(self._rest[position + 32 : position + CHUNK_HEAD], "big")
        if not 0 < size <= CHUNK:
            raise CodeRefused(f"A chunk may have 1 to {CHUNK} bytes, not {size}.")
        end = position + CHUNK_HEAD + size
        return end if end <= len(self._rest) else None

    def take(self) -> list[tuple[str, bytes]]:
        """The complete chunks, which are then forgotten here."""
        whole, self.whole, self.size = self.whole, [], 0
        return whole

    def finish(self) -> None:
        """Raises `CodeRefused` if the stream ended in the middle of a chunk."""
        if self._rest:
            raise CodeRefused("The last chunk is not complete.")


class _refusals:  # noqa: N801  # used as a context manager
    """What the store says of a client's code is an answer to that client, not a failure of the server."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, CodeRefused | CodeIncomplete):
            raise ServerClientError(str(error)) from error


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Reads what is left of a body and drops it, so that the client gets to read the refusal."""
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > DRAIN_LIMIT:
            break
