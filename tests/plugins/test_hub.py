"""Discovery, configuration, refresh, listings and wrappers."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dstack_core._backends import BackendEntry, BackendHub, _listings, load_server_config
from dstack_core.errors import (
    AuthenticationError,
    BackendNotInstalledError,
    ConfigurationError,
    InvalidRequestError,
    PluginBug,
    RateLimitedError,
    UnknownOutcomeError,
)
from dstack_core.plugin import InstanceRef, Offer, Range, Requirements, hookimpl
from tests.support.toys import (
    OWNER,
    Point,
    Toy,
    hub_of,
    info,
    install,
    noting,
    offer,
    plugin,
    prepared,
    request,
    toy_hub,
    uninstall,
)

pytestmark = pytest.mark.anyio

ANY = Requirements()
REF = InstanceRef(backend="toy", id="i-1", region="r")

TOY_SOURCE = """
from tests.support.toys import info
from dstack_core.plugin import hookimpl

@hookimpl
def dstack_register_backends():
    return [info(default_config=None)]
"""


HIDE_ALL_SOURCE = """
from dstack_core.plugin import hookimpl

@hookimpl(wrapper=True)
def dstack_list_offers():
    yield
    return []
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the import path into which packages can be installed."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    yield path
    for module in ("toy_module", "hide_all", "another_module"):
        sys.modules.pop(module, None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a server's configuration would be."""
    return tmp_path / "config.yml"


def write(config: Path, backends: str) -> None:
    """A configuration with these backends, in flow style."""
    config.write_text(f"projects:\n- name: main\n  backends: {backends}\n")


async def test_installed_configured_and_missing_backends_are_told_apart(site: Path, config: Path) -> None:
    """Through real metadata: what is installed, what is configured, and the pip line for what is not there."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    write(config, "[{type: nowhere}]")
    hub = BackendHub.open(config)
    states = {status.name: status for status in await hub.status()}
    assert states["toy"].state == "not_configured"
    assert (states["toy"].distribution, states["toy"].version, states["toy"].path) == ("dstack-toy", "1.0", str(site))
    assert "- type: toy" in str(states["toy"].reason)
    assert states["nowhere"].state == "not_installed"
    assert states["nowhere"].reason == "Backend 'nowhere' is not installed. Install it with: pip install dstack-nowhere"


async def test_a_backend_that_is_not_there_refuses_for_certain_but_concludes_nothing(config: Path) -> None:
    """Creating is a definite refusal; about existing instances nothing is known until it is installed again."""
    hub = hub_of(entries=(BackendEntry("aws", {"type": "aws"}),))
    assert isinstance(hub.problem("aws"), BackendNotInstalledError)
    with pytest.raises(InvalidRequestError, match="pip install dstack-aws"):
        await hub.create_instance("aws", request())
    for ask in (hub.get_instance, hub.terminate_instance):
        with pytest.raises(UnknownOutcomeError, match="pip install dstack-aws"):
            await ask(InstanceRef(backend="aws", id="i", region="r"))
    (aws, gcp) = await hub.list_offers(ANY, timeout=5, only=["aws", "gcp"])
    assert "pip install dstack-aws" in str(aws.error)
    assert "pip install dstack-gcp" in str(gcp.error)
    assert hub.names() == []
    assert hub.info("aws").visibility_window == 60


async def test_a_package_that_is_installed_later_is_seen_without_a_restart(site: Path, config: Path) -> None:
    """`refresh` notices the new metadata and the changed configuration."""
    write(config, "[{type: toy}]")
    hub = BackendHub.open(config)
    assert {status.name: status.state for status in await hub.status()}["toy"] == "not_installed"
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    await hub.refresh()
    assert "toy" in hub.names()


async def test_a_backend_that_failed_to_load_is_tried_again_when_something_changed(site: Path, config: Path) -> None:
    """A repaired package works after the next refresh; until then its own reason is shown, not a pip line."""
    install(site, "dstack-toy", "toy_module", "import no_such_module_anywhere")
    write(config, "[{type: toy}]")
    hub = BackendHub.open(config)
    assert "no_such_module_anywhere" in str(hub.problem("toy"))
    assert [status.state for status in await hub.status() if "toy" in status.name] == ["failed"]
    install(site, "dstack-toy", "toy_module", TOY_SOURCE + "# repaired")
    install(site, "another-package", "another_module", "")
    await hub.refresh()
    assert hub.problem("toy") is None


async def test_a_backend_that_leaves_the_configuration_still_ends_its_instances(site: Path, config: Path) -> None:
    """No new work, but whoever made an instance must be able to terminate it."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    prepared["toy"] = Toy()
    write(config, "[{type: toy}]")
    hub = BackendHub.open(config)
    await hub.get_instance(REF)
    write(config, "[]")
    await hub.refresh()
    assert "toy" not in hub.names()
    assert "toy" in hub.reachable()
    assert (hub.was_removed("toy"), hub.was_removed("never-there")) == (True, True)
    await hub.terminate_instance(REF)
    with pytest.raises(InvalidRequestError, match="not configured"):
        await hub.create_instance("toy", request())
    write(config, "[{type: toy, regions: [r1]}]")
    await hub.refresh()
    assert "toy" in hub.names()
    assert not hub.was_removed("toy")


async def test_changed_configuration_makes_a_new_backend_and_unchanged_keeps_the_old(site: Path, config: Path) -> None:
    """The factory runs again for new values only."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    made: list[Any] = []
    prepared["toy"] = noting(made, Toy())
    write(config, "[{type: toy, regions: [r1]}]")
    hub = BackendHub.open(config)
    for regions in ("[r1] ", "[r2]", "[r2]  "):
        await hub.get_instance(REF)
        write(config, f"[{{type: toy, regions: {regions}}}]")
        await hub.refresh()
    await hub.get_instance(REF)
    assert [config.regions for config in made] == [("r1",), ("r2",)]


async def test_a_broken_file_is_said_aloud_and_what_was_configured_goes_on(site: Path, config: Path) -> None:
    """A typing error in the configuration of a running server stops no run."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    prepared["toy"] = Toy()
    write(config, "[{type: toy}]")
    hub = BackendHub.open(config)
    write(config, "[")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"config\.yml, line 4"):
            await hub.refresh()
    assert await hub.get_instance(REF) is None
    with pytest.raises(ConfigurationError):
        BackendHub.open(config)
    write(config, "[{type: toy} ]")
    await hub.refresh()


