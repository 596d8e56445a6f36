"""What nobody claims is ended, and nothing else ever: each guard by itself, on a real store and a scripted cloud."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import select

from dstack_core._engine import restoring, sweeping
from dstack_core._engine.leases import LeaseLost
from dstack_core._engine.sweeping import LEASE
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._store.store import Store
from dstack_core._store.tables import OrphanRow, SweepRow
from dstack_core.errors import UnknownOutcomeError
from dstack_core.plugin import Instance
from tests.support.bench import OWNER, Bench
from tests.support.cloud import ScriptedCloud, raising

pytestmark = pytest.mark.anyio

S = InstanceStatus
AGE = timedelta(minutes=5)


@pytest.fixture
def bench(store: Store) -> Bench:
    """A sweeper, a store and a scripted cloud."""
    return Bench(store, ScriptedCloud())


def alive(bench: Bench) -> list[str]:
    """The ids of what costs money."""
    return sorted(one.ref.id for one in bench.cloud.alive())


async def orphans(bench: Bench) -> list[OrphanRow]:
    """What is written down."""
    return list(await bench.store.read(lambda session: session.scalars(select(OrphanRow)).all()))


async def suspicion(bench: Bench) -> str | None:
    """Why the database seems to be restored."""
    found = await bench.store.read(restoring.suspicion)
    return found[1] if found else None


async def outlive(bench: Bench) -> UUID:
    """An instance that goes on although its row is final: the cloud said that it was gone, and it was not."""
    intent = await bench.intend()
    await bench.turn()
    there = bench.cloud.instances["i-1"]
    await bench.unwant(intent)
    await bench.turn()
    assert await bench.status(intent) is S.TERMINATED
    bench.cloud.instances["i-1"] = there
    return intent


async def be_whole(bench: Bench) -> None:
    """A round that found everything in order, some time ago."""
    await bench.sweep(pause=2 * AGE.total_seconds())


async def forget_a_written_intent(bench: Bench) -> Instance:
    """An instance of an intent of which the database never heard, from a time in which it was whole."""
    intent = bench.ids.uuid7()
    made = bench.cloud.plant(OWNER, intent)
    bench.cloud.hidden.add(made.ref.id)
    await bench.clock.sleep(2 * AGE.total_seconds())
    await be_whole(bench)
    bench.cloud.hidden.clear()
    return made


# ------------------------------------------------------------------------------------------------ what is ended --


async def test_what_outlives_its_row_is_ended(bench: Bench) -> None:
    """Seen in two rounds, old enough: written down, ended, confirmed."""
    await outlive(bench)
    await bench.clock.sleep(301)
    await bench.sweep()
    assert alive(bench) == ["i-1"]
    await bench.sweep()
    assert alive(bench) == []
    assert [(one.instance_id, one.reason, one.gone_at is None) for one in await orphans(bench)] == [
        ("i-1", "over", False)
    ]


async def test_a_second_instance_of_one_intent_is_ended(bench: Bench) -> None:
    """The one that the row knows stays."""
    await bench.intend()
    await bench.turn()
    bench.cloud.idempotent = False
    bench.cloud._start(bench.cloud.requests[0])
    await bench.clock.sleep(301)
    await bench.sweep(2)
    assert alive(bench) == ["i-1"]


async def test_an_intent_that_nobody_wrote_down_is_ended_if_none_can_be_lost(bench: Bench) -> None:
    """From a time in which the database was certainly whole."""
    await forget_a_written_intent(bench)
    await bench.sweep(2)
    assert alive(bench) == []
    assert await suspicion(bench) is None


async def test_an_end_is_asked_for_until_the_cloud_confirms_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A cloud that fails, then does not let go: in each round again, also by another server, and said aloud."""
    await outlive(bench)
    await bench.clock.sleep(301)
    bench.cloud.before["terminate"] = raising(UnknownOutcomeError("503"))
    bench.cloud.stuck = {"i-1"}
    await bench.sweep(2)
    assert [one.message for one in await orphans(bench)] == ["503"]
    bench.restart()
    await bench.clock.sleep(LEASE.total_seconds())
    await bench.sweep(9)
    assert [one.message for one in await orphans(bench)] == ["the cloud says 'running'"]
    assert "may cost money" in caplog.text
    bench.cloud.stuck = set()
    await bench.sweep()
    assert [one.gone_at is None for one in await orphans(bench)] == [False]


