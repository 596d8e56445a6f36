"""Services on a real store with real agents and real processes: replicas that run, end, come back and answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from dstack_core._engine.keeping import ask_to_stop
from dstack_core._engine.replicas import Replica, ServiceView
from dstack_core._models.configurations import Task
from dstack_core._models.runs import Reason, Run, RunStatus
from dstack_core._models.services import Service
from dstack_core._models.wire import LogQuery
from dstack_core._store.store import Store
from dstack_core._store.tables import JobRow, ProjectRow, RunRow
from dstack_core.errors import NoCapacityError, NotFoundError, RunNameTakenError, ServerClientError
from dstack_core.plugin import StateReason
from dstack_core.testing import wait_until
from tests.engine.test_engine import Server
from tests.support.cloud import ScriptedCloud, raising

pytestmark = pytest.mark.anyio

S = RunStatus

# Answers with its process id; whoever asks for /exit/N ends it with that code.
PROGRAM = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/exit/"):
            os._exit(int(self.path[6:]))
        status = 503 if self.path == "/busy" else 200
        body = b"%d" % os.getpid()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
print("starting", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets, and the program of the services in it."""
    path = Path(tempfile.mkdtemp(prefix="dse-"))
    (path / "serve.py").write_text(PROGRAM)
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


def serving(server: Server, **fields: Any) -> Service:
    """A service that runs the program above."""
    command = fields.pop("command", f"exec python3 {server.folder}/serve.py")
    return Service(**{"port": free_port(), "commands": [command], "stop_duration": 1, **fields})


async def view_when(
    server: Server, run: Run, condition: Callable[[ServiceView], bool], timeout: float = 60
) -> ServiceView:
    """Waits until the directory of a server shows a service as wanted."""
    async with asyncio.timeout(timeout):
        while not condition(view := await server.engine.directory.find("main", run.run_name)):  # noqa: ASYNC110  # there is no news of everything
            await asyncio.sleep(0.01)
    return view


async def ready(server: Server, run: Run, count: int = 1) -> ServiceView:
    """Waits until so many replicas are ready."""
    return await view_when(server, run, lambda view: len(view.ready) == count)


async def get(replica: Replica, path: str = "/") -> bytes:
    """What a replica answers to a request; empty if it just ends."""
    loop = asyncio.get_running_loop()
    connection = await replica.connect()
    with contextlib.closing(connection):
        await loop.sock_sendall(connection, f"GET {path} HTTP/1.0\r\n\r\n".encode())
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := await loop.sock_recv(connection, 1 << 16):
                data += piece
    return data.rpartition(b"\r\n\r\n")[2]


async def pids(view: ServiceView) -> list[int]:
    """The process ids of the ready replicas."""
    return [int(await get(replica)) for replica in view.ready]


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_replicas_run_answer_and_are_stopped(server: Server) -> None:
    """Three replicas of one service share this computer, each on a port of its own, until all are stopped."""
    run = await server.submit(serving(server, replicas=3), "svc")
    assert [job.job_spec.job_name for job in run.jobs] == ["svc-0-0", "svc-1-0", "svc-2-0"]
    found = await pids(await ready(server, run, 3))
    assert len(set(found)) == 3
    run = await server.until(run, lambda seen: all(job.job_submissions[-1].ready_at for job in seen.jobs))
    assert run.status is S.RUNNING
    assert run.service is not None
    assert (run.service.path, run.service.replicas, run.service.ready) == ("/services/main/svc/", 3, 3)
    assert run.service.problem is None
    await server.stop(run)
    run = await server.end(run)
    assert (run.status, run.service) == (S.TERMINATED, None)
    assert not [pid for pid in found if alive(pid)]
    await server.idle()
    with pytest.raises(NotFoundError):
        await server.engine.directory.find("main", "svc")


