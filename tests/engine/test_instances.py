"""Instances never leak and never double: intent first, typed outcomes, termination that is confirmed."""

from __future__ import annotations

import asyncio

import pytest

from dstack_core._engine.leases import LeaseLost, free_all
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import InstanceState, StateReason
from dstack_core._store.store import Store
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)
from tests.support.bench import Bench
from tests.support.cloud import ScriptedCloud, raising

pytestmark = pytest.mark.anyio

S = InstanceStatus


@pytest.fixture
def bench(store: Store) -> Bench:
    """A handler, a store and a scripted cloud."""
    return Bench(store, ScriptedCloud())


async def test_an_instance_is_created_reached_and_ended(bench: Bench) -> None:
    """The ordinary life of an instance, from its intent to the confirmed end."""
    intent = await bench.intend()
    assert await bench.status(intent) is S.INTENT
    await bench.turn()
    assert await bench.status(intent) is S.RUNNING
    await bench.unwant(intent)
    await bench.turn()
    row = await bench.row(intent)
    assert (row.status, row.due_at, row.terminated_at) == ("terminated", None, bench.clock.now())
    assert not bench.cloud.alive()


async def test_names_and_tokens_follow_from_the_intent(bench: Bench) -> None:
    """The request carries name, token and tags that any later process works out again."""
    intent = await bench.intend()
    await bench.turn()
    request = bench.cloud.requests[0]
    assert len(request.name) <= 40
    assert request.tags["intent"] == str(intent)
    assert request.tags["owner"] == str(request.owner)
    assert "expires-at" in request.tags


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("idempotent", "native"), [(True, True), (True, False), (False, False)])
async def test_a_server_that_dies_around_create_leaves_one_instance(
    bench: Bench, moment: str, idempotent: bool, native: bool
) -> None:
    """Killed just before or just after the cloud did it: one instance in the end, also without idempotency tokens."""
    bench.cloud.idempotent = idempotent
    bench.facts = {"native_idempotency": native}
    bench.restart()
    intent = await bench.intend()
    await kill_in_create(bench, moment)
    bench.restart()
    await bench.run(LEASE.total_seconds() + 60)
    assert await bench.status(intent) is S.RUNNING
    assert len(bench.cloud.instances) == 1
    assert len({request.model_dump_json() for request in bench.cloud.requests}) == 1


async def kill_in_create(bench: Bench, moment: str) -> None:
    """The process is gone while the cloud is being asked: the call may have happened, nothing was written after it."""
    lease = await bench.take()
    assert lease is not None
    snapshot = await bench.store.transact(lambda session: bench.handler._load(session, lease))
    assert snapshot is not None
    await bench.store.transact(lambda session: bench.handler._note_call(session, lease))
    if moment == "after":
        await bench.handler._backends.create_instance("sim", snapshot.request)


async def test_an_unclear_answer_is_looked_into_and_adopted(bench: Bench) -> None:
    """The cloud did it, its answer was lost: the instance is found by its intent, and not made twice."""
    bench.cloud.idempotent = False
    bench.cloud.after["create"] = raising(UnknownOutcomeError("connection reset"))
    intent = await bench.intend()
    await bench.run(30)
    assert await bench.status(intent) is S.RUNNING
    assert (len(bench.cloud.instances), bench.cloud.calls["create"]) == (1, 1)


async def test_a_bug_in_create_counts_as_unclear(bench: Bench) -> None:
    """A plugin that raises nonsense after the fact has made an instance all the same."""
    bench.cloud.idempotent = False
    bench.cloud.after["create"] = raising(KeyError("oops"))
    intent = await bench.intend()
    await bench.run(30)
    assert await bench.status(intent) is S.RUNNING
    assert len(bench.cloud.instances) == 1


async def test_a_listing_that_lags_makes_no_second_instance(bench: Bench) -> None:
    """Not listed yet is not gone: nothing is created again before the visibility window is over."""
    bench.cloud.idempotent = False
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    bench.cloud.hidden = {"i-1"}
    intent = await bench.intend()
    await bench.run(9)
    assert await bench.status(intent) is S.UNKNOWN
    bench.cloud.hidden = set()
    await bench.run(30)
    assert await bench.status(intent) is S.RUNNING
    assert bench.cloud.calls["create"] == 1


async def test_what_certainly_came_to_nothing_is_asked_for_again(bench: Bench) -> None:
    """After the window and two looks in vain, the very same request is made again."""
    bench.cloud.before["create"] = raising(UnknownOutcomeError("timed out"))
    intent = await bench.intend()
    await bench.run(60)
    assert await bench.status(intent) is S.RUNNING
    assert (bench.cloud.calls["create"], len(bench.cloud.instances)) == (2, 1)


async def test_unclear_and_no_longer_wanted_is_still_looked_into(bench: Bench) -> None:
    """A run that was stopped meanwhile does not hide an instance of unknown outcome."""
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    bench.cloud.hidden = {"i-1"}
    intent = await bench.intend()
    await bench.turn()
    await bench.unwant(intent)
    await bench.run(5)
    bench.cloud.hidden = set()
    await bench.run(30)
    assert await bench.status(intent) is S.TERMINATED
    assert not bench.cloud.alive()


