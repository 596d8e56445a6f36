"""Cases about processes that die: what another one finds, and what it makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from os import environ, pathsep
from typing import Any, TypeVar

from dstack_core.plugin import BackendError, Instance, InstanceRequest, InstanceState, NoCapacityError, Requirements
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import together
from dstack_core.testing._suite._creating import ONE
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._needs import CHECKS, FAULTS, MARKED, NATIVE, TRUTH, needs
from dstack_core.testing._suite._rig import Rig
from dstack_core.testing._wait import wait_until

T = TypeVar("T")

_START = 60.0


class RecoveryCases(Base):
    """A server is killed at the worst moment, and the next one goes on."""

    @needs(FAULTS, TRUTH)
    def test_killed_between_sending_and_the_answer(self, rig: Rig) -> None:
        """Does the next process get the one instance, when the first one was killed while it waited for the answer?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing("hang", 1000, after=True), _process(rig, request) as child:
            _wait_for_server(rig, request, child)
            child.kill()
            child.wait(30)
        again = rig.create(request)
        there = [server.id for server in rig.new_servers()]
        expect(
            there == [again.ref.id],
            "create-once",
            "a process was killed before the answer came, and the next one made a second server",
            expected=f"one server, {again.ref.id}",
            got=there,
            cure=ONE,
        )

    @needs(FAULTS, TRUTH)
    def test_killed_before_the_cloud_heard_of_it(self, rig: Rig) -> None:
        """Does the next process make the one instance, when the first one was killed before the cloud did anything?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing("drop", 1000), _process(rig, request) as child:
            wait_until(lambda: child.poll() is not None, timeout=_START, what="the process to fail")
        rig.create(request)
        there = [server.id for server in rig.new_servers()]
        expect(
            len(there) == 1,
            "create-once",
            "a call that never came through and its repetition did not make one server",
            expected="one server",
            got=there,
            cure=ONE,
        )

    def test_killed_before_the_answer_was_stored(self, rig: Rig) -> None:
        """Does the next process get the one instance, when the first one was killed with the answer in its hand?"""
        request = rig.request()
        rig.expect_to_end(request)
        with _process(rig, request) as child:
            made = _answer(child)
            child.kill()
            child.wait(30)
        again = rig.create(request)
        expect(
            again.ref.id == made.ref.id,
            "create-once",
            "a process was killed before it stored the answer, and the next one got another instance",
            expected=made.ref.id,
            got=again.ref.id,
            cure=ONE,
        )

    @needs(MARKED)
    def test_an_orphan_is_found_by_its_owner(self, rig: Rig) -> None:
        """Does the next process find and end an instance of which nobody knows the reference any more?"""
        request = rig.request()
        rig.expect_to_end(request)
        with _process(rig, request) as child:
            made = _answer(child)
            child.kill()
            child.wait(30)

        def found() -> list[Instance]:
            return [one for one in rig.backend.listed(rig.owner) if one.intent == request.intent]

        (orphan,) = rig.until(
            found,
            "list",
            "an instance whose process died is not found by owner and intent",
            expected=made.ref.id,
            cure="list by the owner's tag, and read the intent back from the tags",
        )
        rig.end(orphan)

    @needs(FAULTS, TRUTH, NATIVE)
    def test_two_workers_after_a_lost_answer(self, rig: Rig) -> None:
        """Do two workers that both take over an unanswered creation get one instance?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing("drop", 1000, after=True), contextlib.suppress(BackendError):
            rig.backend.create(request)
        workers = [rig.another(), rig.another()]
        outcomes = together([partial(one.create, request) for one in workers])
        ids = {outcome.get().ref.id for outcome in outcomes}
        there = [server.id for server in rig.new_servers()]
        expect(
            len(ids) == len(there) == 1,
            "create-once",
            "two workers that took over made more than one server",
            expected="one server",
            got=there,
            cure=ONE,
        )