async def test_it_is_written_down_before_it_is_ended(bench: Bench) -> None:
    """A server that dies in between leaves its decision to the next one, which need not look twice."""
    await outlive(bench)
    await bench.clock.sleep(301)
    await bench.sweep()
    with pytest.raises(RuntimeError, match="killed"):
        await die_while_ending(bench)
    assert (alive(bench), [one.gone_at for one in await orphans(bench)]) == (["i-1"], [None])
    bench.restart()
    await bench.clock.sleep(LEASE.total_seconds())
    await bench.sweep()
    assert alive(bench) == []


async def die_while_ending(bench: Bench) -> None:
    """The process is gone between the decision and the call."""

    async def die(*_: object) -> None:
        raise RuntimeError("killed")

    bench.sweeper.__dict__["_end"] = die
    await bench.sweeper.sweep("sim")


# ------------------------------------------------------------------------------------------------- what is not --


async def test_one_round_is_not_enough(bench: Bench) -> None:
    """A listing may be behind: only what looks like an orphan in two rounds in a row is one."""
    await outlive(bench)
    await bench.clock.sleep(301)
    for _ in range(3):
        bench.cloud.hidden = set()
        await bench.sweep()
        bench.cloud.hidden = {"i-1"}
        await bench.sweep()
    assert alive(bench) == ["i-1"]


async def test_what_is_young_is_left_alone(bench: Bench) -> None:
    """Five minutes, however often it is seen."""
    await outlive(bench)
    await bench.sweep(29, pause=10)
    assert alive(bench) == ["i-1"]
    await bench.sweep(4, pause=10)
    assert alive(bench) == []


async def test_three_windows_count_where_they_are_longer(bench: Bench) -> None:
    """A cloud whose listings lag by ten minutes gets half an hour."""
    bench.facts = {"visibility_window": 600.0}
    bench.restart()
    await outlive_slowly(bench)
    await bench.sweep(16)
    assert alive(bench) == ["i-1"]
    await bench.sweep(2)
    assert alive(bench) == []


async def outlive_slowly(bench: Bench) -> None:
    """As `outlive`, of a young instance."""
    await outlive(bench)
    bench.cloud.instances["i-1"] = bench.cloud.instances["i-1"].model_copy(update={"created_at": bench.clock.now()})


@pytest.mark.parametrize("wanted", [True, False])
async def test_an_intent_that_is_looked_for_is_left_to_its_finder(bench: Bench, wanted: bool) -> None:
    """UNKNOWN, and old: the finder is woken, and decides; what is wanted is adopted."""
    bench.cloud.idempotent = False
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    bench.cloud.before["list"] = raising(UnknownOutcomeError("503"), times=50)
    intent = await bench.intend()
    await bench.run(200)
    assert await bench.status(intent) is S.UNKNOWN
    if not wanted:
        await bench.unwant(intent)
    await bench.clock.sleep(301)
    bench.cloud.before.clear()
    found = await bench.sweep(3)
    assert found is not None
    assert (found.wake, alive(bench), await orphans(bench)) == ((intent,), ["i-1"], [])
    await bench.turn()
    assert await bench.status(intent) is (S.RUNNING if wanted else S.TERMINATED)


async def test_what_is_in_use_is_never_touched(bench: Bench) -> None:
    """Hours of rounds end nothing that has its row."""
    intent = await bench.intend()
    await bench.turn()
    for _ in range(40):
        await bench.sweep()
        await bench.turn()
    assert (await bench.status(intent), alive(bench), bench.cloud.calls["terminate"]) == (S.RUNNING, ["i-1"], 0)


async def test_other_owners_are_never_touched(bench: Bench) -> None:
    """A backend that lists those of another owner breaks its contract, and nothing follows from its listing."""
    await outlive(bench)
    other = UUID("01890000-0000-7000-8000-00000000000f")
    bench.cloud.plant(other, bench.ids.uuid7())
    await bench.clock.sleep(301)
    await bench.sweep(3)
    assert alive(bench) == ["p-2"]


