"""One plugin's failure never touches another: whatever it does, and whenever."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from textwrap import dedent
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from dstack_core._backends._calls import _Threads
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    PluginBug,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)
from dstack_core.plugin import Endpoint, InstanceRef, Requirements, hookimpl
from dstack_core.testing import wait_until
from tests.support.toys import (
    OWNER,
    OtherConfig,
    Point,
    Toy,
    ToyConfig,
    ToyWithAll,
    hub_of,
    info,
    instance,
    offer,
    plugin,
    prepared,
    raising,
    request,
    toy_hub,
)

pytestmark = pytest.mark.anyio

REF = InstanceRef(backend="toy", id="i-1", region="r")
ANY = Requirements()


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that is set only when the test is over, for things that hang."""
    event = threading.Event()
    yield event
    event.set()


def unmarked() -> SimpleNamespace:
    """A plugin whose author forgot the decorator."""
    return SimpleNamespace(dstack_register_backends=lambda: [info()])


def misspelt() -> SimpleNamespace:
    """A plugin with a typing error in a hook's name."""

    @hookimpl
    def dstack_register_backend() -> list[Any]:
        return [info()]

    return SimpleNamespace(dstack_register_backend=dstack_register_backend)


def unknown_argument() -> SimpleNamespace:
    """A wrapper that wants an argument that there is not."""

    @hookimpl(wrapper=True)
    def dstack_list_offers(requirement: object) -> Any:
        return (yield)

    return SimpleNamespace(dstack_list_offers=dstack_list_offers)


def answers_for_all() -> SimpleNamespace:
    """A plugin that would answer in the place of every backend."""

    @hookimpl
    def dstack_list_offers() -> list[Any]:
        return []

    return SimpleNamespace(dstack_list_offers=dstack_list_offers)


def no_generator() -> SimpleNamespace:
    """A wrapper that does not yield."""

    @hookimpl(wrapper=True)
    def dstack_list_offers() -> list[Any]:
        return []

    return SimpleNamespace(dstack_list_offers=dstack_list_offers)


