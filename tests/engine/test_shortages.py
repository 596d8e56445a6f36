"""What a cloud has run out of is passed over for a while, as far as it said that it reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from dstack_core._backends import Listing
from dstack_core._engine.leases import LeaseLost
from dstack_core._engine.placement import choose, rank
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.shortages import Memory, Shortage, Shortages, family_of
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.offer_index import OfferIndex
from dstack_core._store.store import Store
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    NoCapacityError,
    QuotaExceededError,
    UnknownOutcomeError,
)
from dstack_core.plugin import Availability, InstanceState, MachineResources, Offer, Requirements, StateReason
from tests.support.bench import Bench
from tests.support.cloud import SMALL, ScriptedCloud, raising

pytestmark = pytest.mark.anyio


def offer(machine: str = "g5.xlarge", region: str = "east", zone: str | None = "a", **facts: object) -> Offer:
    """One offer, on demand unless said otherwise."""
    return Offer("sim", machine, region, SMALL, 1.0, zone=zone, **facts)  # type: ignore[arg-type]  # fields by name


@pytest.fixture
def bench(store: Store) -> Bench:
    """A handler that remembers, a store and a scripted cloud with one offer."""
    return Bench(store, ScriptedCloud(offers=[offer()]))


async def refuse(bench: Bench, error: BackendError) -> Memory:
    """Has the cloud refuse its first offer; what is remembered then."""
    bench.cloud.before["create"] = raising(error)
    await bench.intend()
    await bench.turn()
    return await bench.shortages.now()


SAME, ZONE, REGION = offer(), offer(zone="b"), offer(region="west")
SPOT, SIBLING, OTHER = offer(spot=True), offer("g5.12xlarge"), offer("m5.large")
EVERYTHING = [SAME, ZONE, REGION, SPOT, SIBLING, OTHER]


@pytest.mark.parametrize(
    ("error", "reached"),
    [
        (NoCapacityError("dry", scope="zone"), [SAME]),
        (NoCapacityError("dry", scope="region"), [SAME, ZONE]),
        (NoCapacityError("dry", scope="type"), [SAME, ZONE, REGION]),
        (NoCapacityError("dry", scope="account"), EVERYTHING),
        (QuotaExceededError("0 vCPUs", scope="zone"), [SAME, SIBLING]),
        (QuotaExceededError("0 vCPUs"), [SAME, ZONE, SIBLING]),
        (QuotaExceededError("0 vCPUs", scope="type"), [SAME, ZONE, REGION]),
        (QuotaExceededError("0 vCPUs", scope="account"), EVERYTHING),
        (NoCapacityError("dry, and not for long", retry_after=0), []),
        (AuthenticationError("expired"), []),
    ],
)
async def test_a_refusal_reaches_as_far_as_the_cloud_says(
    bench: Bench, error: BackendError, reached: Sequence[Offer]
) -> None:
    """Zone, region, type or account; a quota is one of a family; spot and on demand are two markets."""
    memory = await refuse(bench, error)
    assert [one for one in EVERYTHING if memory.of(one)] == reached
    assert memory.of(Offer("another", "g5.xlarge", "east", SMALL, 1.0, zone="a")) is None


@pytest.mark.parametrize(
    ("error", "again", "over"),
    [
        (NoCapacityError("dry"), 60, 180),
        (NoCapacityError("dry", retry_after=20), 20, 20),
        (QuotaExceededError("0 vCPUs"), 600, 1800),
    ],
)
async def test_a_refusal_is_forgotten(bench: Bench, error: BackendError, again: float, over: float) -> None:
    """Three minutes for a shortage, half an hour for a quota, or as long as the cloud says."""
    shortage = (await refuse(bench, error)).of(SAME)
    assert shortage is not None
    now = bench.clock.now()
    assert (shortage.again_at, shortage.until) == (now + timedelta(seconds=again), now + timedelta(seconds=over))
    await bench.clock.sleep(over - 1)
    assert (await bench.shortages.now()).of(SAME)
    await bench.clock.sleep(1)
    assert not await bench.shortages.now()


async def test_a_refusal_that_is_repeated_is_remembered_for_longer(bench: Bench) -> None:
    """Twice as long each time, up to half an hour; refusals at one time are one; and after a rest it begins anew."""
    lengths = []
    for _ in range(7):
        await refuse(bench, NoCapacityError("dry"))
        shortage = (await refuse(bench, NoCapacityError("dry"))).of(SAME)
        assert shortage is not None
        lengths.append((shortage.until - shortage.since).total_seconds() / 60)
        await bench.clock.sleep((shortage.again_at - bench.clock.now()).total_seconds())
    assert lengths == [3, 6, 12, 24, 30, 30, 30]
    await bench.clock.sleep(3600)
    shortage = (await refuse(bench, NoCapacityError("dry"))).of(SAME)
    assert shortage is not None
    assert shortage.until - shortage.since == timedelta(minutes=3)


async def test_what_could_be_had_is_not_short(bench: Bench) -> None:
    """An instance that was accepted takes the refusal back."""
    assert await refuse(bench, NoCapacityError("dry"))
    await bench.intend()
    await bench.turn()
    assert not await bench.shortages.now()
    assert not await Shortages(bench.clock, bench.store, alone=False).now()


async def test_all_servers_of_a_database_remember(bench: Bench) -> None:
    """What one was refused the others pass over, a second later at most; and after a restart it is still known."""
    others = Shortages(bench.clock, bench.store, alone=False)
    assert not await others.now()
    await refuse(bench, NoCapacityError("dry"))
    await bench.clock.sleep(1.1)
    assert (await others.now()).of(SAME)


async def test_a_server_that_is_alone_reads_the_table_once(bench: Bench) -> None:
    """A placement costs it no query."""
    reads: list[object] = []
    read = bench.store.read

    def noted(fn: Any, **facts: Any) -> Any:
        reads.append(fn)
        return read(fn, **facts)

    bench.store.__dict__["read"] = noted
    alone = Shortages(bench.clock, bench.store, alone=True)
    for _ in range(3):
        await alone.now()
        await bench.clock.sleep(60)
    assert len(reads) == 1


async def test_a_machine_that_exists_is_asked_anew(bench: Bench) -> None:
    """This computer says for itself what it has left, and that changes with each run."""
    bench.facts = {"existing_machines": True}
    bench.restart()
    assert not await refuse(bench, NoCapacityError("not enough left", scope="region"))


async def test_an_intent_that_was_refused_is_over_all_the_same(bench: Bench) -> None:
    """Remembering changes nothing about the intent."""
    bench.cloud.before["create"] = raising(NoCapacityError("dry"))
    intent = await bench.intend()
    await bench.turn()
    assert await bench.status(intent) is InstanceStatus.FAILED


async def test_a_refusal_since_an_instance_was_accepted_holds(bench: Bench) -> None:
    """That one could be had before says nothing of it, even if it runs only now."""
    bench.transport.answering = False
    intent = await bench.intend()
    await bench.run(10)
    assert await bench.status(intent) is InstanceStatus.STARTING
    bench.cloud.before["create"] = raising(NoCapacityError("dry"))
    await bench.intend()
    await bench.run(20)
    assert (await bench.shortages.now()).of(SAME)
    bench.transport.answering = True
    await bench.run(10)
    assert await bench.status(intent) is InstanceStatus.RUNNING
    assert (await bench.shortages.now()).of(SAME)


# ------------------------------------------------------------------------------------- shortages that show late --


async def come_too_late(bench: Bench, state: InstanceState = InstanceState.STOPPING) -> UUID:
    """Has the cloud accept an instance that it cannot make, and whoever asks learn that."""
    bench.cloud.late = [state]
    intent = await bench.intend()
    await bench.turn()
    return intent


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.TERMINATED])
async def test_a_shortage_that_shows_late_is_one_of_the_zone(bench: Bench, state: InstanceState) -> None:
    """Accepted, and not made for want of capacity: as if it was refused, for as long, and the instance is over."""
    intent = await come_too_late(bench, state)
    memory = await bench.shortages.now()
    assert [one for one in EVERYTHING if memory.of(one)] == [SAME]
    (shortage,) = memory
    assert (shortage.until - shortage.since, shortage.times) == (timedelta(minutes=3), 1)
    assert "(no capacity)" in shortage.message
    await bench.run(30)
    row = await bench.row(intent)
    assert (row.status, row.error, row.message) == ("terminated", "NoCapacityError", shortage.message)
    assert not bench.cloud.alive()


async def test_a_late_shortage_behind_an_unclear_answer_is_found(bench: Bench) -> None:
    """The answer to create was lost, and the listing says how it ended."""
    bench.cloud.after["create"] = raising(UnknownOutcomeError("reset"))
    intent = await come_too_late(bench, InstanceState.TERMINATED)
    await bench.run(30)
    assert await bench.status(intent) is InstanceStatus.TERMINATED
    assert (await bench.shortages.now()).of(SAME)


async def test_a_late_shortage_of_what_nobody_wants_any_more_is_one(bench: Bench) -> None:
    """A run that was stopped while its instance was pending: the shortage is news for the others."""
    intent = await come_too_late(bench, InstanceState.PENDING)
    bench.cloud.stuck = {"i-1"}
    await bench.unwant(intent)
    await bench.run(20)
    assert not await bench.shortages.now()
    bench.cloud.end("i-1", StateReason.NO_CAPACITY)
    await bench.run(90)
    assert await bench.status(intent) is InstanceStatus.TERMINATED
    assert (await bench.shortages.now()).of(SAME)


async def test_a_late_shortage_is_counted_once(bench: Bench) -> None:
    """An instance may say why it leaves for as long as it is on its way out."""
    bench.cloud.stuck = {"i-1"}
    intent = await come_too_late(bench)
    await bench.run(100)
    assert await bench.status(intent) is InstanceStatus.TERMINATING
    bench.cloud.end("i-1", StateReason.NO_CAPACITY)
    await bench.run(70)
    assert await bench.status(intent) is InstanceStatus.TERMINATED
    (shortage,) = await bench.shortages.now()
    assert shortage.until - bench.clock.now() <= timedelta(seconds=10)


async def test_late_shortages_that_are_repeated_are_remembered_for_longer(bench: Bench) -> None:
    """That the cloud accepts each time does not take back what it could not keep the last time."""
    lengths = []
    for _ in range(4):
        await come_too_late(bench)
        (shortage,) = await bench.shortages.now()
        lengths.append((shortage.until - shortage.since).total_seconds() / 60)
        await bench.clock.sleep((shortage.again_at - bench.clock.now()).total_seconds())
    assert lengths == [3, 6, 12, 24]


@pytest.mark.parametrize("state", [InstanceState.STOPPING, InstanceState.TERMINATED])
async def test_what_ran_was_no_shortage(bench: Bench, state: InstanceState) -> None:
    """Whatever a cloud says of its end."""
    intent = await bench.intend()
    await bench.turn()
    assert await bench.status(intent) is InstanceStatus.RUNNING
    gone = {"state": state, "reason": StateReason.NO_CAPACITY}
    bench.cloud.instances["i-1"] = bench.cloud.instances["i-1"].model_copy(update=gone)
    await bench.look(intent)
    await bench.run(30)
    row = await bench.row(intent)
    assert (row.status, row.error) == ("terminated", None)
    assert not await bench.shortages.now()


async def test_an_instance_that_broke_is_no_shortage(bench: Bench) -> None:
    """Only the reason says that it is one."""
    intent = await come_too_late(bench, InstanceState.PENDING)
    bench.cloud.end("i-1", StateReason.FAILURE)
    await bench.run(30)
    assert await bench.status(intent) is InstanceStatus.TERMINATED
    assert not await bench.shortages.now()


async def test_a_late_shortage_is_written_only_under_the_lease(bench: Bench) -> None:
    """A server that lost its lease meanwhile writes nothing down, and the one that has it does."""
    bench.transport.answering = False
    await come_too_late(bench, InstanceState.PENDING)
    await bench.clock.sleep(30)
    old = await bench.take()
    assert old is not None
    bench.cloud.end("i-1", StateReason.NO_CAPACITY)
    await bench.clock.sleep(LEASE.total_seconds() + 1)
    handler = bench.handler
    bench.restart()
    new = await bench.take()
    assert new is not None
    with pytest.raises(LeaseLost):
        await handler.advance(old, asyncio.Event())
    assert not await bench.shortages.now()
    await bench.clock.sleep(2)
    while await bench.handler.advance(new, asyncio.Event()):
        pass
    assert (await bench.shortages.now()).of(SAME)


# ---------------------------------------------------------------------------------------------------- placement --


def listing(*offers: Offer) -> Listing:
    """What the cloud offers."""
    return Listing("sim", OfferIndex(offers))


async def test_a_placement_passes_over_what_was_refused(bench: Bench) -> None:
    """The next offer that is not reached; and what was refused when nothing else is left, but not too soon."""
    memory = await refuse(bench, NoCapacityError("dry", scope="region"))
    listings = [listing(SAME, ZONE, offer(region="north", zone="n"))]
    chosen = choose(listings, Requirements(), (), memory)
    assert chosen is not None
    assert chosen.region == "north"
    nothing_else = [listing(SAME, ZONE)]
    assert choose(nothing_else, Requirements(), (), memory) is None
    await bench.clock.sleep(60)
    assert choose(nothing_else, Requirements(), (), await bench.shortages.now()) is SAME


async def test_a_refused_account_is_left_alone_as_a_whole(bench: Bench) -> None:
    """Until it may be tried again."""
    memory = await refuse(bench, QuotaExceededError("0 instances", scope="account"))
    assert choose([listing(*EVERYTHING)], Requirements(), (), memory) is None
    await bench.clock.sleep(600)
    assert choose([listing(*EVERYTHING)], Requirements(), (), await bench.shortages.now()) is not None


async def test_a_plan_says_what_is_passed_over_and_until_when(bench: Bench) -> None:
    """Not available, with the reason; later worth trying, after everything else; then as ever."""
    memory = await refuse(bench, NoCapacityError("dry"))
    listings = [listing(SAME, offer("m5.large", region="north"))]
    ranked = rank(listings, Requirements(), memory)
    assert [(one.region, one.availability) for one in ranked.offers] == [
        ("north", Availability.UNKNOWN),
        ("east", Availability.NO_CAPACITY),
    ]
    assert ranked.offers[1].reason == "had none at 00:00:00 UTC, passed over until 00:03:00: dry"
    assert (ranked.can_start, ranked.total, ranked.notes) == (True, 2, ())
    await bench.clock.sleep(60)
    later = rank(listings, Requirements(), await bench.shortages.now())
    assert [(one.region, one.availability) for one in later.offers] == [
        ("north", Availability.UNKNOWN),
        ("east", Availability.UNKNOWN),
    ]
    await bench.clock.sleep(120)
    assert rank(listings, Requirements(), await bench.shortages.now()).offers[0].reason is None


async def test_a_plan_without_an_offer_says_so(bench: Bench) -> None:
    """The only one was refused a moment ago: it cannot start, and the note says why."""
    memory = await refuse(bench, QuotaExceededError("0 of 0 vCPUs"))
    ranked = rank([listing(SAME)], Requirements(), memory)
    assert (ranked.can_start, ranked.offers[0].availability) == (False, Availability.NO_QUOTA)
    assert ranked.notes == ("sim: had no quota at 00:00:00 UTC, passed over until 00:30:00: 0 of 0 vCPUs",)


async def test_a_plan_looks_no_further_than_it_must(bench: Bench) -> None:
    """With a refused account, a plan does not look at a hundred thousand offers."""
    memory = await refuse(bench, NoCapacityError("dry", scope="account"))
    looked: list[Offer] = []
    of = memory.of

    def noted(one: Offer) -> Shortage | None:
        looked.append(one)
        return of(one)

    memory.__dict__["of"] = noted
    machines = [MachineResources(cpus=number, memory_mib=1024) for number in range(1, 101)]
    many = [Offer("sim", "x", "east", machines[number % 100], 1 + number / 1000) for number in range(5000)]
    rank([listing(*many)], Requirements(), memory)
    assert len(looked) == 50


@pytest.mark.parametrize(
    ("machine", "family"),
    [
        ("g5.xlarge", "g5"),
        ("n1-standard-4", "n1"),
        ("p4d.24xlarge", "p4d"),
        ("Standard_NC6", "Standard_NC6"),
        ("x", "x"),
    ],
)
def test_the_family_of_a_machine_is_in_its_name(machine: str, family: str) -> None:
    """What clouds count a quota by."""
    assert family_of(machine) == family