async def test_the_cloud_is_listed_before_the_database_is_read(bench: Bench) -> None:
    """What is made while the cloud is being asked is known when the listing is judged."""
    loop = asyncio.get_running_loop()

    def make_one() -> None:
        intent = asyncio.run_coroutine_threadsafe(bench.intend(), loop).result(10)
        bench.cloud.plant(OWNER, intent)

    await bench.sweep()
    bench.cloud.before["list"] = [make_one]
    found = await bench.sweep()
    assert found is not None
    assert (len(bench.cloud.instances), await suspicion(bench)) == (1, None)


@pytest.mark.parametrize(("count", "others", "ended"), [(10, 0, True), (11, 0, False), (11, 50, True)])
async def test_there_is_an_end_to_sweeping(
    bench: Bench, caplog: pytest.LogCaptureFixture, count: int, others: int, ended: bool
) -> None:
    """More than ten at once, and more than a fifth: none is ended, the log has an alarm, and the state says why."""
    await bench.intend()
    await bench.turn()
    bench.cloud.idempotent = False
    for _ in range(count):
        bench.cloud._start(bench.cloud.requests[0])
    for _ in range(others):
        intent = await bench.intend()
        bench.cloud.plant(OWNER, intent)
    await bench.clock.sleep(301)
    await bench.sweep(3)
    assert len(alive(bench)) == 1 + others + (0 if ended else count)
    problem = await bench.store.read(lambda session: session.get_one(SweepRow, "sim").problem)
    assert (problem is None, caplog.text.count("more than 10 at once")) == (ended, 0 if ended else 1)


async def test_a_server_that_only_reports_ends_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """`DSTACK_SWEEPER=report`: said once, and left alone."""
    bench.report_only = True
    bench.restart()
    await outlive(bench)
    await bench.clock.sleep(301)
    await bench.sweep(4)
    assert (alive(bench), await orphans(bench)) == (["i-1"], [])
    assert caplog.text.count("This server only reports such") == 1


# ---------------------------------------------------------------------------------------- a database gone back --