async def test_refresh_costs_nothing_when_nothing_changed(config: Path) -> None:
    """No entry point is looked at again."""
    looked: list[str] = []

    def look(group: str) -> list[Point]:
        looked.append(group)
        return []

    hub = BackendHub.open(config, entry_points=look)
    await hub.refresh()
    await hub.refresh()
    assert looked == ["dstack.backends"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "{type: toy, region: [r1]}",
            r"line 3, projects\[0\]\.backends\[0\]\.region: unknown key 'region'. Did you mean 'regions'",
        ),
        ("{type: toy, regions: 5}", r"line 3, projects\[0\]\.backends\[0\]\.regions: input should be a valid tuple"),
        ("{type: toy, key: [hunter2]}", r"backends\[0\]\.key: input should be a valid string"),
    ],
)
async def test_an_entry_that_its_backend_cannot_use_names_file_line_key_and_cure(
    site: Path, config: Path, entry: str, words: str
) -> None:
    """The backend is shown as failed with that reason, and no value, which may be a secret, is repeated."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    write(config, f"[{entry}]")
    hub = BackendHub.open(config)
    (status,) = [status for status in await hub.status() if status.name == "toy"]
    assert status.state == "failed"
    assert str(config) in str(status.reason)
    with pytest.raises(ConfigurationError, match=words):
        raise hub.problem("toy") or AssertionError
    assert "hunter2" not in str(status.reason)
    with pytest.raises(InvalidRequestError, match=words):
        await hub.create_instance("toy", request())


async def test_a_plugin_can_be_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable gets one out of the way that cannot be uninstalled now."""
    monkeypatch.setenv("DSTACK_DISABLE_PLUGINS", "toy, another")
    hub = hub_of(Point("toy", plugin(info())))
    assert hub.names() == []
    (status,) = await hub.status()
    assert "DSTACK_DISABLE_PLUGINS" in str(status.reason)


# -- listings --------------------------------------------------------------------------------------------------------


