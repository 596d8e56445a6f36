"""SimCloud, as authors of tests use it: its hooks, its bill, and everything that goes wrong."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from dstack_core.plugin import (
    Instance,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
)
from dstack_core.testing import Drought, Script, SimClock, SimCloud, SimRefused

OWNER, OTHER = UUID(int=1), UUID(int=2)


@pytest.fixture
def clock() -> SimClock:
    """Time that the test moves."""
    return SimClock()


@pytest.fixture
def cloud(clock: SimClock) -> SimCloud:
    """A cloud without faults."""
    return SimCloud(clock, page_size=3)


def request_for(cloud: SimCloud, number: int = 10, **where: Any) -> InstanceRequest:
    """A request for the first offer that fits."""
    offers = cloud.dstack_list_offers(Requirements())
    offer = next(one for one in offers if all(getattr(one, name) == value for name, value in where.items()))
    return InstanceRequest(
        intent=UUID(int=number),
        owner=OWNER,
        name=f"dstack-{number}",
        token=f"{number:064x}",
        request_id=UUID(int=number),
        offer=offer,
        tags={"managed-by": "dstack"},
    )


def create(cloud: SimCloud, number: int = 10, **where: Any) -> Instance:
    """A new instance."""
    return cloud.dstack_create_instance(request_for(cloud, number, **where))


@pytest.mark.parametrize("idempotency", ["token", "name", "tags"])
def test_one_intent_is_one_instance(clock: SimClock, idempotency: Any) -> None:
    """However often it is asked for, and also when it has ended."""
    cloud = SimCloud(clock, idempotency=idempotency)
    made = [create(cloud) for _ in range(3)]
    cloud.dstack_terminate_instance(made[0].ref)
    made.append(create(cloud))
    assert {one.ref.id for one in made} == {"i-0001"}
    assert made[-1].state is InstanceState.TERMINATED


def test_without_tokens_a_lagging_listing_makes_two(clock: SimClock) -> None:
    """Which is why an engine has to wait until it would have seen the first one."""
    cloud = SimCloud(clock, idempotency="tags")
    cloud.weather.list_lag = (60, 60)
    assert create(cloud).ref.id != create(cloud).ref.id
    clock.advance(61)
    assert create(cloud).ref.id == "i-0001"


def test_a_token_with_another_body_is_refused(cloud: SimCloud) -> None:
    """A request is repeated byte for byte, or it is another request."""
    create(cloud, spot=False)
    with pytest.raises(InvalidRequestError, match="used with another request"):
        create(cloud, spot=True)


def test_a_cloud_may_take_a_repeated_request_for_another(cloud: SimCloud) -> None:
    """As after an update that renders requests otherwise: what is new is made, what was made before is refused."""
    cloud.faults.script("create", "mismatch", "mismatch", None)
    made = create(cloud)
    with pytest.raises(InvalidRequestError, match="one of another request"):
        create(cloud)
    assert cloud.faults.struck["create: mismatch"] == 1
    assert create(cloud).ref == made.ref


def test_a_create_call_may_succeed_and_fail(cloud: SimCloud) -> None:
    """What matters is what the cloud did, not what it said."""
    cloud.faults.script("create", "lost before", "lost after", "bug after")
    for error, count in ((UnknownOutcomeError, 0), (UnknownOutcomeError, 1), (RuntimeError, 1)):
        with pytest.raises(error, match="simulated"):
            create(cloud)
        assert len(cloud.alive()) == count


def test_the_bill_runs_from_acceptance_to_the_end(clock: SimClock) -> None:
    """A price is one of an hour, also of an instance that only starts or only ends."""
    cloud = SimCloud(clock, grace=None)
    cloud.weather.starts, cloud.weather.ends = (600, 600), (1800, 1800)
    made = create(cloud, instance_type="small", spot=False)
    clock.advance(1800)
    cloud.dstack_terminate_instance(made.ref)
    clock.advance(7200)
    assert cloud.meter.total(clock.time(), OWNER) == pytest.approx(0.10)
    assert cloud.meter.total(clock.time(), OTHER) == 0


def test_what_nobody_claims_is_known_and_costs(cloud: SimCloud, clock: SimClock) -> None:
    """The meter says for how long each instance was nobody's, and what that has cost."""
    create(cloud, 10, instance_type="small", spot=False)
    create(cloud, 11, instance_type="small", spot=False)
    clock.advance(360)
    alone = cloud.meter.observe(clock.time(), OWNER, lambda one: one.intent == UUID(int=10))
    assert alone == {"i-0002": 360.0}
    clock.advance(360)
    assert cloud.meter.observe(clock.time(), OWNER, lambda _: True) == {}
    assert cloud.meter.unclaimed == pytest.approx(0.01)


