"""What goes wrong in a cloud under test: each thing that can be ordered, and each that can be scarce."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from dstack_core.testing import Counting, Failure, Fault, FaultPlane, Faulty, Lagging, Struck, wait_until


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now: float = 100.0
    pauses: list[float] = field(default_factory=list)

    def pause(self, seconds: float) -> None:
        """Lets time pass."""
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    """A clock."""
    return Clock()


@pytest.fixture
def plane(clock: Clock) -> FaultPlane:
    """A plane of a cloud that says how long to wait when it has no capacity."""
    said = {Fault.NO_CAPACITY: Failure("sold out", scope="zone", retry_after=7)}
    return FaultPlane(said, clock=lambda: clock.now, pause=clock.pause)


def outcome(plane: FaultPlane, call: str = "run", *, making: bool = True) -> str:
    """What comes of a call: that it was done, or what befell it."""
    try:
        return plane.carry_out(call, lambda: "done", making=making)
    except Struck as struck:
        return struck.fault.value


def test_a_front_end_can_pass_its_abilities_on(plane: FaultPlane) -> None:
    """The plane has the abilities of a cloud under test that are about faults."""
    assert isinstance(plane, Faulty)
    assert isinstance(plane, Lagging)
    assert isinstance(plane, Counting)


def test_ordered_faults_befall_so_many_calls(plane: FaultPlane) -> None:
    """An order befalls the next calls, after those that it skips, and says what the cloud will say."""
    assert plane.fail(Fault.NO_CAPACITY, 2, skip=1) == Failure("sold out", scope="zone", retry_after=7)
    assert [outcome(plane) for _ in range(4)] == ["done", "no capacity", "no capacity", "done"]
    assert plane.fail("throttle") == Failure()
    assert outcome(plane) == "throttle"


def test_a_new_order_replaces_the_old_one(plane: FaultPlane) -> None:
    """What was left of an order is forgotten with the next one, and with `heal`."""
    plane.fail(Fault.QUOTA, 5)
    plane.fail(Fault.INVALID)
    assert [outcome(plane) for _ in range(2)] == ["invalid", "done"]
    plane.fail(Fault.QUOTA, 5)
    plane.heal()
    assert outcome(plane) == "done"


@pytest.mark.parametrize("fault", [Fault.NO_CAPACITY, Fault.QUOTA, Fault.INVALID])
def test_shortages_befall_only_what_makes_a_server(plane: FaultPlane, fault: Fault) -> None:
    """A listing is not refused for want of capacity."""
    plane.fail(fault, skip=1)
    outcomes = [outcome(plane, making=making) for making in (False, True, False, True)]
    assert outcomes == ["done", "done", "done", fault.value]


def test_orders_can_be_for_some_calls_alone(plane: FaultPlane) -> None:
    """An order for a pattern of calls leaves the others alone."""
    plane.fail(Fault.SERVER_ERROR, call="Describe*")
    calls = ("RunInstances", "DescribeInstances", "DescribeInstances")
    assert [outcome(plane, call) for call in calls] == ["done", "server error", "done"]


def test_calls_follow_a_script(plane: FaultPlane) -> None:
    """A script says what happens to one call after the other, and scripts add up."""
    plane.script("run", "throttle", None, Fault.DROP)
    plane.script("run", Fault.QUOTA)
    assert [outcome(plane, "list") for _ in range(2)] == ["done", "done"]
    assert [outcome(plane) for _ in range(5)] == ["throttle", "done", "drop", "quota", "done"]


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.SERVER_ERROR])
def test_an_answer_can_be_lost_after_the_deed(plane: FaultPlane, fault: Fault) -> None:
    """With `after`, what the call asks for is done; without, it is not; reading calls are not meant."""
    done: list[str] = []
    plane.fail(fault, after=True)
    plane.carry_out("list", lambda: done.append("list"))
    with pytest.raises(Struck):
        plane.carry_out("run", lambda: done.append("run"), changing=True)
    plane.fail(fault)
    with pytest.raises(Struck):
        plane.carry_out("run", lambda: done.append("again"), changing=True)
    assert done == ["list", "run"]


def test_a_refusal_cannot_come_after_the_deed(plane: FaultPlane) -> None:
    """An answer that says that nothing happened is true."""
    with pytest.raises(ValueError, match="'throttle' is an answer that says that nothing happened"):
        plane.fail(Fault.THROTTLE, after=True)


@pytest.mark.parametrize("after", [False, True])
def test_a_call_hangs_until_it_is_healed(plane: FaultPlane, after: bool) -> None:
    """A call that hangs is answered by `heal`; with `after`, it was carried out before."""
    done = threading.Event()

    def do() -> str:
        done.set()
        return "done"

    plane.fail(Fault.HANG, after=after)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(plane.carry_out, "run", do, making=True)
        wait_until(lambda: plane.calls("run") == 1 and not plane._orders[0].faults)
        if after:
            assert done.wait(30)
        assert not answer.done()
        assert done.is_set() == after
        plane.heal()
        assert answer.result(30) == "done"


def test_capacity_is_per_type_and_zone(plane: FaultPlane) -> None:
    """As many can be had at once as there are, of a type in a zone, and of all that a pattern covers together."""
    plane.capacity(0, zone="a")
    plane.capacity(2, type="big-*", zone="b")
    with pytest.raises(Struck) as struck:
        plane.take("1", type="small", zone="a")
    assert (struck.value.fault, struck.value.retry_after) == (Fault.NO_CAPACITY, 7)
    plane.take("2", type="big-1", zone="b")
    plane.take("3", type="big-2", zone="b")
    plane.take("3", type="big-2", zone="b")
    assert (plane.left("big-1", "b"), plane.left("small", "b")) == (0, None)
    with pytest.raises(Struck):
        plane.take("4", type="big-1", zone="b")
    plane.take("5", type="big-1", zone="c")
    plane.give_back("2")
    plane.give_back("2")
    plane.take("4", type="big-1", zone="b")
    plane.capacity(None, zone="a")
    plane.take("1", type="small", zone="a")


def test_a_quota_limits_what_counts_under_its_name(plane: FaultPlane) -> None:
    """What is taken counts under each quota that it uses, and nothing is taken where one of them is over."""
    plane.quota("north vcpus", 16)
    plane.take("1", type="m", zone="a", uses={"north vcpus": 12})
    with pytest.raises(Struck) as struck:
        plane.take("2", type="m", zone="a", uses={"north vcpus": 8})
    assert struck.value.fault is Fault.QUOTA
    plane.take("2", type="m", zone="s", uses={"south vcpus": 800})
    plane.take("3", type="m", zone="a", uses={"north vcpus": 4})
    assert (plane.limit("north vcpus"), plane.limit("south vcpus")) == (16, None)
    plane.quota("north vcpus", None)
    plane.take("4", type="m", zone="a", uses={"north vcpus": 8})


def test_calls_are_throttled_by_a_bucket(plane: FaultPlane, clock: Clock) -> None:
    """So many calls go through at once, then as many as the rate allows; what is refused says how long to wait."""
    plane.throttle(2, burst=3, call="run")
    assert [outcome(plane) for _ in range(4)] == ["done", "done", "done", "throttle"]
    assert outcome(plane, "list") == "done"
    with pytest.raises(Struck) as struck:
        plane.carry_out("run", lambda: None)
    assert struck.value.retry_after == pytest.approx(0.5)
    clock.now += 0.5
    assert [outcome(plane) for _ in range(2)] == ["done", "throttle"]
    clock.now += 60
    assert [outcome(plane) for _ in range(4)] == ["done", "done", "done", "throttle"]
    plane.throttle(None, call="run")
    assert outcome(plane) == "done"


def test_calls_wait_as_long_as_they_are_told(plane: FaultPlane, clock: Clock) -> None:
    """The longest latency of those that match counts, until it is taken back."""
    plane.latency(0.2)
    plane.latency(1.5, call="run")
    outcome(plane)
    outcome(plane, "list")
    plane.latency(0, call="run")
    plane.latency(0)
    outcome(plane)
    assert clock.pauses == [1.5, 0.2]


def test_listings_lag_behind(plane: FaultPlane, clock: Clock) -> None:
    """What was made just now is not in a listing before the lag is over."""
    born = plane.now()
    assert plane.listed(born)
    plane.lag(5)
    assert not plane.listed(born)
    clock.now += 5
    assert plane.listed(born)


def test_calls_are_counted(plane: FaultPlane) -> None:
    """Every call counts, those that fail included."""
    plane.fail(Fault.DROP)
    for call in ("run", "run", "list"):
        outcome(plane, call)
    assert (plane.calls(), plane.calls("run"), plane.calls("l*")) == (3, 2, 1)


def test_threads_share_what_there_is(plane: FaultPlane) -> None:
    """However many ask at once, no more is given than there is."""
    plane.capacity(7)
    taken: list[int] = []

    def take(number: int) -> None:
        try:
            plane.take(str(number), type="m", zone="a")
        except Struck:
            return
        taken.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(50)))
    assert len(taken) == 7
