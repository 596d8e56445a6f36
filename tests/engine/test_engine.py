"""The whole engine on a real store with real agents, and a cloud that a test scripts."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import RFC_4122, uuid4

import pytest

from dstack_core._engine.engine import Engine
from dstack_core._engine.seams import real_seams
from dstack_core._engine.service import PLAN_TIMEOUT
from dstack_core._models.configurations import Task
from dstack_core._models.profiles import Profile, RetryEvent, RetryPolicy
from dstack_core._models.runs import Reason, Run, RunSpec, RunStatus
from dstack_core._models.services import Service
from dstack_core._models.wire import GetRunRequest, LogQuery, StopRunsRequest
from dstack_core._store.code import CodeStore
from dstack_core._store.logs import LogStore
from dstack_core._store.store import Store
from dstack_core._store.vault import Vault
from dstack_core._transport import LocalTransport, build_agent
from dstack_core.errors import (
    NoCapacityError,
    NoOffersError,
    NotFoundError,
    QuotaExceededError,
    ServerClientError,
    UnknownOutcomeError,
)
from dstack_core.plugin import Availability, InstanceState, Offer, StateReason
from tests.support.cloud import SMALL, ScriptedCloud, hub_of, offers_in, raising

pytestmark = pytest.mark.anyio

S = RunStatus
FOREVER = Task(commands=["echo up", "sleep 1000"], stop_duration=1)


class Server:
    """One engine, as one server process has it."""

    def __init__(
        self,
        store: Store,
        cloud: ScriptedCloud,
        folder: Path,
        alone: bool = True,
        plan_timeout: float = PLAN_TIMEOUT,
    ) -> None:
        self.cloud = cloud
        self.folder = folder
        self.logs = LogStore(folder / "logs")
        self.engine = Engine(
            seams=real_seams(),
            store=store,
            logs=self.logs,
            code=CodeStore(folder / "code"),
            vault=Vault(folder / "secret.key"),
            backends=hub_of(cloud),
            transport=LocalTransport(),
            agent_pyz=build_agent(folder),
            lease_owner=f"server-{uuid4()}",
            alone=alone,
            plan_timeout=plan_timeout,
        )

    async def submit(self, task: Task | Service, name: str | None = None, **profile: Any) -> Run:
        """Submits a run."""
        spec = RunSpec(run_name=name, configuration=task, profile=Profile(**profile))
        return await self.engine.service.submit("main", "me", spec, uuid4())

    async def until(self, run: Run, condition: Callable[[Run], bool], timeout: float = 60) -> Run:
        """Waits for a run to be as wanted."""
        async with asyncio.timeout(timeout):
            while not condition(run):
                request = GetRunRequest(run_id=run.id, after_version=run.version, wait=5)
                run = await self.engine.service.get("main", request)
        return run

    async def end(self, run: Run) -> Run:
        """Waits for the end of a run."""
        return await self.until(run, lambda seen: seen.status.is_finished)

    async def idle(self) -> None:
        """Waits until nothing runs and every instance is confirmed gone."""
        async with asyncio.timeout(60):
            while not await self.engine.is_idle():  # noqa: ASYNC110  # what is waited for is in the database
                await asyncio.sleep(0.02)

    async def output(self, run: Run, diagnose: bool = False) -> bytes:
        """All output of a run."""
        data = b""
        while True:
            query = LogQuery(offset=len(data), diagnose=diagnose)
            stream = await self.engine.service.logs("main", run.id, query)
            if stream.end:
                return data
            async for chunk in stream.chunks:
                data += chunk

    async def stop(self, run: Run, abort: bool = False) -> None:
        """Has a run stopped."""
        await self.engine.service.stop("main", StopRunsRequest(run_ids=(run.id,), abort=abort))


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


async def test_a_run_from_submit_to_its_confirmed_end(server: Server) -> None:
    """Submitted, placed, created, run, output read, instance gone, all accounted for."""
    run = await server.submit(Task(commands=["echo hello"]))
    assert await server.output(run) == b"hello\n"
    run = await server.end(run)
    assert (run.status, run.jobs[0].job_submissions[0].exit_code) == (S.DONE, 0)
    await server.idle()
    assert not server.cloud.alive()
    account = (await server.output(run, diagnose=True)).decode()
    assert "terminating -> terminated" in account


async def test_failover_passes_over_what_is_refused(server: Server) -> None:
    """No capacity in the first zone, no quota in the second: the third runs it; the history tells, with the offers."""
    first, *others = offers_in("a", "b", "c")
    server.cloud.offers = [replace(first, instance_type="large", spot=True, price=0.8048), *others]
    server.cloud.before["create"] = [
        *raising(NoCapacityError("none left in a")),
        *raising(QuotaExceededError("quota in b", scope="zone")),
    ]
    run = await server.submit(Task(commands=["echo hello"]))
    run = await server.end(run)
    submission = run.latest_job_submission
    assert submission is not None
    assert submission.job_provisioning_data is not None
    assert (run.status, submission.job_provisioning_data.zone) == (S.DONE, "c")
    account = (await server.output(run, diagnose=True)).decode()
    assert "(sim/here/a, large, $0.8048/h, spot): intent -> failed: none left in a\n" in account
    assert "(sim/here/b, small, $1.01/h, on demand): intent -> failed: quota in b\n" in account
    assert "(sim/here/c, small, $1.02/h, on demand): intent -> starting\n" in account


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.TERMINATED])
async def test_failover_passes_over_what_falls_short_late(server: Server, state: InstanceState) -> None:
    """Accepted in the first zone, and not made: the second one runs it, and the next run does not ask the first."""
    server.cloud.offers = list(offers_in("a", "b"))
    server.cloud.late = [state]
    run = await server.end(await server.submit(Task(commands=["echo hello"])))
    assert run.status is S.DONE
    account = (await server.output(run, diagnose=True)).decode()
    assert re.search(r"\(sim/here/a, .*\): starting -> .*\(no capacity\)", account), account
    await server.end(await server.submit(Task(commands=["echo hello"])))
    assert [request.offer.zone for request in server.cloud.requests] == ["a", "b", "b"]


async def test_a_late_shortage_is_retried_as_one(server: Server) -> None:
    """With no other offer left, it is for the policy's "no-capacity", and not for its "interruption"."""
    server.cloud.late = [InstanceState.STOPPING, InstanceState.STOPPING]
    server.cloud.offers = list(offers_in("a"))
    retried = RetryPolicy(retry=True, on_events=[RetryEvent.NO_CAPACITY])
    run = await server.submit(Task(commands=["true"]), retry_policy=retried)
    run = await server.until(run, lambda seen: len(seen.jobs[0].job_submissions) > 1)
    assert run.jobs[0].job_submissions[0].reason is Reason.NO_CAPACITY
    await server.stop(run)
    server.cloud.offers = list(offers_in("b"))
    only = RetryPolicy(retry=True, on_events=[RetryEvent.INTERRUPTION])
    run = await server.end(await server.submit(Task(commands=["true"]), retry_policy=only))
    assert (run.status, run.reason) == (S.FAILED, Reason.NO_CAPACITY)
    assert "(no capacity)" in (run.message or "")