BROKEN: dict[str, tuple[Point, str]] = {
    "raises at import": (Point("bad", loads=raising(ImportError("no module named boto3"))), "no module named boto3"),
    "exits at import": (Point("bad", loads=raising(SystemExit(3))), "SystemExit: 3"),
    "interrupts at import": (Point("bad", loads=raising(KeyboardInterrupt())), "KeyboardInterrupt"),
    "raises at registration": (
        Point("bad", plugin(dstack_register_backends=hookimpl(raising(ZeroDivisionError("oh"))))),
        "dstack_register_backends failed: ZeroDivisionError: oh",
    ),
    "registers nothing": (Point("bad", SimpleNamespace()), "has neither dstack_register_backends nor a wrapper"),
    "registers None": (Point("bad", plugin(dstack_register_backends=hookimpl(lambda: None))), "returned None"),
    "registers a string": (Point("bad", plugin(dstack_register_backends=hookimpl(lambda: ["aws"]))), "a str in it"),
    "is not marked": (Point("bad", unmarked()), "not marked with @hookimpl"),
    "is misspelt": (Point("bad", misspelt()), "Did you mean 'dstack_register_backends'?"),
    "wants an unknown argument": (Point("bad", unknown_argument()), "'requirement'"),
    "answers for all": (Point("bad", answers_for_all()), "a plugin may wrap it"),
    "wraps without yield": (Point("bad", no_generator()), "not a generator function"),
    "speaks another API": (Point("bad", plugin(info(), DSTACK_PLUGIN_API=(2, 0))), "upgrade dstack-core"),
    "speaks nonsense": (Point("bad", plugin(info(), DSTACK_PLUGIN_API="1")), "must be a pair"),
    "has a bad name": (Point("bad", plugin(info("Toy!"))), "lower-case letters"),
    "has a name that no table has room for": (Point("bad", plugin(info("t" * 65))), "at most 64"),
    "has the config of another": (Point("bad", plugin(info(config=OtherConfig))), "`type` is not the same"),
    "has no config": (Point("bad", plugin(info(config=dict))), "no subclass of BackendConfig"),
    "has another's default": (Point("bad", plugin(info(default_config=OtherConfig()))), "that is no ToyConfig"),
    "has no factory": (Point("bad", plugin(info(factory="nothing"))), "write 'module:callable'"),
    "allows no call": (Point("bad", plugin(info(max_concurrency=0))), "allows no call at all"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_plugin_that_cannot_be_loaded_is_shown_with_its_reason_and_the_others_work(case: str) -> None:
    """The message names the plugin and says what is wrong; the backend next to it answers."""
    point, words = BROKEN[case]
    prepared["other"] = Toy(offers=[offer(backend="other")])
    hub = hub_of(point, Point("other", plugin(info("other"))))
    (good, bad) = sorted(await hub.status(), key=lambda status: status.state)
    assert (good.name, good.state, bad.name, bad.state) == ("other", "configured", "bad", "failed")
    assert "'bad'" in str(bad.reason)
    assert words in str(bad.reason)
    (listing, broken) = await hub.list_offers(ANY, timeout=20)
    assert len(listing.offers) == 1
    assert (broken.backend, str(broken.error)) == ("bad", bad.reason)


async def test_a_plugin_that_hangs_at_import_is_given_up_and_the_others_work(never: threading.Event) -> None:
    """Loading has a time limit, which all plugins together share."""
    prepared["other"] = Toy(offers=[offer(backend="other")])
    points = Point("bad", loads=never.wait), Point("other", plugin(info("other")))
    hub = hub_of(*points, load_timeout=1.0)
    states = {status.name: (status.state, status.reason) for status in await hub.status()}
    assert states["other"] == ("configured", None)
    assert "did not load within 1 s" in str(states["bad"][1])


async def test_another_major_version_of_the_plugin_api_is_refused_with_the_cure() -> None:
    """For a single backend as for a whole plugin; a newer minor version is fine."""
    hub = hub_of(Point("a", plugin(info(plugin_api=(0, 9)), info("other", plugin_api=(1, 99)))))
    (other, toy) = await hub.status()
    assert (toy.state, other.state) == ("failed", "configured")
    assert "plugin API 0.9, and this dstack-core speaks 1.3: upgrade the plugin" in str(toy.reason)
    assert hub.names() == ["other"]


async def test_two_plugins_with_one_backend_name_are_both_named_and_one_is_used_predictably() -> None:
    """The package that is named after the backend wins, in whatever order they are found; the reason says so."""
    theirs = Point("a-fork", plugin(info(title="Theirs")), distribution="a-toy-fork")
    ours = Point("toy", plugin(info(title="Ours")), distribution="dstack-toy")
    for points in ((theirs, ours), (ours, theirs)):
        (status,) = await hub_of(*points).status()
        assert (status.title, status.state, status.distribution) == ("Ours", "configured", "dstack-toy")
        assert "dstack-toy 1.0 (entry point 'toy') is used" in str(status.reason)
        assert "a-toy-fork 1.0" in str(status.reason)


def ask_all(hub: Any) -> dict[str, Callable[[], Any]]:
    """Each hook as the engine calls it."""
    return {
        "dstack_create_instance": lambda: hub.create_instance("toy", request()),
        "dstack_get_instance": lambda: hub.get_instance(REF),
        "dstack_list_instances": lambda: hub.list_instances("toy", OWNER),
        "dstack_terminate_instance": lambda: hub.terminate_instance(REF),
        "dstack_check_config": lambda: hub.check_config("toy"),
        "dstack_connect": lambda: hub.connect(instance()),
    }


@pytest.mark.parametrize("hook", ask_all(None))
@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), SystemExit(1), KeyboardInterrupt(), TimeoutError("t"), StopIteration(), BackendError("base")],
    ids=lambda error: type(error).__name__,
)
async def test_what_a_hook_may_not_raise_is_a_bug_of_its_plugin(hook: str, error: BaseException) -> None:
    """Named with plugin, version and hook, and with the place in its source."""
    bad = raising(error)
    toy = ToyWithAll(created=bad, got=bad, listed=bad, terminated=bad, problems=bad, connected=bad)
    with pytest.raises(PluginBug) as caught:
        await ask_all(toy_hub(toy))[hook]()
    assert (caught.value.plugin, caught.value.version, caught.value.hook) == ("toy", "dstack-toy 1.0", hook)
    assert "toys.py, line" in caught.value.problem or isinstance(error, StopIteration)


