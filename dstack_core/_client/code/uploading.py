"""Brings a run's code to the server, and nothing that the server has.

It can break off anywhere, and be done again: the server keeps each chunk that arrived whole, and is asked each time
what it lacks. A file that changes between the look at the folder and the sending is noticed by its hash; the folder is
then looked through again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from dstack_core._client.code.progress import UploadProgress
from dstack_core._client.code.reading import TRIES, ChangedError
from dstack_core._client.code.repos import tree_of_repo
from dstack_core._client.connection import Failures
from dstack_core._models.code import MANIFEST_LIMIT, CodeFile, CodeManifest, sizes_of
from dstack_core._models.wire import CHUNK_HEAD, MOST_HASHES
from dstack_core.errors import ConfigurationError, NotFoundError, ServerClientError

if TYPE_CHECKING:
    from dstack_core._client.api import APIClient
    from dstack_core._client.code.tree import Tree
    from dstack_core._models.repos import Repo

MOST_AT_ONCE = 64 << 20
"""Bytes that one request sends, in about."""
_PIECE = 1 << 18
"""Small chunks go together in pieces of that size."""


class _AbandonedError(Exception):
    """Nobody waits for it any more."""


def upload(api: APIClient, project: str, repo: Repo, abandoned: Event | None = None) -> str | None:
    """Brings what a run with this repo needs to the server.

    Args:
        api: speaks to the server.
        project: the project.
        repo: the repo.
        abandoned: is set when nobody waits any more.

    Returns:
        The hash of the code; `None` if there is none to bring along.

    Raises:
        ConfigurationError: something cannot be sent, or changes all the time; says what, and what to do.
        ServerUnavailableError: the server went away, and did not come back.
    """
    with UploadProgress() as progress:
        for attempt in range(TRIES):
            try:
                return _Upload(api, project, progress, abandoned or Event()).once(repo)
            except ChangedError as error:
                if attempt == TRIES - 1:
                    raise error.advice() from None
    raise AssertionError("the last try returns or raises")


class _Place(NamedTuple):
    """Where the bytes of a chunk are."""

    size: int
    file: CodeFile
    number: int


class _Upload:
    def __init__(self, api: APIClient, project: str, progress: UploadProgress, abandoned: Event) -> None:
        self._api = api
        self._project = project
        self._progress = progress
        self._abandoned = abandoned

    def once(self, repo: Repo) -> str | None:
        self._progress.begin("Reading files")
        tree = tree_of_repo(repo, self._advance)
        if tree.manifest == CodeManifest():
            return None
        body = tree.manifest.model_dump_json().encode()
        name = hashlib.sha256(body).hexdigest()
        if not self._is_there(name):
            self._check_size(body)
            self._send_all(tree)
            self._put_manifest(tree, name, body)
        return name

    def _advance(self, size: int) -> None:
        self._check_wanted()
        self._progress.advance(size)

    def _check_wanted(self) -> None:
        if self._abandoned.is_set():
            raise _AbandonedError

    def _is_there(self, name: str) -> bool:
        try:
            self._api.check_code(self._project, name)
        except NotFoundError:
            return False
        return True

    def _check_size(self, body: bytes) -> None:
        if len(body) > MANIFEST_LIMIT:
            raise ConfigurationError(
                "There are too many files, or their paths are too long: the list of them alone has "
                f"{len(body) >> 20} MB. Add to .dstackignore what jobs do not need."
            )

    def _put_manifest(self, tree: Tree, name: str, body: bytes) -> None:
        try:
            self._api.put_code_manifest(self._project, name, body)
        except ServerClientError:
            # Perhaps a chunk was lost on the server meanwhile. If not, the refusal stands.
            if not self._send_all(tree):
                raise
            self._api.put_code_manifest(self._project, name, body)

    def _send_all(self, tree: Tree) -> bool:
        """Sends what the server lacks. False if that is nothing."""
        places = _places(tree.manifest)
        missing = self._missing(list(places))
        self._progress.begin("Sending code", sum(places[name].size for name in missing))
        for names in _batches(missing, places):
            self._send(tree, names, places)
        return bool(missing)

    def _missing(self, names: Sequence[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(names), MOST_HASHES):
            self._check_wanted()
            found += self._api.missing_chunks(self._project, names[start : start + MOST_HASHES])
        return found

    def _send(self, tree: Tree, names: Sequence[str], places: Mapping[str, _Place]) -> None:
        """Sends chunks in one request; after a lost connection again, without those that had arrived."""
        failures = Failures()
        left = list(names)

        def body() -> Iterator[bytes]:
            nonlocal left
            if failures.count:
                before, left = left, self._missing(left)
                if len(left) < len(before):
                    # It goes on, if slowly.
                    failures.forget()
            return _in_pieces(self._stream(tree, left, places))

        self._api.put_chunks(self._project, body, failures)

    def _stream(self, tree: Tree, names: Sequence[str], places: Mapping[str, _Place]) -> Iterator[bytes]:
        for name in names:
            size, file, number = places[name]
            data = tree.chunk(file, number)
            yield bytes.fromhex(name) + len(data).to_bytes(CHUNK_HEAD - 32, "big")
            yield data
            self._advance(size)


def _places(manifest: CodeManifest) -> dict[str, _Place]:
    """Each chunk, in the order of the files; those that are the same once."""
    places: dict[str, _Place] = {}
    for file in manifest.files:
        for number, (name, size) in enumerate(zip(file.chunks, sizes_of(file), strict=True)):
            places.setdefault(name, _Place(size, file, number))
    return places


def _batches(names: Sequence[str], places: Mapping[str, _Place]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += places[name].size
        if size >= MOST_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_pieces(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Many small parts as few larger ones."""
    gathered = bytearray()
    for part in parts:
        if len(part) >= _PIECE:
            if gathered:
                yield bytes(gathered)
                gathered.clear()
            yield part
        else:
            gathered += part
            if len(gathered) >= _PIECE:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)
