"""Lambda's limits: kept by all processes together, with few requests for many who ask."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from dstack_lambda._backend import LambdaBackend
from dstack_lambda._gate import LINE, MARGIN, PATIENCE, Gate

from dstack_core.plugin import Instance, InstanceRef, InstanceState, RateLimitedError
from dstack_core.testing import Fault
from tests.support.homes import ROOT
from tests.support.lambda_cloud import LambdaCloud

START = 1_800_000_000.0
_CHILD = """
import json, sys
from uuid import UUID
from dstack_lambda import LambdaConfig
from dstack_lambda._backend import LambdaBackend
from tests.support.ec2.requests import request_for
order = json.loads(sys.stdin.read())
backend = LambdaBackend(LambdaConfig.model_validate({"type": "lambda", **order["config"]}))
owner = UUID(order["owner"])
offer = min((o for o in backend.dstack_list_offers() if o.availability.worth_trying), key=lambda o: o.price)
for _ in range(order["looks"]):
    backend.dstack_list_instances(owner)
for _ in range(order["launches"]):
    backend.dstack_create_instance(request_for(offer, owner))
"""

Make = Callable[..., LambdaBackend]


class Time:
    """A time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = START
        self.slept: list[float] = []

    def clock(self) -> float:
        """Now."""
        return self.now

    def pass_by(self, seconds: float) -> None:
        """It is later."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> Time:
    """A time of this test's own."""
    return Time()


def gate_in(folder: Path, time: Time) -> Gate:
    """As another process would have it."""
    return Gate(folder, 1.0, 12.0, time.clock, time.pass_by)


def start_child(cloud: LambdaCloud, looks: int, launches: int) -> subprocess.Popen[str]:
    """Another process, which looks and launches as quickly as it may."""
    code = [sys.executable, "-c", _CHILD]
    child = subprocess.Popen(code, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    order = {"config": cloud.config(), "owner": str(uuid4()), "looks": looks, "launches": launches}
    assert child.stdin is not None
    child.stdin.write(json.dumps(order))
    child.stdin.close()
    child.stdin = None
    return child


def finish(children: list[subprocess.Popen[str]]) -> list[str]:
    """The last line of what each complained of."""
    said = [child.communicate(timeout=120)[1].strip().splitlines()[-1:] for child in children]
    return [line for lines in said for line in lines]


# Each of the two may be late with one request when the other's comes in time: that is the burst.
@pytest.mark.parametrize(
    ("rates", "looks", "launches"),
    [({"requests": 20.0, "burst": 3}, 20, 0), ({"launches": 4.0, "burst": 2}, 0, 6)],
)
def test_two_processes_keep_the_limits_together(rates: dict[str, float], looks: int, launches: int) -> None:
    """Each as quickly as it may, and none is ever told that it was too quick; alone, each would use up the limit."""
    with LambdaCloud(**rates) as cloud:  # type: ignore[arg-type]  # by name
        assert finish([start_child(cloud, looks, launches) for _ in range(2)]) == []
        assert cloud.plane.calls("listInstances") == 2 * (looks + launches)
        assert cloud.plane.calls("launchInstance") == 2 * launches
        assert len(cloud.truth().servers) == 2 * launches


def test_requests_take_turns(tmp_path: Path, time: Time) -> None:
    """One after the other, from whichever process, at the distance that Lambda asks for."""
    gates = [gate_in(tmp_path, time), gate_in(tmp_path, time)]
    for gate in gates * 3:
        gate.wait()
    assert time.now - START == pytest.approx(5 * MARGIN)


def test_launches_are_rarer_and_hold_up_nobody_else(tmp_path: Path, time: Time) -> None:
    """A launch that has to wait leaves the turns in between to other requests."""
    gate = gate_in(tmp_path, time)
    gate.wait(launch=True)
    gate.wait()
    assert time.now - START == pytest.approx(MARGIN)
    gate.wait(launch=True)
    assert time.now - START == pytest.approx(12 * MARGIN)


def test_who_would_wait_too_long_is_told_so(tmp_path: Path, time: Time) -> None:
    """With the time after which it makes sense to come again; a launch is not sent for somebody who has left."""
    gate = gate_in(tmp_path, time)
    gate.wait(launch=True)
    gate.wait(launch=True)
    time.now -= 4
    with pytest.raises(RateLimitedError, match="one launch in 12 s") as caught:
        gate.wait(launch=True)
    assert caught.value.retry_after == pytest.approx(12 * MARGIN + 4)
    gate.hold(PATIENCE + 5)
    with pytest.raises(RateLimitedError, match="one request in 1 s") as caught:
        gate.wait()
    assert caught.value.retry_after == pytest.approx(PATIENCE + 5)


def test_a_long_line_for_launches_keeps_nobody_from_looking(tmp_path: Path, time: Time) -> None:
    """Only so many wait for their launch; the next one is told to come again, and a request goes through."""
    waiting: list[float] = []

    def sleep(seconds: float) -> None:
        waiting.append(seconds)
        if len(waiting) == LINE:
            time.now += 2
            gate.wait()
        gate.wait(launch=True)

    gate = Gate(tmp_path, 1.0, 12.0, time.clock, sleep)
    gate.wait(launch=True)
    with pytest.raises(RateLimitedError, match="one launch in 12 s"):
        gate.wait(launch=True)
    assert len(waiting) == LINE


def test_a_pause_is_for_all(tmp_path: Path, time: Time) -> None:
    """What Lambda asks of one process, the others keep, too; also one that was waiting for its turn already."""
    first, second = gate_in(tmp_path, time), gate_in(tmp_path, time)
    second.hold(7)
    first.wait()
    assert time.now - START == pytest.approx(7)

    def sleep(seconds: float) -> None:
        if len(time.slept) == 1:
            second.hold(9)
        time.pass_by(seconds)

    before = time.now
    Gate(tmp_path, 1.0, 12.0, time.clock, sleep).wait()
    assert time.now - before == pytest.approx(9)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"request": "x"}', json.dumps({"request": START + 1e6})])
