"""The code of a job on its way from the store to a real agent: in pieces, stopped, resumed, its secrets kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from dstack_core._engine.code import JobCode
from dstack_core._engine.specs import agent_job_spec
from dstack_core._models.code import CHUNK, CodeFile, CodeLink, CodeManifest
from dstack_core._models.configurations import Task
from dstack_core._models.profiles import Profile, RetryEvent, RetryPolicy
from dstack_core._models.repos import RemoteRunRepoData
from dstack_core._models.runs import Reason, Run, RunSpec, RunStatus
from dstack_core._models.wire import InitRepoRequest, RepoCredentials
from dstack_core._store.code import PIECE, CodeStore
from dstack_core._store.store import Store
from dstack_core._store.tables import Base, JobRow
from dstack_core._transport import (
    AgentCode,
    AgentJobSpec,
    AgentRefused,
    AgentState,
    AgentUnreachable,
    agent_command,
    build_agent,
)
from dstack_core._transport.agent_client import AgentClient
from dstack_core.testing import wait_until
from tests.engine.test_engine import Server
from tests.support.cloud import ScriptedCloud, offers_in
from tests.support.git_hosts import GitServer, Repository

pytestmark = pytest.mark.anyio

S = RunStatus
TOKEN = "t0k3n-hush-hush"
BIG = os.urandom(1 << 20) * 20
"""Five pieces, and what is around them."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="dse-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def server(store: Store, folder: Path) -> AsyncIterator[Server]:
    """A running engine whose cloud starts real agents."""
    cloud = ScriptedCloud(agents=folder / "agents")
    server = Server(store, cloud, folder)
    await server.engine.start()
    yield server
    await server.engine.stop()
    await server.logs.aclose()
    await asyncio.to_thread(cloud.close)


@pytest.fixture
async def code(folder: Path) -> AsyncIterator[CodeStore]:
    """The store of the server's code, as the upload has it."""
    store = CodeStore(folder / "code")
    yield store
    await store.aclose()


async def put(code: CodeStore, files: Mapping[str, bytes], **more: Any) -> str:
    """Stores files, as an upload does, and gives the manifest's hash."""
    entries = []
    for path, data in sorted(files.items()):
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        hashes = tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)
        await code.put_chunks(list(zip(hashes, chunks, strict=True)))
        entries.append(CodeFile(path=path, size=len(data), executable=path.endswith(".sh"), chunks=hashes))
    body = CodeManifest(files=tuple(entries), **more).model_dump_json().encode()
    name = hashlib.sha256(body).hexdigest()
    await code.put_manifest(name, body)
    return name


async def submit(
    server: Server, script: str, code_hash: str | None, profile: Profile | None = None, **spec: Any
) -> Run:
    """Submits a task that starts with this code."""
    run = RunSpec(
        configuration=Task(commands=[script], stop_duration=1),
        profile=profile or Profile(),
        repo_code_hash=code_hash,
        **spec,
    )
    return await server.engine.service.submit("main", "me", run, uuid4())


# ------------------------------------------------------------------------------------------------------- sending --


async def test_the_job_finds_the_files(server: Server, code: CodeStore) -> None:
    """Files of any size, executable ones, links and empty folders, in the job's working directory."""
    name = await put(
        code,
        {"a.txt": b"text", "big": BIG, "run.sh": b"echo ran", "src/empty": b""},
        links=(CodeLink(path="src/up", target="../a.txt"),),
        folders=("void",),
    )
    run = await submit(server, "./run.sh; cat src/up; sha256sum < big | cut -c1-8; ls -d */", name)
    expected = f"ran\ntext{hashlib.sha256(BIG).hexdigest()[:8]}\nsrc/\nvoid/\n"
    assert (await server.output(run)).decode().split() == expected.split()
    assert (await server.end(run)).status is S.DONE


async def test_working_dir_of_the_run(server: Server, code: CodeStore) -> None:
    """Below the job's folder; one that the code does not have fails the run with what there is."""
    name = await put(code, {"src/a.txt": b"text"})
    assert await server.output(await submit(server, "cat a.txt", name, working_dir="src")) == b"text"
    run = await server.end(await submit(server, "cat a.txt", name, working_dir="scr"))
    assert (run.status, run.reason) == (S.FAILED, Reason.START_FAILED)
    assert "'scr'" in (run.message or "")
    assert "'src'" in (run.message or "")