def test_a_machine_without_a_server_powers_itself_off(cloud: SimCloud, clock: SimClock) -> None:
    """After its grace, unless a job runs; then after another one."""
    create(cloud, 10)
    create(cloud, 11)
    cloud.instances["i-0002"].machine.put_job("job", None, None)
    clock.advance(601)
    assert [one.id for one in cloud.alive()] == ["i-0002"]
    clock.advance(60)
    found = cloud.dstack_get_instance(create(cloud, 10).ref)
    assert found is not None
    assert (found.state, found.reason) == (InstanceState.TERMINATED, StateReason.SHUTDOWN_FROM_INSIDE)
    assert cloud.alive() == []


def test_a_job_is_a_script(clock: SimClock) -> None:
    """It prints its lines evenly, ends with its code, and its output is the same in every reading."""
    cloud = SimCloud(clock, script_of=lambda _, __: Script(seconds=10, exit_code=3, lines=5))
    create(cloud)
    job = cloud.instances["i-0001"].machine.put_job("job", None, None)
    clock.advance(5.5)
    assert (job.state(clock.time()).status, job.printed(clock.time())) == ("running", 2 * 33)
    clock.advance(10)
    state = job.state(clock.time())
    assert (state.status, state.exit_code, state.reason, state.log_bytes) == ("exited", 3, "exited", 5 * 33)
    assert job.output(40, 80) == job.output(0, 165)[40:80]


def test_an_agent_has_one_job(cloud: SimCloud) -> None:
    """The same again is fine, another one is refused, and an unknown one is unknown."""
    create(cloud)
    machine = cloud.instances["i-0001"].machine
    assert machine.put_job("one", None, None) is machine.put_job("one", None, None)
    with pytest.raises(SimRefused, match="already has job one"):
        machine.put_job("two", None, None)
    with pytest.raises(SimRefused, match="no job two"):
        machine.find("two")
    assert machine.starts == ["one"]


def test_a_stop_ends_a_job_within_its_grace(cloud: SimCloud, clock: SimClock) -> None:
    """A later call with less grace wins."""
    create(cloud)
    machine = cloud.instances["i-0001"].machine
    machine.put_job("one", None, None)
    clock.advance(10)
    assert machine.stop_job("one", 30).ends_at == 10.5
    assert machine.stop_job("one", 0).ends_at == 10.0
    assert machine.find("one").state(clock.time()).reason == "stopped"


def test_droughts_and_quotas_come_and_go(cloud: SimCloud, clock: SimClock) -> None:
    """Each reaches as far as it says, and for as long."""
    cloud.faults.droughts.append(Drought(end=60, zone="a", region="east"))
    cloud.faults.quotas["west"] = 0
    with pytest.raises(NoCapacityError):
        create(cloud, 10, region="east", zone="a")
    with pytest.raises(QuotaExceededError):
        create(cloud, 11, region="west")
    create(cloud, 12, region="east", zone="b")
    clock.advance(61)
    create(cloud, 10, region="east", zone="a")