async def test_doubles_are_ended_and_the_oldest_stays(bench: Bench) -> None:
    """A backend that broke its promise: two instances of one intent become one."""
    bench.cloud.idempotent = False
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    intent = await bench.intend()
    await bench.turn()
    bench.cloud._start(bench.cloud.requests[0])
    await bench.run(30)
    assert await bench.status(intent) is S.RUNNING
    assert [one.ref.id for one in bench.cloud.alive()] == ["i-1"]


@pytest.mark.parametrize(
    "error",
    [
        NoCapacityError("none left", scope="zone"),
        QuotaExceededError("0 of 0 vCPUs"),
        AuthenticationError("no ec2:RunInstances"),
        InvalidRequestError("no such subnet"),
    ],
)
async def test_a_definite_refusal_ends_the_intent(bench: Bench, error: BackendError) -> None:
    """Definitely not created: FAILED, with the cloud's words, and no further call."""
    bench.cloud.before["create"] = raising(error)
    intent = await bench.intend()
    await bench.run(30)
    row = await bench.row(intent)
    assert (row.status, row.error, row.message) == ("failed", type(error).__name__, str(error))
    assert bench.cloud.calls["create"] == 1


async def test_a_refusal_after_an_unclear_call_settles_nothing(bench: Bench) -> None:
    """First call: answer lost, instance made. Repeated: refused for its credentials. The instance is still found."""
    bench.facts = {"native_idempotency": True}
    bench.restart()
    bench.cloud.after["create"] = raising(UnknownOutcomeError("timed out"))
    intent = await bench.intend()
    lease = await bench.take()
    assert lease is not None
    await bench.handler.advance(lease, asyncio.Event())
    bench.cloud.before["create"] = raising(AuthenticationError("expired"))
    await bench.run(60)
    assert await bench.status(intent) is S.RUNNING
    assert len(bench.cloud.instances) == 1


async def test_throttling_waits_and_tries_the_same_again(bench: Bench) -> None:
    """RateLimitedError: the same call, not sooner than the cloud asked for."""
    bench.cloud.before["create"] = raising(RateLimitedError("slow down", retry_after=20))
    intent = await bench.intend()
    await bench.run(19)
    assert (await bench.status(intent), bench.cloud.calls["create"]) == (S.INTENT, 1)
    await bench.run(5)
    assert (await bench.status(intent), bench.cloud.calls["create"]) == (S.RUNNING, 2)


async def test_an_intent_withdrawn_before_the_call_asks_no_cloud(bench: Bench) -> None:
    """Nobody wants it any more and nobody was asked: FAILED without a call."""
    intent = await bench.intend()
    await bench.unwant(intent)
    await bench.turn()
    assert (await bench.status(intent), bench.cloud.calls["create"]) == (S.FAILED, 0)


async def test_termination_is_tried_for_ever_until_confirmed(bench: Bench) -> None:
    """A cloud that fails, then does not let go for hours: tried again and again, TERMINATED only when it says so."""
    intent = await bench.intend()
    await bench.turn()
    bench.cloud.stuck = {"i-1"}
    bench.cloud.before["terminate"] = raising(UnknownOutcomeError("503"), times=5)
    await bench.unwant(intent)
    await bench.run(3 * 3600, step=20)
    assert await bench.status(intent) is S.TERMINATING
    assert bench.cloud.calls["terminate"] > 100
    bench.cloud.stuck = set()
    await bench.run(120)
    assert await bench.status(intent) is S.TERMINATED