async def test_when_all_offers_are_refused_the_run_fails_with_their_words(server: Server) -> None:
    """What each zone said is in the message of the run, and what was to be bought there."""
    server.cloud.offers = list(offers_in("a", "b"))
    server.cloud.before["create"] = [*raising(NoCapacityError("dry in a")), *raising(NoCapacityError("dry in b"))]
    run = await server.end(await server.submit(Task(commands=["true"])))
    assert (run.status, run.reason) == (S.FAILED, Reason.NO_CAPACITY)
    assert "sim/here (small, $1/h, on demand): dry in a; " in (run.message or "")
    assert "sim/here (small, $1.01/h, on demand): dry in b" in (run.message or "")


async def test_a_plan_waits_as_long_as_it_is_told(store: Store, folder: Path) -> None:
    """A cloud that is slower than that is named, with the time."""
    cloud, released = ScriptedCloud(), threading.Event()

    def stand_still() -> None:
        released.wait(60)

    cloud.before["offers"] = [stand_still]
    server = Server(store, cloud, folder, plan_timeout=0.25)
    await server.engine.start()
    try:
        spec = RunSpec(configuration=Task(commands=["true"]), profile=Profile())
        plan = await server.engine.service.get_plan("main", "ann", spec)
        assert not plan.job_plans[0].offers
        assert any("did not answer within 0.25 s" in note for note in plan.job_plans[0].notes)
    finally:
        released.set()
        await server.engine.stop()
        await server.logs.aclose()
        await asyncio.to_thread(cloud.close)