class Clock:
    """Monotonic seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def counting(calls: list[Requirements]) -> Toy:
    """A backend that notes what it was asked."""
    return Toy(offers=noting(calls, [offer()]))


def listing_hub(toy: Toy, clock: Clock, **facts: Any) -> BackendHub:
    """A hub with a toy whose listings are good for ten seconds."""
    prepared["toy"] = toy
    return hub_of(Point("toy", plugin(info(**{"offers_ttl": 10.0, **facts}))), clock=clock)


async def test_a_listing_is_used_again_while_it_is_good() -> None:
    """For the same requirements, and as long as the backend declared."""
    calls: list[Requirements] = []
    clock = Clock()
    hub = listing_hub(counting(calls), clock)
    await hub.list_offers(ANY, timeout=20)
    await hub.list_offers(Requirements(), timeout=20)
    assert len(calls) == 1
    await hub.list_offers(Requirements(cpus=Range(min=2)), timeout=20)
    assert len(calls) == 2
    clock.now = 10.0
    await hub.list_offers(ANY, timeout=20)
    assert len(calls) == 3


async def test_those_who_ask_for_the_same_at_once_share_one_call() -> None:
    """Two hundred tasks submitted together ask a cloud once; where offers change with each run, each asks."""
    calls: list[Requirements] = []
    hub = listing_hub(counting(calls), Clock())
    await asyncio.gather(*(hub.list_offers(ANY, timeout=20) for _ in range(20)))
    assert len(calls) == 1
    hub = listing_hub(counting(calls), Clock(), offers_ttl=0.0)
    await asyncio.gather(*(hub.list_offers(ANY, timeout=20) for _ in range(3)))
    assert len(calls) == 4


async def test_an_older_listing_stands_in_when_the_cloud_is_busy_or_slow() -> None:
    """Rate limits and slowness do not empty a plan; wrong credentials do."""
    clock, event = Clock(), threading.Event()
    answers: Iterator[Any] = iter([lambda: [offer()], _raises(RateLimitedError("slow down")), event.wait])
    hub = listing_hub(Toy(offers=lambda _: next(answers)()), clock)
    for late in (False, False, True):
        (listing,) = await hub.list_offers(ANY, timeout=1.0 if late else 20)
        assert (len(listing.offers), listing.error, listing.late) == (1, None, late)
        clock.now += 60
    event.set()
    hub = listing_hub(Toy(offers=_raises(AuthenticationError("expired"))), clock)
    (listing,) = await hub.list_offers(ANY, timeout=20)
    assert isinstance(listing.error, AuthenticationError)


async def test_a_late_answer_serves_the_next_call() -> None:
    """What a slow backend says at last is not thrown away."""
    event = threading.Event()
    hub = listing_hub(Toy(offers=lambda _: event.wait() and [offer()]), Clock())
    (listing,) = await hub.list_offers(ANY, timeout=0.1)
    assert listing.late
    event.set()
    (listing,) = await hub.list_offers(ANY, timeout=20)
    assert len(listing.offers) == 1


async def test_kept_listings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are given up, the newest is kept however large it is."""
    monkeypatch.setattr(_listings, "CACHED_OFFERS", 350)
    calls: list[Requirements] = []
    hub = listing_hub(counting(calls), Clock())
    asked = [Requirements(cpus=Range(min=number)) for number in range(5)]
    for requirements in asked:
        await hub.list_offers(requirements, timeout=20)
    await hub.list_offers(asked[-1], timeout=20)
    assert len(calls) == 5
    await hub.list_offers(asked[0], timeout=20)
    assert len(calls) == 6


async def test_a_machine_that_exists_is_not_asked_for_what_nobody_set() -> None:
    """Defaults size machines that are made to order; the listing relaxes requirements in the same way."""
    calls: list[Requirements] = []
    wanted = Requirements(cpus=Range(min=2), memory_mib=Range(min=8192), unset=frozenset({"memory_mib"}))
    hub = listing_hub(counting(calls), Clock(), existing_machines=True)
    (listing,) = await hub.list_offers(wanted, timeout=20)
    assert calls[0].memory_mib == Range(min=0)
    assert calls[0].cpus == Range(min=2)
    assert listing.relaxed(wanted) == calls[0]
    hub = listing_hub(counting(calls), Clock())
    (listing,) = await hub.list_offers(wanted, timeout=20)
    assert listing.relaxed(wanted) == calls[1] == wanted


# -- wrappers --------------------------------------------------------------------------------------------------------


def wrapper(hook: str, body: Any) -> SimpleNamespace:
    """A plugin whose wrapper of a hook is this generator function."""
    return SimpleNamespace(**{hook: hookimpl(wrapper=True)(body)})


async def test_a_wrapper_applies_to_every_backend_and_knows_which_one() -> None:
    """It sees the arguments by name, the name of the backend included, and changes the answer."""
    seen: list[str] = []

    def dstack_list_offers(backend: str, requirements: Requirements) -> Any:
        seen.append(backend)
        offers = yield
        return [one for one in offers if one.price < 1]

    prepared["toy"] = Toy(offers=[offer(), offer(price=0.5)])
    prepared["other"] = Toy(offers=[offer(backend="other", price=0.1)])
    points = Point("cap", wrapper("dstack_list_offers", dstack_list_offers)), Point("x", plugin(info(), info("other")))
    (other, toy) = await hub_of(*points).list_offers(ANY, timeout=20)
    assert sorted(seen) == ["other", "toy"]
    assert [one.price for one in (*other.offers, *toy.offers)] == [0.1, 0.5]