async def test_an_overdue_termination_is_said_aloud(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """After a quarter of an hour the log has an alarm that names the instance."""
    intent = await bench.intend()
    await bench.turn()
    bench.cloud.stuck = {"i-1"}
    await bench.unwant(intent)
    await bench.run(14 * 60, step=20)
    assert "may cost money" not in caplog.text
    await bench.run(5 * 60, step=20)
    assert "i-1 is not terminated" in caplog.text


async def test_terminating_what_is_gone_already_is_success(bench: Bench) -> None:
    """Somebody ended it by hand: confirmed, final."""
    intent = await bench.intend()
    await bench.turn()
    bench.cloud.end("i-1", StateReason.SPOT_INTERRUPTION)
    await bench.run(120)
    row = await bench.row(intent)
    assert (row.status, row.message) == ("terminated", "the instance is gone (spot interruption)")


async def test_an_instance_that_is_merely_stopped_is_terminated(bench: Bench) -> None:
    """Stopped from inside or deallocated: still billed for its disk, so its end is asked for and confirmed."""
    intent = await bench.intend()
    await bench.turn()
    stopped = {"state": InstanceState.STOPPING, "reason": StateReason.SHUTDOWN_FROM_INSIDE}
    bench.cloud.instances["i-1"] = bench.cloud.instances["i-1"].model_copy(update=stopped)
    await bench.run(120)
    row = await bench.row(intent)
    assert (row.status, row.message) == ("terminated", "the instance is on its way out (shutdown from inside)")
    assert not bench.cloud.alive()


async def test_an_agent_of_another_instance_is_not_taken_for_ours(bench: Bench) -> None:
    """It has the address that ours had, or will have: whoever answers there says which instance it is of."""
    bench.transport.instance = "01890000-0000-7000-8000-00000000aaaa"
    intent = await bench.intend()
    await bench.run(30)
    assert await bench.status(intent) is S.STARTING
    bench.transport.instance = str(intent)
    await bench.run(30)
    assert await bench.status(intent) is S.RUNNING


async def test_a_call_is_not_made_long_after_it_was_written_down(bench: Bench) -> None:
    """A server that stood still in between asks its lease first: another one may have made that call meanwhile."""
    intent = await bench.intend()
    lease = await bench.take()
    assert lease is not None
    snapshot = await bench.handler._now(lease, asyncio.Event())
    assert snapshot is not None
    bench.handler._next[intent] = (lease, snapshot)
    await bench.clock.sleep(90)
    assert await bench.take() is not None
    with pytest.raises(LeaseLost):
        await bench.handler.advance(lease, asyncio.Event())
    assert bench.cloud.calls["create"] == 0


async def test_an_agent_that_never_answers_is_given_up(bench: Bench) -> None:
    """Past the provisioning timeout the instance is terminated, not forgotten."""
    bench.transport.answering = False
    intent = await bench.intend()
    await bench.run(110)
    assert await bench.status(intent) is S.STARTING
    await bench.run(60)
    row = await bench.row(intent)
    assert row.status == "terminated"
    assert not bench.cloud.alive()


async def test_a_token_that_was_used_up_is_not_taken_for_a_new_instance(bench: Bench) -> None:
    """Replayed create answers with an instance that has ended since: TERMINATED, never RUNNING."""
    bench.facts = {"native_idempotency": True}
    bench.restart()
    bench.cloud.after["create"] = raising(UnknownOutcomeError("reset"))
    intent = await bench.intend()
    lease = await bench.take()
    assert lease is not None
    await bench.handler.advance(lease, asyncio.Event())
    bench.cloud.end("i-1")
    await bench.run(60)
    assert await bench.status(intent) is S.TERMINATED


async def test_a_result_is_written_only_under_the_lease(bench: Bench) -> None:
    """A worker that was away while another server took over writes nothing; there is one instance all the same."""
    intent = await bench.intend()
    old = await bench.take()
    assert old is not None
    await bench.clock.sleep(LEASE.total_seconds() + 1)
    old_handler = bench.handler
    bench.restart()
    new = await bench.take()
    assert new is not None
    assert new.token > old.token
    with pytest.raises(LeaseLost):
        await old_handler.advance(old, asyncio.Event())
    while await bench.handler.advance(new, asyncio.Event()):
        pass
    assert await bench.status(intent) is S.RUNNING
    assert len(bench.cloud.instances) == 1


async def test_a_wake_up_during_a_step_is_not_lost(bench: Bench) -> None:
    """Unwanted while it was being reached: given back as due at once, not at the next resync."""
    intent = await bench.intend()
    lease = await bench.take()
    assert lease is not None
    await bench.handler.advance(lease, asyncio.Event())
    await bench.unwant(intent)
    while await bench.handler.advance(lease, asyncio.Event()):
        pass
    assert await bench.status(intent) is S.TERMINATED


async def test_the_lease_of_an_agent_is_renewed_while_its_row_is_there(bench: Bench) -> None:
    """Every minute, whether it has a job or not; not any more when its end is asked for."""
    intent = await bench.intend()
    await bench.run(3700)
    assert 55 <= len(bench.transport.renewals) <= 65
    assert set(bench.transport.renewals) == {600.0}
    bench.cloud.stuck = {"i-1"}
    await bench.unwant(intent)
    before = len(bench.transport.renewals)
    await bench.run(600)
    assert len(bench.transport.renewals) == before


async def test_an_agent_starts_with_a_lease(bench: Bench) -> None:
    """Should its server die before the first word."""
    await bench.intend()
    await bench.turn()
    assert bench.cloud.requests[0].agent_command[-3:-1] == ("serve", "600")


async def test_nothing_outlives_its_time(bench: Bench) -> None:
    """The job's `max_duration` of an hour and an hour more: its end is asked for, whatever its job does."""
    intent = await bench.intend()
    await bench.run(7100, step=30)
    assert await bench.status(intent) is S.RUNNING
    await bench.run(300, step=30)
    row = await bench.row(intent)
    assert (row.status, row.message) == ("terminated", "it was to be gone at 2026-01-01 02:00 UTC")
    assert not bench.cloud.alive()


async def test_a_server_that_is_alone_starts_at_once(bench: Bench) -> None:
    """After a crash the leases of the dead server are void: what it held is due now, not when its leases run out."""
    intent = await bench.intend()
    dead = await bench.take()
    assert dead is not None
    bench.restart()
    assert await bench.take() is None
    now = bench.clock.now()
    await bench.store.transact(lambda session: free_all(session, "another", now))
    await bench.turn()
    assert await bench.status(intent) is S.RUNNING
    with pytest.raises(LeaseLost):
        await bench.handler.advance(dead, asyncio.Event())