async def test_an_unclear_create_ends_in_one_instance(server: Server) -> None:
    """The answer is lost after the cloud did it: one instance, one run of the task."""
    server.cloud.idempotent = False
    server.cloud.after["create"] = raising(UnknownOutcomeError("reset"))
    run = await server.submit(Task(commands=["echo once"]))
    assert await server.output(run) == b"once\n"
    await server.end(run)
    assert len(server.cloud.instances) == 1


async def test_a_spot_interruption_is_retried_when_the_policy_says_so(server: Server) -> None:
    """The instance is taken away: another attempt on another instance, its output after the first one's."""
    first = server.folder / "first"
    task = Task(
        commands=["echo $$", "[ -e $FIRST ] || { touch $FIRST; sleep 1000; }", "echo end"], env={"FIRST": str(first)}
    )
    run = await server.submit(task, retry_policy=RetryPolicy(retry=True))
    run = await server.until(run, lambda seen: seen.status is S.RUNNING and first.exists())
    await asyncio.to_thread(server.cloud.end, "i-1", StateReason.SPOT_INTERRUPTION)
    run = await server.end(run)
    attempts = run.jobs[0].job_submissions
    assert [attempt.status for attempt in attempts] == [S.FAILED, S.DONE]
    assert attempts[0].reason is Reason.INTERRUPTED
    assert run.status is S.DONE
    assert (await server.output(run)).endswith(b"end\n")


async def test_without_a_policy_an_interruption_ends_the_run(server: Server) -> None:
    """FAILED, with the reason a person understands."""
    run = await server.submit(FOREVER)
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    await asyncio.to_thread(server.cloud.end, "i-1", StateReason.SPOT_INTERRUPTION)
    run = await server.end(run)
    assert (run.status, run.reason) == (S.FAILED, Reason.INTERRUPTED)
    assert "spot interruption" in (run.message or "")


async def test_no_capacity_waits_under_a_retry_policy(server: Server) -> None:
    """With a retry policy a run is accepted though nothing is free, and starts when something is."""
    full = Availability.NO_CAPACITY
    server.cloud.offers = [Offer("sim", "small", "here", SMALL, 1.0, availability=full, reason="full")]
    task = Task(commands=["echo at last"])
    with pytest.raises(NoOffersError, match="sim: full"):
        await server.submit(task)
    run = await server.submit(task, retry_policy=RetryPolicy(retry=True))
    await server.until(run, lambda seen: len(seen.jobs[0].job_submissions) > 1)
    server.cloud.offers = list(offers_in("a"))
    run = await server.end(run)
    assert run.status is S.DONE
    assert await server.output(run) == b"at last\n"


@pytest.mark.parametrize("abort", [True, False])
async def test_stop_while_the_cloud_is_asked(server: Server, abort: bool) -> None:
    """Stopped in the middle of create: the run ends at once, the instance that came of it is terminated."""
    asked, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        loop.call_soon_threadsafe(asked.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)

    server.cloud.after["create"] = [block]
    run = await server.submit(Task(commands=["echo never"]))
    await asyncio.wait_for(asked.wait(), 30)
    await server.stop(run, abort)
    run = await server.end(run)
    assert run.status is (S.ABORTED if abort else S.TERMINATED)
    go.set()
    await server.idle()
    assert not server.cloud.alive()
    assert await server.output(run) == b""


async def test_stop_is_polite_first(server: Server) -> None:
    """A job that cleans up on SIGTERM gets to do so, and its last words are kept."""
    body = "trap 'echo cleaning; exit 0' TERM; echo up; while true; do sleep 0.05; done"
    run = await server.submit(Task(commands=[body], stop_duration=30))
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    stream = await server.engine.service.logs("main", run.id, LogQuery())
    assert not stream.end
    await server.stop(run)
    run = await server.end(run)
    assert run.status is S.TERMINATED
    output = await server.output(run)
    # In between, bash may report that its sleep was terminated, too.
    assert output.startswith(b"up\n")
    assert output.endswith(b"cleaning\n")