ALLOWED = {
    "dstack_create_instance": {
        NoCapacityError,
        QuotaExceededError,
        AuthenticationError,
        InvalidRequestError,
        RateLimitedError,
        UnknownOutcomeError,
    },
    "dstack_get_instance": {AuthenticationError, RateLimitedError, UnknownOutcomeError},
    "dstack_list_instances": {AuthenticationError, RateLimitedError, UnknownOutcomeError},
    "dstack_terminate_instance": {AuthenticationError, RateLimitedError, UnknownOutcomeError},
    "dstack_check_config": {AuthenticationError, RateLimitedError, UnknownOutcomeError, InvalidRequestError},
    "dstack_connect": {AuthenticationError, RateLimitedError, UnknownOutcomeError},
}


@pytest.mark.parametrize("hook", ALLOWED)
async def test_a_hook_may_raise_what_its_contract_names_and_nothing_else(hook: str) -> None:
    """Instructions to the engine arrive as they are; those that make no sense for the hook are bugs."""
    for kind in ALLOWED["dstack_create_instance"]:
        error = kind("the cloud's words")
        bad = raising(error)
        toy = ToyWithAll(created=bad, got=bad, listed=bad, terminated=bad, problems=bad, connected=bad)
        with pytest.raises(BackendError) as caught:
            await ask_all(toy_hub(toy))[hook]()
        assert (caught.value is error) == (kind in ALLOWED[hook])
        assert isinstance(caught.value, PluginBug) != (kind in ALLOWED[hook])


WRONG: dict[str, tuple[str, Toy, str]] = {
    "no instance": ("dstack_create_instance", Toy(created=None), "returned None instead of Instance"),
    "another intent": ("dstack_create_instance", Toy(created=instance()), "was asked for intent"),
    "another owner": (
        "dstack_create_instance",
        Toy(created=lambda asked: instance(asked, owner=asked.intent)),
        "was asked for owner",
    ),
    "another backend": (
        "dstack_create_instance",
        Toy(created=lambda asked: instance(asked, ref=InstanceRef(backend="aws", id="i", region="r"))),
        "an instance of the backend 'aws'",
    ),
    "no time zone": (
        "dstack_create_instance",
        Toy(created=lambda asked: instance(asked, created_at=instance().created_at.replace(tzinfo=None))),
        "no time zone",
    ),
    "another instance": (
        "dstack_get_instance",
        Toy(got=instance(ref=InstanceRef(backend="toy", id="i-2", region="r"))),
        "was asked for instance 'i-1' and returned 'i-2'",
    ),
    "a dict": ("dstack_get_instance", Toy(got={}), "returned a dict instead of Instance"),
    "None for a list": ("dstack_list_instances", Toy(listed=None), "returned None instead of a list of Instance"),
    "somebody else's": (
        "dstack_list_instances",
        Toy(listed=[instance(owner=request().intent)]),
        "was asked for owner",
    ),
    "one text": ("dstack_check_config", ToyWithAll(problems="bad"), "one text instead of a list"),
    "no endpoint": ("dstack_connect", ToyWithAll(connected="host"), "returned a str instead of Endpoint"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_a_hook_may_not_return_is_a_bug_of_its_plugin(case: str) -> None:
    """A wrong instance must never be taken for the right one."""
    hook, toy, words = WRONG[case]
    with pytest.raises(PluginBug, match=words) as caught:
        await ask_all(toy_hub(toy))[hook]()
    assert caught.value.hook == hook


@pytest.mark.parametrize(
    ("offers", "words"),
    [
        (None, "returned None instead of a list of Offer"),
        (["cheap"], "a list with a str in it"),
        ([offer(backend="aws")], "an offer of the backend 'aws'"),
        ([offer(price=-0.01)], "with the price -0.01"),
        ([offer(price=float("nan"))], "with the price nan"),
        ([offer(price=float("inf"))], "with the price inf"),
        ([offer(resources=None)], "no MachineResources"),
    ],
)
async def test_offers_that_break_the_contract_leave_their_backend_out(offers: object, words: str) -> None:
    """The plan shows the bug in the place of the offers."""
    (listing,) = await toy_hub(Toy(offers=offers)).list_offers(ANY, timeout=20)
    assert isinstance(listing.error, PluginBug)
    assert words in str(listing.error)
    assert len(listing.offers) == 0


async def test_offers_may_come_from_a_generator_and_one_that_raises_is_a_bug() -> None:
    """What is not a list but can be gone through is gone through, in the backend's thread."""

    def some(_: Requirements) -> Iterator[Any]:
        yield offer()
        raise RuntimeError("half way")

    hub = toy_hub(Toy(offers=lambda _: (offer() for _ in range(3))))
    assert len((await hub.list_offers(ANY, timeout=20))[0].offers) == 3
    (listing,) = await toy_hub(Toy(offers=some)).list_offers(ANY, timeout=20)
    assert isinstance(listing.error, PluginBug)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (raising(RuntimeError("no network")), "RuntimeError: no network"),
        (SimpleNamespace(), "does not implement dstack_list_offers, dstack_create_instance"),
    ],
)
async def test_a_factory_that_fails_is_a_bug_of_its_backend(backend: object, words: str) -> None:
    """It is run at first use, and again at the next, in case that the cause has gone."""
    hub = toy_hub(backend)
    with pytest.raises(PluginBug, match=words):
        await hub.get_instance(REF)
    prepared["toy"] = Toy()
    assert await hub.get_instance(REF) is None