class EngineCases(Base):
    """The same backend behind the core's own hub, as the engine sees it."""

    def test_the_core_finds_and_configures_it(self, rig: Rig) -> None:
        """Is the backend loaded, configured and usable?"""

        async def look(hub: Any) -> list[str]:
            statuses = await hub.status()
            return [f"{one.state}: {one.reason}" for one in statuses if one.name == rig.name]

        states = _through_the_hub(rig, look)
        expect(
            states == ["configured: None"],
            "register",
            "the core cannot use the backend",
            expected="configured",
            got=states,
            cure="the reason says what to do",
        )

    def test_the_core_gets_its_offers(self, rig: Rig) -> None:
        """Does a plan have the backend's offers, without an error?"""

        async def ask(hub: Any) -> Any:
            (listing,) = await hub.list_offers(Requirements(), timeout=rig.info.hook_timeout, only=[rig.name])
            return listing

        listing = _through_the_hub(rig, ask)
        expect(
            listing.error is None and len(listing.offers) > 0,
            "offers",
            "a plan has no offers of this backend",
            expected="offers",
            got=listing.error or "none",
            cure="see the message; what the core refuses is said there",
        )

    def test_a_life_through_the_core(self, rig: Rig) -> None:
        """Does the core get an instance created, found again, and ended?"""
        request = rig.request()
        rig.expect_to_end(request)

        async def live(hub: Any) -> tuple[bool, bool]:
            made = await hub.create_instance(rig.name, request)
            rig.know(made)
            again = await hub.create_instance(rig.name, request)
            known = await hub.get_instance(made.ref)
            await hub.list_instances(rig.name, rig.owner)
            await hub.terminate_instance(made.ref)
            return again.ref.id == made.ref.id, known is not None

        had = _through_the_hub(rig, live)
        expect(
            had == (True, True),
            "create-once",
            "through the core, an instance is not one, or is not found",
            expected="the same instance twice, found by its reference",
            got=had,
            cure="see the cases about creation",
        )

    @needs(FAULTS)
    def test_the_core_sees_the_class_of_an_error(self, rig: Rig) -> None:
        """Does a shortage reach the engine as NoCapacityError, and not as a bug of the plugin?"""
        request = rig.request()
        rig.expect_to_end(request)

        async def refused(hub: Any) -> BaseException | None:
            try:
                await hub.create_instance(rig.name, request)
            except BackendError as error:
                return error
            return None

        with rig.failing("no capacity", 1000):
            error = _through_the_hub(rig, refused)
        expect(
            isinstance(error, NoCapacityError),
            "create-capacity",
            "a shortage reaches the engine as something else",
            expected="NoCapacityError",
            got=repr(error),
            cure="raise the classes of dstack_core.plugin themselves",
        )

    @needs(CHECKS)
    def test_the_core_can_check_the_configuration(self, rig: Rig) -> None:
        """Does `dstack backends --check` get an answer?"""
        problems = _through_the_hub(rig, lambda hub: hub.check_config(rig.name))
        expect(
            not problems or rig.info.existing_machines,
            "check-answer",
            "the check through the core has problems",
            expected="[]",
            got=problems,
            cure="see the case about a good configuration",
        )

    def test_nothing_is_left_at_the_end(self, rig: Rig) -> None:
        """When a few instances of this owner were made and ended, is none left, in the listing and in the cloud?"""
        made = [rig.start() for _ in range(3)]
        for instance in made:
            rig.end(instance)
        rig.until(
            lambda: all(one.state is InstanceState.TERMINATED for one in rig.backend.listed(rig.owner)),
            "end",
            "when everything was ended, the listing still has something",
            expected="nothing that lives",
            cure="list what is on its way to the end as STOPPING, and leave out or mark what is gone",
        )
        if TRUTH.met(rig):
            truth = rig.cloud.truth()
            left = [*(one.id for one in rig.new_servers() if one.billed), *truth.leftovers]
            expect(
                not left,
                "end",
                "when everything was ended, something is left in the cloud",
                expected="nothing",
                got=left,
                cure="end what was made for the instance as well",
            )


# -- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _process(rig: Rig, request: InstanceRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that creates. It is killed at the end, in any case."""
    order = {
        "entry": rig.point.name,
        "value": rig.point.value,
        "backend": rig.name,
        "config": rig.cloud.config(),
        "request": request.model_dump_json(),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "dstack_core.testing._child"],
        env={**environ, "PYTHONPATH": pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin is not None  # noqa: S101  # for type checkers
        child.stdin.write(json.dumps(order) + "\n")
        child.stdin.flush()
        yield child
    finally:
        child.kill()
        for stream in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]  # all three are pipes
        child.wait(30)


def _answer(child: subprocess.Popen[str]) -> Instance:
    __tracebackhide__ = True
    assert child.stdout is not None  # noqa: S101  # for type checkers
    line = child.stdout.readline()
    if not line:
        error = child.stderr.read() if child.stderr else ""
        fail(
            "create-once",
            "another process could not create the instance",
            expected="an instance",
            got=error.strip().splitlines()[-1:] or "no answer",
            cure="the backend has to work in a process that has nothing but the entry point and the configuration",
        )
    return Instance.model_validate_json(line)


def _wait_for_server(rig: Rig, request: InstanceRequest, child: subprocess.Popen[str]) -> None:
    __tracebackhide__ = True

    def there() -> bool:
        return bool(rig.servers_of(request.intent)) or child.poll() is not None

    wait_until(there, timeout=_START, what="the other process to have created the server")
    if not rig.servers_of(request.intent):
        _answer(child)


def _through_the_hub(rig: Rig, use: Callable[[Any], Awaitable[T]]) -> T:
    """Runs something with the core's hub, which knows this backend alone."""
    __tracebackhide__ = True
    from dstack_core._backends import BackendEntry, BackendHub

    def only_this(**_: object) -> list[Any]:
        return [rig.point]

    async def run() -> T:
        entries = [BackendEntry(rig.name, rig.cloud.config())]
        hub = await asyncio.to_thread(lambda: BackendHub.discover(entries, entry_points=only_this))
        try:
            return await use(hub)
        finally:
            _close(hub, rig.name)

    try:
        return asyncio.run(run())
    except BackendError as error:
        fail(
            "raises",
            "the core refuses what the backend did",
            expected="an answer that keeps the contract",
            got=f"{type(error).__name__}: {error}",
            cure="the message names the hook",
        )


def _close(hub: Any, name: str) -> None:
    """Closes the object that the hub made, which the core never does."""
    made = hub._backends[name].implementation  # noqa: SLF001  # there is no other way to it, and no need for one outside
    owner = made and getattr(vars(made).get("dstack_get_instance"), "__self__", None)
    close = getattr(owner, "close", None)
    if callable(close):
        close()