def test_a_broken_file_is_none(tmp_path: Path, time: Time, text: str) -> None:
    """Half a file, one that somebody edited, one from before the clock was set back: nobody waits for that."""
    gate = gate_in(tmp_path, time)
    (tmp_path / "turns.json").write_text(text)
    gate.wait()
    gate.wait()
    assert time.now - START == pytest.approx(MARGIN)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, time: Time) -> None:
    """There is a file where the folder should be: this process keeps the limits alone."""
    (tmp_path / "no-folder").write_text("")
    gate = gate_in(tmp_path / "no-folder", time)
    gate.wait()
    gate.wait()
    assert time.now - START == pytest.approx(MARGIN)


def test_files_hold_no_secret_and_are_for_one_person(backend_of: Make, lambda_cloud: LambdaCloud, kept: Path) -> None:
    """Neither in their names nor inside."""
    backend_of(lambda_cloud).dstack_list_offers()
    (folder,) = (kept / "dstack" / "cache" / "lambda").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    shown = [str(file) + file.read_text() for file in folder.iterdir()]
    assert len(shown) == 1
    assert lambda_cloud.config()["api_key"] not in shown[0]


def test_retry_after_is_kept_by_other_processes(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """After Lambda asked one for a pause, the next request of anybody comes when that is over."""
    first, second = backend_of(lambda_cloud), backend_of(lambda_cloud)
    lambda_cloud.fail(Fault.THROTTLE)
    with pytest.raises(RateLimitedError) as caught:
        first.dstack_list_offers()
    assert caught.value.retry_after == 1
    second.dstack_list_offers()
    (_, refused), (_, answered) = lambda_cloud.seen
    assert answered - refused >= 0.95


# -- many who ask -----------------------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], object]) -> list[object]:
    """What came of each, all made at once: an answer, or an error."""

    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:  # noqa: BLE001  # looked at by the test
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def start(cloud: LambdaCloud, backend: LambdaBackend, count: int) -> list[Instance]:
    """So many instances."""
    from tests.support.ec2.requests import request_for

    offer = min((o for o in backend.dstack_list_offers() if o.availability.worth_trying), key=lambda o: o.price)
    owner = uuid4()
    return [backend.dstack_create_instance(request_for(offer, owner)) for _ in range(count)]


def test_many_who_look_share_a_listing(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Sixteen who ask at once about sixteen instances cost two or three requests, not sixteen."""
    backend = backend_of(lambda_cloud)
    made = start(lambda_cloud, backend, 16)
    lambda_cloud.plane.latency(0.3, call="listInstances")
    before = lambda_cloud.calls()
    found = at_once(*(lambda one=one: backend.dstack_get_instance(one.ref) for one in made))
    assert [getattr(one, "intent", one) for one in found] == [one.intent for one in made]
    assert lambda_cloud.calls() - before <= 3


def test_an_answer_is_never_older_than_the_question(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Whoever asks while a listing is under way gets the next one: it may have been made before what matters."""
    backend = backend_of(lambda_cloud)
    (made,) = start(lambda_cloud, backend, 1)
    lambda_cloud.plane.latency(0.3, call="listInstances")
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(backend.dstack_get_instance, made.ref)
        lambda_cloud.say(made.ref.id, "preempted")
        later = backend.dstack_get_instance(made.ref)
        earlier.result()
    assert later is not None
    assert later.state is InstanceState.STOPPING


def test_many_ends_are_one_request(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Sixteen who end an instance each cost two or three requests."""
    backend = backend_of(lambda_cloud)
    made = start(lambda_cloud, backend, 16)
    lambda_cloud.plane.latency(0.3, call="terminateInstance")
    at_once(*(lambda one=one: backend.dstack_terminate_instance(one.ref) for one in made))
    assert lambda_cloud.plane.calls("terminateInstance") <= 3
    assert not any(lambda_cloud.instance(one.ref.id).status == "active" for one in made)


def test_one_that_is_gone_spoils_nothing(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Lambda refuses a request as a whole for one unknown id: then they are ended one by one."""
    backend = backend_of(lambda_cloud)
    made = start(lambda_cloud, backend, 6)
    refs = [one.ref for one in made] + [InstanceRef(backend="lambda", id="f" * 32, region="us-east-1")]
    lambda_cloud.plane.latency(0.3, call="terminateInstance")
    said = at_once(*(lambda ref=ref: backend.dstack_terminate_instance(ref) for ref in refs))
    assert said == [None] * 7
    assert not any(lambda_cloud.instance(one.ref.id).status == "active" for one in made)


def test_an_error_is_the_error_of_all_who_share_it(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """And not of those who ask later."""
    backend = backend_of(lambda_cloud)
    made = start(lambda_cloud, backend, 4)
    lambda_cloud.fail(Fault.SERVER_ERROR, 1000)
    found = at_once(*(lambda one=one: backend.dstack_get_instance(one.ref) for one in made))
    assert all(isinstance(one, Exception) for one in found)
    lambda_cloud.heal()
    assert backend.dstack_get_instance(made[0].ref) is not None


def test_offers_need_one_request(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Prices, machines and where they are to be had, all in one."""
    backend_of(lambda_cloud).dstack_list_offers()
    assert lambda_cloud.calls() == 1