async def test_an_intent_that_the_database_lost_stops_all_sweeping(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Restored from a copy: nothing is ended any more, not even what is known to be over."""
    await be_whole(bench)
    await outlive(bench)
    lost = bench.cloud.plant(OWNER, bench.ids.uuid7())
    await bench.clock.sleep(2 * AGE.total_seconds())
    await bench.intend()
    await bench.sweep(20)
    assert set(alive(bench)) >= {lost.ref.id, "i-1"}
    assert lost.ref.id in (await suspicion(bench) or "")
    assert caplog.text.count("restored from a copy, or to be a copy") == 1


async def test_what_is_not_listed_yet_may_be_lost_all_the_same(bench: Bench) -> None:
    """A round that knew everything it was shown says nothing about what was made a moment before it."""
    await be_whole(bench)
    lost = bench.cloud.plant(OWNER, bench.ids.uuid7())
    bench.cloud.hidden.add(lost.ref.id)
    await bench.clock.sleep(60)
    await bench.sweep()
    bench.cloud.hidden.clear()
    await bench.sweep(6)
    assert (alive(bench), await suspicion(bench) is None) == ([lost.ref.id], False)


async def test_what_was_lost_is_ended_when_a_person_has_confirmed(bench: Bench) -> None:
    """From then on the database is whole again; what is lost after that is another loss."""
    await be_whole(bench)
    lost = bench.cloud.plant(OWNER, bench.ids.uuid7())
    await bench.clock.sleep(2 * AGE.total_seconds())
    await bench.sweep(4)
    assert alive(bench) == [lost.ref.id]
    await bench.store.transact(lambda session: restoring.confirm(session, bench.clock.now()))
    await bench.sweep(2)
    assert (alive(bench), await suspicion(bench)) == ([], None)
    again = bench.cloud.plant(OWNER, bench.ids.uuid7())
    await bench.clock.sleep(2 * AGE.total_seconds())
    await bench.sweep(4)
    assert alive(bench) == [again.ref.id]


async def test_a_new_database_ends_nothing_that_it_does_not_know(bench: Bench) -> None:
    """Nothing is known of the time before its first round."""
    found = bench.cloud.plant(OWNER, bench.ids.uuid7())
    await bench.clock.sleep(2 * AGE.total_seconds())
    await bench.sweep(5)
    assert alive(bench) == [found.ref.id]


async def test_fewer_starts_than_were_seen_mean_an_old_database(bench: Bench) -> None:
    """The count beside the database is ahead of the one in it."""

    async def count(seen: int) -> tuple[int, str | None]:
        now = bench.clock.now()
        return await bench.store.transact(lambda session: restoring.count_start(session, now, seen))

    assert await count(0) == (1, None)
    assert await count(1) == (2, None)
    assert await count(1) == (3, None)
    starts, alarm = await count(5)
    assert starts == 6
    assert alarm is not None
    assert "it counts 3 starts of its servers, and 5 were seen from here" in alarm
    assert "--confirm-restore" in alarm
    assert await suspicion(bench) is not None


# ---------------------------------------------------------------------------------------------- several servers --


async def test_one_server_sweeps_and_the_others_wait(bench: Bench) -> None:
    """A second one gets its turn when the first has not been heard of for a while."""
    await bench.sweep()
    first = bench.sweeper
    bench.restart()
    assert await bench.sweep() is None
    assert bench.cloud.calls["list"] == 1
    await bench.clock.sleep(LEASE.total_seconds())
    assert await bench.sweep() is not None
    assert await first.sweep("sim") is None


async def test_a_server_that_stops_gives_its_turn_away(bench: Bench) -> None:
    """The next one begins at once; so does one that is certainly alone."""
    bench.clock.yields = True
    await bench.sweeper.start(alone=False)
    await bench.sweep()
    await bench.sweeper.stop()
    bench.restart()
    assert await bench.sweep() is not None
    bench.restart()
    assert await bench.sweep() is None
    await bench.sweeper.start(alone=True)
    await bench.sweeper.stop()
    assert await bench.sweep() is not None


async def test_a_round_that_slept_through_its_lease_writes_nothing(bench: Bench) -> None:
    """Another server took over while the cloud was being asked: the late listing ends nothing."""
    await outlive(bench)
    await bench.clock.sleep(301)
    await bench.sweep()
    late = bench.sweeper
    loop = asyncio.get_running_loop()
    bench.restart()

    def take_over() -> None:
        bench.clock.time += LEASE + timedelta(seconds=1)
        asyncio.run_coroutine_threadsafe(bench.sweeper._take("sim"), loop).result(10)

    bench.cloud.before["list"] = [take_over]
    with pytest.raises(LeaseLost):
        await late.sweep("sim")
    assert (alive(bench), await orphans(bench)) == (["i-1"], [])


# -------------------------------------------------------------------------------------------------- lost ones --


async def miss(bench: Bench, ids: Iterable[str]) -> None:
    """Rounds in which running instances are not listed, and the steps that follow from them."""
    await bench.clock.sleep(301)
    bench.cloud.hidden = set(ids)
    for _ in range(3):
        await bench.sweep()
        await bench.turn()


async def test_what_is_not_listed_and_silent_is_lost(bench: Bench) -> None:
    """Described still, but listed no more, and its agent is silent: its end is asked for, and confirmed."""
    intent = await bench.intend()
    await bench.turn()
    bench.transport.answering = False
    await miss(bench, ["i-1"])
    row = await bench.row(intent)
    assert (row.status, alive(bench)) == ("terminated", [])
    assert "does not list it any more" in (row.message or "")


async def test_what_is_not_listed_and_answers_is_not_lost(bench: Bench) -> None:
    """A listing with a gap is no reason to give up a job that runs."""
    intent = await bench.intend()
    await bench.turn()
    await miss(bench, ["i-1"])
    assert await bench.status(intent) is S.RUNNING


async def test_what_is_listed_and_silent_is_not_lost_by_the_sweeper(bench: Bench) -> None:
    """Silence is for its job to judge."""
    intent = await bench.intend()
    await bench.turn()
    bench.transport.answering = False
    await miss(bench, [])
    assert await bench.status(intent) is S.RUNNING


async def test_what_was_not_listed_once_is_not_lost(bench: Bench) -> None:
    """Two rounds in a row; and a young one may not be listed yet."""
    intent = await bench.intend()
    await bench.turn()
    bench.transport.answering = False
    bench.cloud.hidden = {"i-1"}
    await bench.sweep(2, pause=60)
    bench.cloud.hidden = set()
    await bench.clock.sleep(301)
    for hidden in ({"i-1"}, set(), {"i-1"}, set()):
        bench.cloud.hidden = set(hidden)
        await bench.sweep()
        await bench.turn()
    assert await bench.status(intent) is S.RUNNING


async def test_what_the_cloud_forgets_while_its_agent_answers_is_not_lost(bench: Bench) -> None:
    """`None` from the cloud is not believed while the machine itself speaks; it is when that falls silent."""
    intent = await bench.intend()
    await bench.turn()
    known = bench.cloud.instances.pop("i-1")
    await bench.run(120)
    assert await bench.status(intent) is S.RUNNING
    bench.transport.answering = False
    await bench.run(120)
    assert (await bench.status(intent), known.intent) == (S.TERMINATED, intent)


async def test_a_young_instance_that_nobody_knows_yet_is_not_lost(bench: Bench) -> None:
    """Its agent was reached and fell silent, and the cloud itself does not know it yet: it is there all the same."""
    intent = await bench.intend()
    await bench.turn()
    assert await bench.status(intent) is S.RUNNING
    known = bench.cloud.instances.pop("i-1")
    bench.transport.answering = False
    bench.clock.time += timedelta(seconds=5)
    await bench.look(intent)
    assert await bench.status(intent) is S.RUNNING
    bench.cloud.instances["i-1"] = known
    bench.transport.answering = True
    await bench.run(120)
    assert await bench.status(intent) is S.RUNNING


async def test_an_end_right_after_the_start_is_not_taken_for_granted(bench: Bench) -> None:
    """A cloud that does not know it yet says neither yes nor no: the end is asked for until it can have been heard."""
    intent = await bench.intend()
    await bench.turn()
    hidden = bench.cloud.instances.pop("i-1")
    await bench.unwant(intent)
    await bench.run(5)
    assert await bench.status(intent) is S.TERMINATING
    bench.cloud.instances["i-1"] = hidden
    await bench.run(60)
    assert (await bench.status(intent), alive(bench)) == (S.TERMINATED, [])


# ------------------------------------------------------------------------------------------------- when it looks --


async def is_due(bench: Bench) -> bool:
    """Whether a round would be made."""
    counts = await bench.store.read(sweeping.open_counts)
    return await bench.sweeper._is_due("sim", counts.get("sim", 0))


@pytest.mark.parametrize("existing", [True, False])
async def test_where_nothing_is_nobody_looks(bench: Bench, existing: bool) -> None:
    """Once after a start; then not before something is bought, but for a rare look at clouds."""
    bench.facts = {"existing_machines": existing}
    bench.restart()
    assert await is_due(bench)
    await bench.sweep()
    assert not await is_due(bench)
    await bench.clock.sleep(1800)
    assert await is_due(bench) is not existing
    intent = await bench.intend()
    assert await is_due(bench)
    await bench.turn()
    await bench.unwant(intent)
    await bench.turn()
    await bench.sweep()
    assert await is_due(bench) is not existing


async def test_rounds_are_made_by_themselves(bench: Bench) -> None:
    """A started sweeper finds and ends an orphan without being asked, and survives a cloud that breaks."""
    await outlive(bench)
    await bench.clock.sleep(301)
    bench.cloud.before["list"] = raising(KeyError("oops"))
    bench.clock.yields = True
    await bench.sweeper.start(alone=True)
    async with asyncio.timeout(30):
        while bench.cloud.alive():  # noqa: ASYNC110  # what is waited for is in the cloud
            await asyncio.sleep(0.01)
    await bench.sweeper.stop()
