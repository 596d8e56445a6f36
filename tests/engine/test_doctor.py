"""What there is in the clouds is shown as it is, and ended only where a person may want that."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest

from dstack_core._backends import BackendHub
from dstack_core._engine import restoring
from dstack_core._engine.doctor import Doctor
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.wire import InstanceId
from dstack_core._store.store import Store
from dstack_core.errors import AuthenticationError, NoCapacityError, ServerClientError, UnknownOutcomeError
from tests.support.bench import OWNER, Bench
from tests.support.cloud import ScriptedCloud, raising

pytestmark = pytest.mark.anyio

S = InstanceStatus
STRANGER = UUID("01890000-0000-7000-8000-00000000000f")


@pytest.fixture
def bench(store: Store) -> Bench:
    """A sweeper, a store and a scripted cloud."""
    return Bench(store, ScriptedCloud())


def doctor_of(bench: Bench, hub: BackendHub | None = None) -> Doctor:
    """Looks at the bench's cloud, or at what another hub has."""
    return Doctor(bench.clock, bench.store, hub or bench.hub, bench.shortages, OWNER, report_only=False)


async def run_one(bench: Bench) -> UUID:
    """An instance in use."""
    intent = await bench.intend()
    await bench.turn()
    return intent


async def outlive(bench: Bench) -> UUID:
    """An instance that goes on although its row is final, old enough to be judged."""
    intent = await run_one(bench)
    (there,) = [one for one in bench.cloud.alive() if one.intent == intent]
    await bench.unwant(intent)
    await bench.turn()
    assert await bench.status(intent) is S.TERMINATED
    bench.cloud.instances[there.ref.id] = there
    await bench.clock.sleep(301)
    return intent


def ids(*names: str) -> list[InstanceId]:
    """Instances of the scripted cloud."""
    return [InstanceId(backend="sim", id=name) for name in names]


async def test_what_is_in_use_is_shown_with_its_price(bench: Bench) -> None:
    """State, price and cost so far; nothing needs a person."""
    await run_one(bench)
    await bench.clock.sleep(1800)
    report = await doctor_of(bench).examine()
    (one,) = report.instances
    assert (one.id, one.state, one.verdict, one.status, one.price, one.cost) == (
        "i-1",
        "running",
        "ours",
        "running",
        1,
        0.5,
    )
    assert (report.problems, one.is_orphan, one.ending) == ((), False, False)
    assert [(backend.name, backend.instances) for backend in report.backends] == [("sim", 1)]


async def test_what_has_ended_is_not_shown(bench: Bench) -> None:
    """Clouds list it for an hour more."""
    intent = await run_one(bench)
    await bench.unwant(intent)
    await bench.turn()
    assert (await doctor_of(bench).examine()).instances == ()


async def test_what_would_be_swept_is_shown_with_the_reason(bench: Bench) -> None:
    """And looking at it changes nothing."""
    await outlive(bench)
    report = await doctor_of(bench).examine()
    (one,) = report.instances
    assert (one.verdict, one.is_orphan, one.ending, one.status) == ("over", True, False, "terminated")
    assert "nobody needs it" in one.reason
    assert bench.cloud.calls["terminate"] == 1


async def test_others_are_shown_and_never_touched(bench: Bench) -> None:
    """Even if somebody asks for their end."""
    bench.cloud.plant(STRANGER, bench.ids.uuid7())
    await bench.clock.sleep(1000)
    doctor = doctor_of(bench)
    report = await doctor.examine()
    assert ([one.id for one in report.others], report.instances) == (["p-1"], ())
    fixed = await doctor.fix(ids("p-1"))
    assert (fixed.ended, [one.id for one in fixed.left], len(bench.cloud.alive())) == ((), ["p-1"], 1)


async def test_a_fix_ends_what_was_named_and_nothing_else(bench: Bench) -> None:
    """At once and without a limit; what is in use is left alone, and so is an orphan that nobody has seen."""
    used = await run_one(bench)
    bench.cloud.idempotent = False
    for _ in range(13):
        bench.cloud._start(bench.cloud.requests[0])
    await bench.clock.sleep(301)
    doctor = doctor_of(bench)
    named = [f"i-{number}" for number in range(1, 14)]
    fixed = await doctor.fix(ids(*named))
    assert sorted(one.id for one in fixed.ended) == sorted(named[1:])
    assert [one.id for one in fixed.left] == ["i-1"]
    assert sorted(one.ref.id for one in bench.cloud.alive()) == ["i-1", "i-14"]
    assert await bench.status(used) is S.RUNNING


async def test_a_fix_leaves_alone_what_is_young_or_looked_for(bench: Bench) -> None:
    """What the sweeper would not end for its own sake, a person does not end by mistake."""
    await outlive(bench)
    bench.cloud.instances["i-1"] = bench.cloud.instances["i-1"].model_copy(update={"created_at": bench.clock.now()})
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    await bench.intend()
    lease = await bench.take()
    assert lease is not None
    await bench.handler.advance(lease, asyncio.Event())
    await bench.clock.sleep(200)
    fixed = await doctor_of(bench).fix(ids("i-1", "i-2"))
    assert (fixed.ended, len(bench.cloud.alive())) == ((), 2)