async def test_a_factory_may_refuse_with_an_instruction() -> None:
    """Missing credentials are noticed when the client object is made."""
    with pytest.raises(AuthenticationError, match="run aws configure"):
        await toy_hub(raising(AuthenticationError("run aws configure"))).list_instances("toy", OWNER)


async def test_a_factory_that_does_not_exist_is_a_bug() -> None:
    """Module or attribute: both say which."""
    for factory in ("no_such_module_at_all:x", "tests.support.toys:nothing.here"):
        (listing,) = await hub_of(Point("toy", plugin(info(factory=factory)))).list_offers(ANY, timeout=20)
        assert isinstance(listing.error, PluginBug)
        assert factory in str(listing.error)


@pytest.mark.parametrize("hook", ask_all(None))
async def test_a_hook_that_does_not_return_is_given_up(hook: str, never: threading.Event) -> None:
    """Where something may have changed, the outcome is unknown; elsewhere it is the plugin's bug."""
    wait = lambda *_: never.wait()
    toy = ToyWithAll(created=wait, got=wait, listed=wait, terminated=wait, problems=wait, connected=wait)
    with pytest.raises((PluginBug, UnknownOutcomeError), match=r"within 0\.2 s") as caught:
        await ask_all(toy_hub(toy, hook_timeout=0.2))[hook]()
    unknown = hook in ("dstack_create_instance", "dstack_terminate_instance")
    assert isinstance(caught.value, UnknownOutcomeError) == unknown


async def test_a_backend_that_hangs_delays_nobody_else_and_its_calls_are_bounded(never: threading.Event) -> None:
    """Its threads are few and stay few: further calls are refused as never started, for certain."""
    prepared["toy"], prepared["other"] = Toy(created=lambda _: never.wait()), Toy(got=None)
    hub = hub_of(Point("x", plugin(info(hook_timeout=0.2, max_concurrency=2), info("other"))))
    kinds = []
    for _ in range(4):
        with pytest.raises(BackendError) as caught:
            await hub.create_instance("toy", request())
        kinds.append(type(caught.value))
    assert kinds == [UnknownOutcomeError, UnknownOutcomeError, RateLimitedError, RateLimitedError]
    assert await hub.get_instance(InstanceRef(backend="other", id="i", region="r")) is None
    assert sum(thread.name == "dstack-toy" for thread in threading.enumerate()) >= 2


async def test_a_slow_backend_is_named_as_late_and_the_others_are_there(never: threading.Event) -> None:
    """A plan waits only so long."""
    prepared["toy"] = Toy(offers=lambda _: never.wait() and [])
    prepared["other"] = Toy(offers=[offer(backend="other")])
    hub = hub_of(Point("x", plugin(info(), info("other"))))
    (other, toy) = await hub.list_offers(ANY, timeout=1.0)
    assert (other.backend, len(other.offers), other.late) == ("other", 1, False)
    assert (toy.backend, len(toy.offers), toy.late) == ("toy", 0, True)
    assert "did not answer within 1 s" in str(toy.error)