async def test_an_abort_ends_all_replicas(server: Server) -> None:
    """Also those that will not go politely."""
    run = await server.submit(serving(server, replicas=2, command="trap '' TERM; sleep 1000", stop_duration=600))
    await server.until(run, lambda seen: [job.job_submissions[-1].status for job in seen.jobs] == [S.RUNNING] * 2)
    await server.stop(run, abort=True)
    run = await server.end(run)
    assert [job.job_submissions[-1].status for job in run.jobs] == [S.ABORTED] * 2


@pytest.mark.parametrize("how", ["killed", "exit 0", "exit 3"])
async def test_a_replica_that_ends_is_replaced(server: Server, how: str) -> None:
    """Whatever its exit code: another attempt on another instance, ready again; the other replica is left alone."""
    run = await server.submit(serving(server, replicas=2))
    view = await ready(server, run, 2)
    victim, other = await pids(view)
    if how == "killed":
        os.kill(victim, signal.SIGKILL)
    else:
        await get(view.ready[0], f"/exit/{how[-1]}")
    view = await view_when(
        server, run, lambda now: len(now.ready) == 2 and now.ready[0].key != view.ready[0].key, timeout=30
    )
    new, same = await pids(view)
    assert same == other
    assert new != victim
    run = await server.until(run, lambda seen: seen.service is not None and seen.service.ready == 2)
    first, second = run.jobs[0].job_submissions
    assert first.status is S.FAILED
    assert first.exit_code == {"killed": 137, "exit 0": 0, "exit 3": 3}[how]
    assert (second.status, len(run.jobs[1].job_submissions)) == (S.RUNNING, 1)
    assert run.status is S.RUNNING


async def test_a_replica_whose_machine_is_lost_is_replaced(server: Server) -> None:
    """The instance is taken away with its agent: out of the directory, and another one takes its place."""
    run = await server.submit(serving(server))
    view = await ready(server, run)
    await asyncio.to_thread(server.cloud.end, "i-1", StateReason.SPOT_INTERRUPTION)
    await view_when(server, run, lambda now: bool(now.ready) and now.ready[0].key != view.ready[0].key)
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    assert run.jobs[0].job_submissions[0].reason is Reason.INTERRUPTED


async def test_a_crash_loop_fails_the_run_with_the_last_lines(server: Server) -> None:
    """A typo in the command: three attempts, then the run fails, with exit code, count and what was printed."""
    run = await server.submit(serving(server, command="echo so far so good; no-such-program", replicas=2))
    run = await server.end(run)
    assert (run.status, run.reason) == (S.FAILED, Reason.EXITED_WITH_ERROR)
    message = run.message or ""
    for words in ("3 attempts in a row", "exited with code 127", "so far so good", "no-such-program"):
        assert words in message
    for job in run.jobs:
        assert [one.status for one in job.job_submissions] == [S.FAILED] * 3
        assert job.job_submissions[-1].exit_code == 127


async def test_a_service_that_ends_well_but_at_once_fails(server: Server) -> None:
    """Exit code 0 three times in a row without having been ready is no success."""
    run = await server.end(await server.submit(serving(server, command="true")))
    assert run.status is S.FAILED
    assert "a service runs until it is stopped" in (run.message or "")


async def test_a_replica_given_up_comes_back_when_another_one_is_ready(server: Server) -> None:
    """One fails three times before anybody was ready; as soon as the other one is, it gets another try."""
    gate, fail = server.folder / "gate", server.folder / "fail"
    fail.touch()
    # Whoever makes the folder first is the one that waits; the other one fails.
    command = (
        f"if mkdir {server.folder}/first 2>/dev/null; then while [ ! -e {gate} ]; do sleep 0.02; done; "
        f"elif [ -e {fail} ]; then exit 9; fi; exec python3 {server.folder}/serve.py"
    )
    run = await server.submit(serving(server, command=command, replicas=2))
    run = await server.until(
        run, lambda seen: S.FAILED in [job.job_submissions[-1].status for job in seen.jobs] and _attempts(seen) == 4
    )
    view = await view_when(server, run, lambda now: "given up" in (now.problem or ""))
    assert "exited with code 9" in (view.problem or "")
    fail.unlink()
    gate.touch()
    await ready(server, run, 2)