async def test_an_abort_overtakes_a_stop(server: Server) -> None:
    """A job that will not go within its grace goes at once when the user says so."""
    run = await server.submit(Task(commands=["trap '' TERM; echo up; while true; do sleep 1; done"], stop_duration=600))
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    await server.stop(run)
    run = await server.until(run, lambda seen: seen.status is S.TERMINATING)
    await server.stop(run, abort=True)
    assert (await server.end(run)).status is S.ABORTED


async def test_the_same_submit_key_is_the_same_run(server: Server) -> None:
    """A submit that is repeated because its answer got lost runs once, even at the same moment."""
    key = uuid4()
    spec = RunSpec(configuration=Task(commands=["echo once"]), profile=Profile())
    runs = await asyncio.gather(*(server.engine.service.submit("main", "me", spec, key) for _ in range(8)))
    assert len({run.id for run in runs}) == 1
    assert len(await server.engine.service.list("main", True, 100)) == 1
    assert await server.output(runs[0]) == b"once\n"


async def test_another_server_takes_over(store: Store, server: Server, folder: Path) -> None:
    """One server stops in the middle of a run; the next goes on with it, and no byte is lost or doubled."""
    go = folder / "go"
    task = Task(commands=["echo one", "while [ ! -e $GO ]; do sleep 0.02; done", "echo two"], env={"GO": str(go)})
    run = await server.submit(task)
    run = await server.until(run, lambda seen: seen.status is S.RUNNING)
    await server.engine.stop()
    go.touch()
    other = Server(store, server.cloud, folder)
    await other.engine.start()
    try:
        run = await other.end(run)
        assert run.status is S.DONE
        assert await other.output(run) == b"one\ntwo\n"
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_two_servers_on_one_database_share_the_work(store: Store, server: Server, folder: Path) -> None:
    """Runs submitted to either are finished by whoever takes them; each runs once."""
    other = Server(store, server.cloud, folder, alone=False)
    await other.engine.start()
    try:
        mark = folder / "marks"
        runs = [
            await (server, other)[number % 2].submit(Task(commands=[f"echo {number} >> {mark}"]))
            for number in range(12)
        ]
        ends = [await server.end(run) for run in runs]
        assert {run.status for run in ends} == {S.DONE}
        assert sorted(map(int, mark.read_text().split())) == list(range(12))
        assert len(server.cloud.instances) == 12
    finally:
        await other.engine.stop()
        await other.logs.aclose()


async def test_cost_is_price_by_time(server: Server) -> None:
    """USD per hour, from acceptance to the confirmed end, and then no more."""
    server.cloud.offers = list(offers_in("a", price=3600.0))
    run = await server.end(await server.submit(Task(commands=["true"])))
    await server.idle()
    first = await server.engine.service.get("main", GetRunRequest(run_id=run.id))
    again = await server.engine.service.get("main", GetRunRequest(run_id=run.id))
    assert first.cost == again.cost
    assert 0 < first.cost < 60


async def test_runs_are_deleted_only_when_finished(server: Server) -> None:
    """Deleting takes the output with it; an active run refuses."""
    run = await server.submit(FOREVER, "active")
    with pytest.raises(Exception, match="Cannot delete active runs: active"):
        await server.engine.service.delete("main", ["active"])
    await server.stop(run, abort=True)
    await server.end(run)
    await server.engine.service.delete("main", ["active"])
    assert await server.engine.service.list("main", True, 10) == []


def test_ids_are_sorted_by_time_and_of_version_7() -> None:
    """Ids made one after the other sort that way, within one millisecond, too."""
    ids = real_seams().ids
    made = [ids.uuid7() for _ in range(1000)]
    assert made == sorted(made)
    assert len(set(made)) == 1000
    assert {one.version for one in made} == {7}
    assert {one.variant for one in made} == {RFC_4122}


async def test_an_unknown_project_is_said(server: Server) -> None:
    """Not mistaken for an unknown run, in a plan, a submit or a look."""
    spec = RunSpec(configuration=FOREVER, profile=Profile())
    service = server.engine.service
    for asked in (
        service.get_plan("nowhere", "me", spec),
        service.submit("nowhere", "me", spec, uuid4()),
        service.get("nowhere", GetRunRequest(run_name="x")),
    ):
        with pytest.raises(ServerClientError, match="no project 'nowhere'") as refusal:
            await asked
        assert not isinstance(refusal.value, NotFoundError)