async def test_only_one_backend_answers_and_wrappers_nest_in_the_order_of_their_names() -> None:
    """Each call goes to one backend through all the wrappers."""
    order: list[str] = []

    def named(name: str) -> SimpleNamespace:
        def dstack_list_instances(owner: object) -> Any:
            order.append(name)
            return (yield)

        return wrapper("dstack_list_instances", dstack_list_instances)

    prepared["toy"] = Toy(listed=noting(order, [], "toy"))
    prepared["other"] = Toy(listed=noting(order, [], "other"))
    hub = hub_of(Point("b", named("b")), Point("a", named("a")), Point("x", plugin(info(), info("other"))))
    await hub.list_instances("toy", OWNER)
    await hub.list_instances("other", OWNER)
    assert [name for name in order if name in ("toy", "other")] == ["toy", "other"]
    assert order[:2] == order[3:5] == ["b", "a"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_wrapper_that_raises_is_named_not_the_backend(when: str) -> None:
    """And it fails closed: a cap that is broken lets nothing through."""

    def dstack_list_offers() -> Any:
        if when == "before":
            raise RuntimeError("cap is broken")
        yield
        raise RuntimeError("cap is broken")

    prepared["toy"] = Toy()
    cap = Point("cap", wrapper("dstack_list_offers", dstack_list_offers), distribution="price-cap")
    (listing,) = await hub_of(cap, Point("x", plugin(info()))).list_offers(ANY, timeout=20)
    assert isinstance(listing.error, PluginBug)
    assert (listing.error.plugin, listing.error.version) == ("cap", "price-cap 1.0")
    assert len(listing.offers) == 0


async def test_a_backend_that_raises_inside_a_wrapper_is_named_not_the_wrapper() -> None:
    """The innermost of the two is to blame."""

    def dstack_get_instance() -> Any:
        return (yield)

    prepared["toy"] = Toy(got=_raises(ValueError("mine")))
    with pytest.raises(PluginBug, match="mine") as caught:
        await hub_of(
            Point("w", wrapper("dstack_get_instance", dstack_get_instance)), Point("x", plugin(info()))
        ).get_instance(REF)
    assert caught.value.plugin == "toy"


async def test_a_wrapper_may_refuse_and_what_it_makes_of_an_answer_is_checked() -> None:
    """Its instructions count as the backend's own; nonsense is a bug."""

    def dstack_create_instance(request: Any) -> Any:
        if request.tags.get("team") != "ml":
            raise InvalidRequestError("every instance needs a team")
        yield
        return "created"

    hub = toy_hub(Toy())
    hub = hub_of(Point("w", wrapper("dstack_create_instance", dstack_create_instance)), Point("x", plugin(info())))
    with pytest.raises(InvalidRequestError, match="needs a team"):
        await hub.create_instance("toy", request())
    with pytest.raises(PluginBug, match="returned a str instead of Instance"):
        await hub.create_instance("toy", request(tags={"team": "ml"}))


async def test_a_wrapper_that_is_uninstalled_applies_no_more(site: Path, config: Path) -> None:
    """As everything that is uninstalled, after the next refresh."""
    install(site, "dstack-toy", "toy_module", TOY_SOURCE)
    install(site, "hide-all", "hide_all", HIDE_ALL_SOURCE)
    prepared["toy"] = Toy()
    write(config, "[{type: toy}]")
    hub = BackendHub.open(config)
    assert len((await hub.list_offers(ANY, timeout=20, only=["toy"]))[0].offers) == 0
    uninstall(site, "hide-all")
    await hub.refresh()
    assert len((await hub.list_offers(ANY, timeout=20, only=["toy"]))[0].offers) == 1


async def test_hooks_can_be_run_inline_for_a_simulator() -> None:
    """The seam: no thread is made, not even for loading."""

    async def inline(key: str, limit: int, timeout: float, function: Any) -> Any:
        return function()

    threads: set[str] = set()

    def offers(_: Requirements) -> list[Offer]:
        threads.add(threading.current_thread().name)
        return [offer()]

    prepared["toy"] = Toy(offers=offers)
    hub = hub_of(Point("toy", plugin(info())), call=inline, load_timeout=None)
    await hub.list_offers(ANY, timeout=20)
    assert threads == {threading.current_thread().name}


def test_the_configuration_of_this_process_is_untouched() -> None:
    """A missing file is one project without entries."""
    config = load_server_config(Path(os.devnull).parent / "no-such-file.yml")
    assert dict(config.projects) == {"main": ()}


def _raises(error: Exception) -> Any:
    def raises(*_: object) -> Any:
        raise error

    return raises


async def test_a_backend_that_cannot_mark_its_instances_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is offered or created where a lost instance could not be found, unless the user says so."""
    toy = Toy()
    hub = toy_hub(toy, ownership="none")
    (listing,) = await hub.list_offers(ANY, timeout=20)
    assert "DSTACK_ALLOW_UNMARKED=1" in str(listing.error)
    with pytest.raises(InvalidRequestError, match="cannot mark"):
        await hub.create_instance("toy", request())
    monkeypatch.setenv("DSTACK_ALLOW_UNMARKED", "1")
    (listing,) = await hub.list_offers(ANY, timeout=20)
    assert listing.error is None