def _attempts(run: Run) -> int:
    return sum(len(job.job_submissions) for job in run.jobs)


async def test_once_ready_it_is_replaced_for_ever(server: Server) -> None:
    """More than three ends in a row do not fail a service that has been ready before."""
    broken = server.folder / "broken"
    run = await server.submit(
        serving(server, command=f"[ ! -e {broken} ] || exit 7; exec python3 {server.folder}/serve.py")
    )
    view = await ready(server, run)
    broken.touch()
    await get(view.ready[0], "/exit/1")
    run = await server.until(run, lambda seen: _attempts(seen) >= 5)
    assert not run.status.is_finished
    broken.unlink()
    await ready(server, run)


async def test_no_capacity_for_a_replacement_is_waited_for(server: Server) -> None:
    """Nothing is free when a replica has to be replaced: it waits, says so, and starts when there is something."""
    run = await server.submit(serving(server))
    view = await ready(server, run)
    offers, server.cloud.offers = server.cloud.offers, []
    await get(view.ready[0], "/exit/1")
    run = await server.until(run, lambda seen: _attempts(seen) >= 3)
    assert run.status in (S.PENDING, S.SUBMITTED)
    assert run.service is not None
    server.cloud.offers = offers
    await ready(server, run)


async def test_no_capacity_for_the_first_attempt_is_as_the_retry_policy_says(server: Server) -> None:
    """Without one, a service that no cloud takes fails as a task does."""
    server.cloud.before["create"] = [*raising(NoCapacityError("dry"))]
    run = await server.end(await server.submit(serving(server)))
    assert (run.status, run.reason) == (S.FAILED, Reason.NO_CAPACITY)
    assert "dry" in (run.message or "")


async def test_max_duration_ends_all_replicas(server: Server) -> None:
    """When the time is over all replicas end, those that wait to be replaced included."""
    command = f"mkdir {server.folder}/first 2>/dev/null || exit 5; exec python3 {server.folder}/serve.py"
    run = await server.submit(serving(server, command=command, replicas=2, max_duration=4))
    run = await server.end(run)
    ends = {job.job_submissions[-1].reason for job in run.jobs}
    assert Reason.MAX_DURATION_EXCEEDED in ends
    assert run.status in (S.TERMINATED, S.FAILED)


async def test_a_port_that_never_answers_is_said(server: Server) -> None:
    """What was probed, where, what came of it, since when, and what the program printed."""
    port = free_port()
    run = await server.submit(serving(server, command="echo loading weights; exec sleep 1000", port=port))
    view = await view_when(server, run, lambda now: "loading weights" in (now.problem or ""))
    problem = view.problem or ""
    assert f"replica 0: GET / on port {port}: connection refused" in problem
    assert "since " in problem
    assert view.ready == ()
    run = await server.until(run, lambda seen: bool(seen.service and seen.service.problem))
    assert run.service is not None
    assert run.service.ready == 0


async def test_a_program_that_ignores_port_is_found_out(server: Server) -> None:
    """Replicas that share a computer cannot all have the service's port: the problem says where they were to listen."""
    port = free_port()
    command = f"exec env PORT={port} python3 {server.folder}/serve.py"
    run = await server.submit(serving(server, command=command, port=port, replicas=2))
    view = await view_when(
        server, run, lambda now: "as its variable PORT says: connection refused" in (now.problem or "")
    )
    assert view.ready == ()
    run = await server.until(run, lambda seen: "given up" in (seen.service.problem or "") if seen.service else False)
    assert run.service is not None
    assert "Address already in use" in (run.service.problem or "")
    assert "as its variable PORT says" in (run.service.problem or "")


async def test_probes_decide_who_is_ready(server: Server) -> None:
    """A configured probe wants answers of 200 to 299, so many in a row; the default one takes all below 500."""
    probes = [{"type": "http", "url": "/busy", "ready_after": 2}]
    run = await server.submit(serving(server, probes=probes))
    view = await view_when(server, run, lambda now: "503" in (now.problem or ""))
    assert "GET /busy on port" in (view.problem or "")
    assert view.ready == ()
    other = await server.submit(serving(server, probes=[{"type": "http", "url": "/x", "ready_after": 3}]))
    await ready(server, other)