def test_a_shortage_may_show_late(cloud: SimCloud, clock: SimClock) -> None:
    """Accepted, and given up before it runs, for want of capacity; asked again, it is the same one."""
    cloud.weather.starts, cloud.weather.ends = (5, 5), (10, 10)
    cloud.faults.script("create", "late shortage", "late shortage")
    made = create(cloud)
    assert (made.state, create(cloud).ref) == (InstanceState.PENDING, made.ref)
    seen = []
    for _ in range(2):
        clock.advance(6)
        found = cloud.dstack_get_instance(made.ref)
        seen.append(found and (found.state, found.reason, found.endpoint))
        clock.advance(5)
    short = StateReason.NO_CAPACITY
    assert seen == [(InstanceState.STOPPING, short, None), (InstanceState.TERMINATED, short, None)]
    assert cloud.faults.struck["create: late shortage"] == 1
    assert cloud.alive() == []


def test_calls_are_limited_by_a_token_bucket(clock: SimClock) -> None:
    """Two a second, four at once; and the refusal says when to come again."""
    cloud = SimCloud(clock, rate=2.0)
    for _ in range(4):
        cloud.dstack_list_instances(OWNER)
    with pytest.raises(RateLimitedError) as refused:
        cloud.dstack_list_instances(OWNER)
    clock.advance(refused.value.retry_after or 0)
    assert cloud.dstack_list_instances(OWNER) == []


def test_listings_lag_come_in_pages_and_are_of_one_owner(cloud: SimCloud, clock: SimClock) -> None:
    """A page that is lost makes the whole listing fail: part of one would look like the whole."""
    cloud.weather.list_lag = (30, 30)
    made = {create(cloud, number).ref.id for number in range(10, 15)}
    cloud.add_foreign(OTHER, UUID(int=99))
    assert cloud.dstack_list_instances(OWNER) == []
    clock.advance(31)
    assert {one.ref.id for one in cloud.dstack_list_instances(OWNER)} == made
    cloud.faults.script("list", "page lost")
    with pytest.raises(UnknownOutcomeError, match="page lost"):
        cloud.dstack_list_instances(OWNER)


def test_a_terminate_call_may_do_nothing(cloud: SimCloud) -> None:
    """Only a look afterwards says whether it did."""
    made = create(cloud)
    cloud.faults.script("terminate", "ignored")
    cloud.dstack_terminate_instance(made.ref)
    assert len(cloud.alive()) == 1
    cloud.dstack_terminate_instance(made.ref)
    assert cloud.alive() == []


def test_an_address_is_used_again(cloud: SimCloud) -> None:
    """The machine that answers there is another one."""
    cloud.reuse_addresses = True
    first = create(cloud, 10)
    cloud.dstack_terminate_instance(first.ref)
    second = create(cloud, 11)
    assert first.endpoint == second.endpoint
    holder = cloud.at(second.endpoint.ssh_host or "") if second.endpoint else None
    assert holder is not None
    assert holder.intent == UUID(int=11)


def test_spot_instances_get_a_notice_and_others_die_silently(cloud: SimCloud, clock: SimClock) -> None:
    """The cloud says why in the one case, and may have forgotten all in the other."""
    noticed, killed = create(cloud, 10, spot=True), create(cloud, 11)
    cloud.interrupt(cloud.instances[noticed.ref.id], notice=30)
    cloud.kill(cloud.instances[killed.ref.id], forget=True)
    found = cloud.dstack_get_instance(noticed.ref)
    assert found is not None
    assert (found.state, found.reason) == (InstanceState.STOPPING, StateReason.SPOT_INTERRUPTION)
    assert cloud.dstack_get_instance(killed.ref) is None
    clock.advance(31)
    assert cloud.alive() == []


def test_touching_what_is_somebody_elses_is_noted(cloud: SimCloud) -> None:
    """A test can assert that it never happened."""
    foreign = cloud.add_foreign(OTHER, UUID(int=99))
    described = next(iter(cloud.dstack_list_instances(OTHER)))
    cloud.dstack_terminate_instance(described.ref)
    assert cloud.trespasses == [foreign.id]