async def test_an_end_that_is_not_confirmed_goes_on_being_asked_for(bench: Bench) -> None:
    """The fix says so, the report as well; after a while it needs a person."""
    await outlive(bench)
    bench.cloud.stuck = {"i-1"}
    doctor = doctor_of(bench)
    fixed = await doctor.fix(ids("i-1"))
    assert [(one.id, one.problem) for one in fixed.ended] == [("i-1", "the cloud says 'running'")]
    (one,) = (await doctor.examine()).instances
    assert (one.ending, one.message) == (True, "the cloud says 'running'")
    await bench.clock.sleep(900)
    assert "sim: i-1 does not end: the cloud says 'running'" in (await doctor.examine()).problems
    bench.cloud.stuck = set()
    await bench.sweep()
    assert (await doctor.examine()).instances == ()


async def test_a_termination_that_hangs_needs_a_person(bench: Bench) -> None:
    """Of an ordinary instance, too."""
    intent = await run_one(bench)
    bench.cloud.stuck = {"i-1"}
    await bench.unwant(intent)
    await bench.run(1200, step=20)
    report = await doctor_of(bench).examine()
    assert report.instances[0].ending
    assert "i-1 does not end" in report.problems[0]


async def test_what_the_cloud_does_not_list_is_shown_as_missing(bench: Bench) -> None:
    """The database believes in it."""
    await run_one(bench)
    bench.cloud.hidden = {"i-1"}
    (one,) = (await doctor_of(bench).examine()).instances
    assert (one.id, one.verdict, one.state, one.status) == ("i-1", "missing", None, "running")


async def test_a_restored_database_is_a_problem_until_it_is_confirmed(bench: Bench) -> None:
    """A fix is refused with the cure; after it was confirmed, what was lost can be ended."""
    await bench.sweep(pause=900)
    bench.cloud.plant(OWNER, bench.ids.uuid7())
    await bench.clock.sleep(600)
    await bench.sweep()
    doctor = doctor_of(bench)
    report = await doctor.examine()
    assert report.restored_since is not None
    assert (report.instances[0].verdict, "--confirm-restore" in report.problems[0]) == ("lost", True)
    with pytest.raises(ServerClientError, match="--confirm-restore"):
        await doctor.fix(ids("p-1"))
    await doctor.confirm_restore()
    report = await doctor.examine()
    assert (report.restored_since, report.problems, report.instances[0].verdict) == (None, (), "unknown")
    await doctor.fix(ids("p-1"))
    assert bench.cloud.alive() == []
    assert await bench.store.read(restoring.suspicion) is None


async def test_a_removed_backend_with_instances_is_named(bench: Bench) -> None:
    """Its rows are not forgotten: report and list of backends say that it must be put back."""
    await run_one(bench)
    await run_one(bench)
    without = BackendHub.discover(entry_points=lambda **_: [])
    doctor = doctor_of(bench, without)
    said = "Backend 'sim' was removed while 2 instances exist; put it back until they are gone."
    report = await doctor.examine()
    assert said in report.problems[0]
    assert [one.verdict for one in report.instances] == ["missing", "missing"]
    (status,) = await doctor.status()
    assert (status.name, status.state, said in (status.reason or "")) == ("sim", "not_installed", True)
    assert [status.reason for status in await doctor_of(bench).status()] == [None]


async def test_the_log_names_a_removed_backend_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Not in each round."""
    bench.hub = BackendHub.discover(entry_points=lambda **_: [])
    bench.sweeper._backends = bench.hub
    for counts in ({"sim": 1}, {"sim": 1}, {}, {"sim": 3}):
        bench.sweeper._warn_of_removed(counts)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "Backend 'sim' was removed while an instance exists",
        "Backend 'sim' was removed while 3 instances exist",
    ]


async def test_a_cloud_that_cannot_be_asked_is_a_problem(bench: Bench) -> None:
    """With its own words; the rest of the report stands."""
    await run_one(bench)
    bench.cloud.before["list"] = raising(AuthenticationError("the key has expired: renew it"))
    report = await doctor_of(bench).examine()
    assert report.problems == ("sim: cannot be asked: the key has expired: renew it",)


async def test_an_instance_that_no_server_made_needs_a_person(bench: Bench) -> None:
    """It carries our mark and an intent that cannot be ours: shown, and not ended."""
    bench.cloud.plant(OWNER, UUID("6f0f1c1e-5b3c-4d0e-9a57-3d7d2a1d7e52"))
    await bench.clock.sleep(1000)
    doctor = doctor_of(bench)
    assert "no server made it" in (await doctor.examine()).problems[0]
    assert (await doctor.fix(ids("p-1"))).ended == ()


async def test_what_is_passed_over_is_shown(bench: Bench) -> None:
    """Where, what, and until when."""
    bench.cloud.before["create"] = raising(NoCapacityError("dry"))
    await run_one(bench)
    (one,) = (await doctor_of(bench).examine()).shortages
    assert (one.kind, one.region, one.zone, one.machine, one.market) == ("capacity", "here", "a", "small", "on-demand")
    assert one.until == bench.clock.now() + timedelta(minutes=3)


async def test_what_was_found_and_not_ended_needs_a_person(bench: Bench) -> None:
    """Too many at once: the report says so."""
    await run_one(bench)
    bench.cloud.idempotent = False
    for _ in range(11):
        bench.cloud._start(bench.cloud.requests[0])
    await bench.clock.sleep(301)
    await bench.sweep(2)
    assert "more than 10 at once" in (await doctor_of(bench).examine()).problems[0]