async def test_a_suspected_replica_is_left_out_until_it_answers(server: Server) -> None:
    """A failed connection takes a replica out at once, and the next good probe brings it back."""
    run = await server.submit(serving(server))
    view = await ready(server, run)
    (replica,) = view.ready
    pid = int(await get(replica))
    os.kill(pid, signal.SIGSTOP)
    try:
        server.engine.directory.suspect(run.id, replica.key)
        assert (await server.engine.directory.find("main", run.run_name)).ready == ()
        waited = await server.engine.directory.wait_for_ready(run.id, 0.3)
        assert waited.ready == ()
    finally:
        os.kill(pid, signal.SIGCONT)
    waited = await server.engine.directory.wait_for_ready(run.id, 30)
    assert [one.key for one in waited.ready] == [replica.key]


async def test_another_server_adopts_replicas_and_probes_them(store: Store, server: Server, folder: Path) -> None:
    """A server ends with replicas running; the next one serves the same processes, and replaces one that dies."""
    run = await server.submit(serving(server, replicas=2))
    before = await pids(await ready(server, run, 2))
    await server.engine.stop()
    other = Server(store, server.cloud, folder)
    await other.engine.start()
    try:
        view = await ready(other, run, 2)
        assert await pids(view) == before
        os.kill(before[1], signal.SIGKILL)
        await view_when(other, run, lambda now: len(now.ready) == 2 and now.ready[1].key != view.ready[1].key)
        await other.stop(run)
        await other.end(run)
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_two_servers_of_one_database_serve_the_same_replicas(store: Store, server: Server, folder: Path) -> None:
    """Each finds and probes them for itself, and drops one that ended, whoever holds the lease."""
    other = Server(store, server.cloud, folder, alone=False)
    await other.engine.start()
    try:
        run = await server.submit(serving(server, replicas=2, model="m"))
        first = await ready(server, run, 2)
        second = await ready(other, run, 2)
        assert [one.key for one in first.ready] == [one.key for one in second.ready]
        assert [view.model for view in await other.engine.directory.models("main")] == ["m"]
        os.kill((await pids(first))[0], signal.SIGKILL)
        for one in (server, other):
            await view_when(one, run, lambda now: len(now.ready) == 2 and now.ready[0].key != first.ready[0].key)
        await other.stop(run)
        await server.end(run)
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_a_single_replica_gets_the_services_own_port(server: Server) -> None:
    """A program that knows nothing of PORT works, if it is alone and its port is free."""
    port = free_port()
    command = f"exec env PORT={port} python3 {server.folder}/serve.py"
    run = await server.submit(serving(server, command=command, port=port))
    await ready(server, run)
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    data = run.jobs[0].job_submissions[-1].job_provisioning_data
    assert data is not None
    assert data.ports == {port: port}


async def test_a_taken_port_is_passed_around_by_telling_another_one(server: Server) -> None:
    """The service's own port is in use: the program is told another one, and traffic finds it there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = await server.submit(serving(server, port=port))
        view = await ready(server, run)
        assert await pids(view)
        run = await server.until(run, lambda seen: seen.status is S.RUNNING)
        data = run.jobs[0].job_submissions[-1].job_provisioning_data
        assert data is not None
        assert data.ports[port] != port


async def test_a_port_that_the_user_set_and_that_is_taken_fails_with_the_cure(server: Server) -> None:
    """PORT set by the user leaves no choice: the run says which port is taken and what to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = await server.end(await server.submit(serving(server, port=port, env={"PORT": str(port)})))
    assert (run.status, run.reason) == (S.FAILED, Reason.PORTS_BINDING_FAILED)
    assert f"Port {port} is taken" in (run.message or "")
    assert "Remove PORT from `env`" in (run.message or "")