def test_a_hook_that_hangs_does_not_keep_the_program_from_ending() -> None:
    """Its thread is a daemon: the server exits although the hook never returns."""
    program = """
        import asyncio, threading
        from tests.support.toys import Toy, request, toy_hub
        hub = toy_hub(Toy(created=lambda _: threading.Event().wait()), hook_timeout=0.2)
        try:
            asyncio.run(hub.create_instance("toy", request()))
        except Exception as error:
            print(type(error).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "UnknownOutcomeError\n"


async def test_a_hook_that_answers_after_its_server_has_gone_does_no_harm(never: threading.Event) -> None:
    """The loop that waited is closed when the answer comes: nobody is told, and nothing is raised."""
    import asyncio

    hub = toy_hub(Toy(created=lambda asked: never.wait() and instance(asked)), hook_timeout=0.2)

    def serve_and_stop() -> None:
        with pytest.raises(UnknownOutcomeError):
            asyncio.run(hub.create_instance("toy", request()))

    await asyncio.to_thread(serve_and_stop)
    late = [thread for thread in threading.enumerate() if thread.name == "dstack-toy"]
    never.set()
    for thread in late:
        await asyncio.to_thread(thread.join, 30)


async def test_optional_hooks_are_detected_not_declared() -> None:
    """Without them there is no problem to report, and the endpoint is the one that the instance has."""
    there = Endpoint(ssh_host="10.0.0.1")
    hub = toy_hub(Toy())
    assert await hub.check_config("toy") == []
    assert await hub.connect(instance(endpoint=there)) == there
    assert await hub.connect(instance()) is None
    hub = toy_hub(ToyWithAll(problems=["no quota"], connected=there))
    assert await hub.check_config("toy") == ["no quota"]
    assert await hub.connect(instance()) == there
    (status,) = await hub.status(check=True)
    assert status.problems == ("no quota",)


async def test_a_check_that_fails_is_shown_as_a_problem() -> None:
    """`dstack backends --check` shows what went wrong instead of failing."""
    (status,) = await toy_hub(ToyWithAll(problems=raising(AuthenticationError("expired")))).status(check=True)
    assert status.problems == ("expired",)


async def test_looking_for_hooks_runs_no_property() -> None:
    """A property of a backend may well open a connection."""

    class Careful(Toy):
        @property
        def client(self) -> object:
            raise RuntimeError("was opened")

    assert await toy_hub(Careful()).get_instance(REF) is None


async def test_a_misspelt_hook_of_a_backend_names_the_one_that_was_meant() -> None:
    """Pluggy alone would pass over it in silence."""

    class Misspelt(Toy):
        @hookimpl
        def dstack_check_configs(self) -> list[str]:
            return []

    with pytest.raises(PluginBug, match="Did you mean 'dstack_check_config'"):
        await toy_hub(Misspelt()).get_instance(REF)


async def test_secrets_do_not_appear_in_messages() -> None:
    """The configuration that a factory choked on is not shown."""
    assert "s3cret" not in repr(ToyConfig(key="s3cret"))  # type: ignore[arg-type]  # validated into a SecretStr


async def test_instances_of_all_owners_are_listed_where_a_backend_can() -> None:
    """`None` for one that cannot tell, and a bug where it tells nonsense."""
    other = instance(owner=uuid4())
    assert await toy_hub(ToyWithAll(everybody=[other])).list_all_instances("toy") == [other]
    assert await toy_hub(Toy()).list_all_instances("toy") is None
    with pytest.raises(PluginBug, match="dstack_list_all_instances"):
        await toy_hub(ToyWithAll(everybody=["i-1"])).list_all_instances("toy")


def test_calls_that_follow_each_other_share_a_thread() -> None:
    """Starting one costs more than most calls; one that is at work is not waited for."""
    threads, seen, held = _Threads(), list[int](), threading.Event()

    def shared() -> bool:
        done = threading.Event()

        def work() -> None:
            seen.append(threading.get_ident())
            done.set()

        threads.run("dstack-toy", work)
        assert done.wait(30)
        return len(set(seen)) < len(seen)

    threads.run("dstack-toy", held.wait)  # type: ignore[arg-type]  # what it returns is nobody's business
    wait_until(shared, what="a thread that is used again")
    held.set()