async def test_code_without_files_is_not_sent(server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to send, nothing to unpack."""

    async def put_code(*_: object) -> int:
        raise AssertionError("sent")

    monkeypatch.setattr(AgentClient, "put_code", put_code)
    run = await submit(server, "ls -A | wc -l", await put(code, {}))
    assert await server.output(run) == b"0\n"


class Gate:
    """Stands between the store and the agent: lets pieces through until it is closed, and notes where reads begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.passed = 0
        self.closes_after = 1
        self.closed, self.open = asyncio.Event(), asyncio.Event()
        self.between: Callable[[str, int, bytes], Awaitable[None]] | None = None
        real = CodeStore.archive
        gate = self

        async def archive(store: CodeStore, name: str, offset: int) -> AsyncGenerator[bytes, None]:
            gate.begun.append(offset)
            async with aclosing(real(store, name, offset)) as pieces:
                async for piece in pieces:
                    if gate.passed >= gate.closes_after:
                        gate.closed.set()
                        await gate.open.wait()
                    if gate.between is not None:
                        await gate.between(name, offset, piece)
                    gate.passed += 1
                    offset += len(piece)
                    yield piece

        monkeypatch.setattr(CodeStore, "archive", archive)


async def test_stop_while_code_is_sent(server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the piece that is under way: the rest is not sent, and the job never runs."""
    gate = Gate(monkeypatch)
    run = await submit(server, "echo ran", await put(code, {"big": BIG}))
    await asyncio.wait_for(gate.closed.wait(), 30)
    await server.stop(run)
    gate.open.set()
    run = await server.end(run)
    assert run.status is S.TERMINATED
    assert gate.passed <= 2
    assert await server.output(run) == b""
    await server.idle()
    assert not server.cloud.alive()


async def test_the_next_server_goes_on_where_one_stopped(
    server: Server, store: Store, folder: Path, code: CodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends in the middle of sending: the other one reads from where the agent stands."""
    gate = Gate(monkeypatch)
    gate.closes_after = 2
    run = await submit(server, "sha256sum < big", await put(code, {"big": BIG}))
    await asyncio.wait_for(gate.closed.wait(), 30)
    await server.engine.stop()
    gate.closes_after = 1000
    other = Server(store, server.cloud, folder)
    await other.engine.start()
    try:
        assert (await other.output(run)).split()[0].decode() == hashlib.sha256(BIG).hexdigest()
        assert gate.begun[0] == 0
        assert PIECE < gate.begun[-1] <= 2 * PIECE
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_two_that_send_at_once_do_no_harm(
    server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Another server, that has yet to find that it lost its lease, is ahead by a piece: the agent's word counts."""
    gate = Gate(monkeypatch)
    gate.closes_after = 1000

    async def ahead(name: str, offset: int, piece: bytes) -> None:
        if gate.passed == 1:
            (sock,) = (folder / "agents").glob("*/agent.sock")
            agent = AgentClient(lambda: _connected(sock), "agent")
            await agent.put_code(name, offset, piece)
            await agent.aclose()

    gate.between = ahead
    run = await submit(server, "sha256sum < big", await put(code, {"big": BIG}))
    assert (await server.output(run)).split()[0].decode() == hashlib.sha256(BIG).hexdigest()
    assert len(gate.begun) == 2


async def _connected(sock: Path) -> Any:
    import socket

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(sock))
    connection.setblocking(False)
    return connection


async def test_an_agent_that_is_lost_while_code_is_sent(
    server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at any other time before it runs: the next offer is taken, and its agent gets all of the code."""
    server.cloud.offers = list(offers_in("a", "b"))
    gate = Gate(monkeypatch)
    run = await submit(server, "sha256sum < big", await put(code, {"big": BIG}))
    await asyncio.wait_for(gate.closed.wait(), 30)
    await asyncio.to_thread(server.cloud.end, "i-1")
    gate.closes_after = 1000
    gate.open.set()
    assert (await server.output(run)).split()[0].decode() == hashlib.sha256(BIG).hexdigest()
    assert gate.begun == [0, 0]
    assert len(server.cloud.instances) == 2


async def test_an_agent_that_is_lost_once_it_has_the_job(
    server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have begun, though nobody has heard so: the attempt is over, and no other machine begins it again."""
    server.cloud.offers = list(offers_in("a", "b"))
    put_job = AgentClient.put_job

    async def put_and_lose(agent: AgentClient, job_id: str, spec: AgentJobSpec) -> AgentState:
        await put_job(agent, job_id, spec)
        await asyncio.to_thread(server.cloud.end, "i-1")
        raise AgentUnreachable("it is gone")

    monkeypatch.setattr(AgentClient, "put_job", put_and_lose)
    run = await server.end(await submit(server, "true", await put(code, {"a": b"1"})))
    assert (run.status, run.reason) == (S.FAILED, Reason.AGENT_LOST)
    assert len(server.cloud.instances) == 1


@pytest.mark.parametrize(("what", "named"), [("manifests", "The code "), ("chunks", "'a.txt'")])
async def test_code_that_the_server_lost(server: Server, code: CodeStore, folder: Path, what: str, named: str) -> None:
    """A manifest, or the bytes of a file, that went away after the submit: the run says so, and what to do."""
    name = await put(code, {"a.txt": b"text"})
    server.cloud.after["create"] = [lambda: shutil.rmtree(folder / "code" / what)]
    run = await server.end(await submit(server, "true", name))
    assert (run.status, run.reason) == (S.FAILED, Reason.START_FAILED)
    for words in (named, "Submit the run again"):
        assert words in (run.message or "")


async def test_a_machine_without_room(server: Server, code: CodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails with the agent's words, and says what to ask for."""

    async def put_code(*_: object) -> int:
        raise AgentRefused(507, "the machine's disk has no room for the code: after 0 bytes, No space left on device")

    monkeypatch.setattr(AgentClient, "put_code", put_code)
    run = await server.end(await submit(server, "true", await put(code, {"a": b"1"})))
    assert (run.status, run.reason) == (S.FAILED, Reason.START_FAILED)
    for words in ("no room for the code", "Resources(disk=", ".dstackignore"):
        assert words in (run.message or "")


async def test_memory_stays_flat(code: CodeStore, store: Store, server: Server, folder: Path) -> None:
    """Sending 160 MB takes the memory of a few pieces."""
    chunk = os.urandom(CHUNK)
    name = await put(code, {"big": chunk * 40})
    sock = await _idle_agent(folder)
    agent = AgentClient(lambda: _connected(sock), "agent")
    archive = AgentCode(hash=name, size=await code.archive_size(name))
    tracemalloc.start()
    try:
        sender = JobCode(store, code, server.engine.repos)
        assert await sender.send(agent, archive, asyncio.Event(), lambda: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        await agent.shutdown()
        await agent.aclose()
    assert peak < 8 * PIECE


async def _idle_agent(folder: Path) -> Path:
    place = folder / "idle"
    place.mkdir()
    process = await asyncio.create_subprocess_exec(*agent_command(build_agent(folder)), cwd=place)
    await asyncio.to_thread(wait_until, (place / "agent.sock").exists)
    assert process.returncode is None
    return place / "agent.sock"


# -------------------------------------------------------------------------------------------------- repositories --


@pytest.fixture
def repository(git_server: GitServer) -> Repository:
    """`me/code`, private, with two commits."""
    repository = git_server.repository("me/code")
    repository.commit({"a.txt": "one", "gone.txt": ""})
    repository.commit({"a.txt": "two"})
    git_server.token = TOKEN
    return repository


async def init(server: Server, git_server: GitServer, repo_hash: str, token: str = TOKEN) -> dict[str, Any]:
    """Makes the repository known, and gives what a run's specification says of it."""
    data = RemoteRunRepoData(
        repo_host_name="127.0.0.1",
        repo_user_name="me",
        repo_name="code",
        repo_branch="main",
        repo_hash=repo_hash,
        repo_config_name="Ada",
        repo_config_email="ada@example.org",
    )
    credentials = RepoCredentials(clone_url=git_server.url_of("me/code"), oauth_token=token)
    await server.engine.repos.init("main", InitRepoRequest(repo_id="code-1", repo_data=data, credentials=credentials))
    return {"repo_id": "code-1", "repo_data": data.model_dump(mode="json")}


async def test_a_private_repository_with_changes(
    server: Server,
    git_server: GitServer,
    repository: Repository,
    code: CodeStore,
    store: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The commit, the user's changes over it; the token is in no row, no log, and no account of the run."""
    first = repository.commit({"b.txt": "b"})
    about = await init(server, git_server, first)
    name = await put(code, {"a.txt": b"changed"}, deleted=("gone.txt",))
    run = await submit(server, "ls; cat a.txt; git rev-parse HEAD; git config user.email", name, **about)
    assert (await server.output(run)).decode().split() == ["a.txt", "b.txt", "changed" + first, "ada@example.org"]
    run = await server.end(run)
    assert run.status is S.DONE
    shown = [*caplog.messages, run.model_dump_json(), (await server.output(run, diagnose=True)).decode()]
    assert not any(TOKEN in text for text in [*shown, *await _rows(store)])


async def _rows(store: Store) -> list[str]:
    """Everything that is in the database, as text."""
    tables = Base.metadata.sorted_tables
    rows = await store.read(lambda session: [str(row) for table in tables for row in session.execute(select(table))])
    assert any("code-1" in row for row in rows)
    return rows


async def test_wrong_credentials(server: Server, git_server: GitServer, repository: Repository) -> None:
    """Which repository, how it was tried, what to do; a retry policy for errors tries again."""
    about = await init(server, git_server, "1" * 40, token="wrong")
    policy = RetryPolicy(retry=True, on_events=[RetryEvent.ERROR])
    run = await submit(server, "true", None, Profile(retry_policy=policy), **about)
    run = await server.until(run, lambda seen: len(seen.jobs[0].job_submissions) > 1)
    failed = run.jobs[0].job_submissions[0]
    assert (failed.status, failed.reason) == (S.FAILED, Reason.START_FAILED)
    for words in (git_server.url_of("me/code"), "with its token", "client.repos.init"):
        assert words in (failed.message or "")
    await server.stop(run, abort=True)
    await server.end(run)


async def test_credentials_that_cannot_be_decrypted(
    server: Server, git_server: GitServer, repository: Repository, store: Store, folder: Path
) -> None:
    """The key of the server was lost: the run fails and says so, without a word of what was encrypted."""
    about = await init(server, git_server, repository.commit({"c.txt": ""}))
    (folder / "secret.key").unlink()
    await server.engine.stop()
    other = Server(store, server.cloud, folder)
    await other.engine.start()
    try:
        run = await other.end(await submit(other, "true", None, **about))
        assert (run.status, run.reason) == (S.FAILED, Reason.START_FAILED)
        assert "code-1" in (run.message or "")
        assert TOKEN not in (run.message or "")
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_newer_credentials_are_no_other_job(
    server: Server, git_server: GitServer, repository: Repository, store: Store, folder: Path
) -> None:
    """A server dies after it gave the job away, and the token is renewed meanwhile: the job goes on all the same."""
    commit = repository.commit({"c.txt": ""})
    about = await init(server, git_server, commit)
    git_server.hold.set()
    run = await submit(server, "echo cloned", None, **about)
    assert await asyncio.to_thread(git_server.held.wait, 30)
    await server.engine.stop()
    await init(server, git_server, commit, token="newer")
    other = Server(store, server.cloud, folder)
    await other.engine.start()
    try:
        git_server.release()
        assert await other.output(run) == b"cloned\n"
        assert (await other.end(run)).status is S.DONE
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_what_the_agent_is_told_is_rendered_from_the_job(server: Server, code: CodeStore, store: Store) -> None:
    """Code and repository stand in the job's own row without any secret, and reach the agent's document."""
    name = await put(code, {"a": b"1"})
    run = await server.end(await submit(server, "true", name))
    row = await store.read(lambda session: session.scalars(select(JobRow).where(JobRow.run_id == run.id)).one())
    assert name in row.spec
    told = agent_job_spec(run.jobs[0].job_spec, AgentCode(hash=name, size=5, deleted=("x",))).document()
    assert told["code"] == {"hash": name, "size": 5, "deleted": ("x",)}
    assert told["repo"] is None