async def test_two_services_on_one_name(server: Server) -> None:
    """The second is refused with the cure while the first is active; its name is free when it has ended."""
    run = await server.submit(serving(server), "same")
    with pytest.raises(RunNameTakenError, match="A run named 'same' is active"):
        await server.submit(serving(server), "same")
    await server.stop(run, abort=True)
    await server.end(run)
    again = await server.submit(serving(server), "same")
    view = await ready(server, again)
    assert view.run_id == again.id


async def test_each_replica_has_its_own_output(server: Server) -> None:
    """Replica 0 unless another one is asked for; one that does not exist is named."""
    run = await server.submit(serving(server, command="echo $$; exec sleep 1000", replicas=2))
    await server.until(run, lambda seen: [job.job_submissions[-1].status for job in seen.jobs] == [S.RUNNING] * 2)
    said = []
    for number in range(2):
        stream = await server.engine.service.logs("main", run.id, LogQuery(replica_num=number))
        said.append(await anext(aiter(stream.chunks)))
    assert said[0] != said[1]
    with pytest.raises(ServerClientError, match="no replica 2: there is 0 to 1"):
        await server.engine.service.logs("main", run.id, LogQuery(replica_num=2))


async def test_what_is_no_service_is_not_found(server: Server) -> None:
    """A task, an unknown name and an unknown project."""
    await server.submit(Task(commands=["sleep 1000"], stop_duration=1), "task")
    for project, name in (("main", "task"), ("main", "nothing"), ("nowhere", "task")):
        with pytest.raises(NotFoundError, match=name):
            await server.engine.directory.find(project, name)


async def test_a_run_that_is_stopped_while_a_replica_is_replaced_ends(server: Server) -> None:
    """The stop holds for the attempt that comes next as well, whichever of the two came first."""
    run = await server.submit(serving(server, replicas=2))
    view = await ready(server, run, 2)
    for pid in await pids(view):
        os.kill(pid, signal.SIGKILL)
    await server.stop(run)
    run = await server.end(run)
    assert run.status in (S.TERMINATED, S.FAILED)
    await server.idle()
    assert not server.cloud.alive()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def test_a_stop_that_meets_the_next_attempt(store: Store) -> None:
    """One server ends an attempt and adds the next, another one stops the run at that moment: the next one is told."""
    run, first, second = UUID(int=1), UUID(int=2), UUID(int=3)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    await store.transact(lambda session: write_run(session, run, first, now))
    ending, stopping = threading.Event(), threading.Event()

    def replace(session: Session) -> None:
        row = session.get_one(JobRow, first, with_for_update=True)
        ending.set()
        if session.get_bind().dialect.name == "postgresql":
            stopping.wait(30)
            wait_until(lambda: waiting(session), what="the stop to wait for this transaction")
        row.status, row.due_at = S.FAILED.value, None
        session.add(attempt(run, second, 1, now))

    def stop(session: Session) -> Sequence[UUID]:
        stopping.set()
        return ask_to_stop(session, run, "stop", now)

    replacing = asyncio.create_task(store.transact(replace))
    await asyncio.to_thread(ending.wait, 30)
    told = await store.transact(stop)
    await replacing
    assert list(told) == [second]


def waiting(session: Session) -> bool:
    """Whether anybody waits for a lock."""
    return bool(session.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar())


def write_run(session: Session, run: UUID, job: UUID, now: datetime) -> None:
    """A run with one job."""
    project = ProjectRow(id=UUID(int=9), name="other", created_at=now)
    session.add(project)
    session.flush()
    session.add(
        RunRow(
            id=run,
            project_id=project.id,
            user="me",
            name="r",
            submit_key=run,
            spec="{}",
            status=S.RUNNING.value,
            submitted_at=now,
        )
    )
    session.flush()
    session.add(attempt(run, job, 0, now))


def attempt(run: UUID, job: UUID, number: int, now: datetime) -> JobRow:
    """An attempt that runs."""
    return JobRow(id=job, run_id=run, attempt=number, spec="{}", status=S.RUNNING.value, submitted_at=now, due_at=now)
