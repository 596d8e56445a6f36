"""What a case works with: the cloud, the backend, requests, the truth; and the one who cleans up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import EntryPoint
from math import inf
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, SecretStr

from dstack_core.plugin import (
    BackendConfig,
    BackendError,
    BackendInfo,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    NoCapacityError,
    Offer,
    Requirements,
)
from dstack_core.testing import _loading
from dstack_core.testing._clouds import Booting, Faulty, Server, Truthful
from dstack_core.testing._suite import _requests
from dstack_core.testing._suite._calls import Backend
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._money import Meter, OverCap
from dstack_core.testing._wait import wait_until

_TRIED = 5

T = TypeVar("T")


class Rig:
    """One case's workplace.

    Args:
        point: the entry point that brings the backend.
        name: the backend's name.
        cloud: the cloud under test.
        folder: for files of its own.
        meter: counts the money, for a live account.

    Attributes:
        owner: the owner of what this case makes; each case has one of its own.
    """

    def __init__(self, point: EntryPoint, name: str, cloud: Any, folder: Path, meter: Meter | None) -> None:
        self.point = point
        self.name = name
        self.cloud = cloud
        self.folder = folder
        self.meter = meter
        self.owner = uuid4()
        self._owners: list[UUID] = []
        self._asked: dict[UUID, float] = {}
        self._made: list[Backend] = []
        self._known: dict[str, Instance] = {}
        self._before = {server.id for server in cloud.truth().servers} if isinstance(cloud, Truthful) else set()

    # -- the backend ------------------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> BackendInfo:
        """What the package declares."""
        return _loading.info(self.point, self.name)

    @cached_property
    def config(self) -> BackendConfig:
        """The configuration, validated."""
        return self.info.config.model_validate({"type": self.name, **self.cloud.config()})

    @cached_property
    def backend(self) -> Backend:
        """The object that the case works with."""
        return self.another()

    def another(self, config: BackendConfig | None = None) -> Backend:
        """One more object of the backend, as another process would have it."""
        made = _loading.factory(self.info)(config or self.config)
        hooks = _loading.hooks_of(made)
        missing = [hook for hook in _loading.REQUIRED if hook not in hooks]
        expect(
            not missing,
            "factory",
            f"what {self.info.factory} returned lacks hooks",
            expected="an object with the five hooks of a backend, each marked with @hookimpl",
            got=f"no {', '.join(missing)}",
            cure="implement them, and put @hookimpl above each",
        )
        backend = Backend(self.info, hooks, made)
        self._made.append(backend)
        return backend

    @cached_property
    def secrets(self) -> list[str]:
        """The secret values of the configuration, those in inner models included."""
        return list(secrets_in(self.config))

    # -- asking for instances ---------------------------------------------------------------------------------------

    @cached_property
    def offers(self) -> list[Offer]:
        """Those worth trying, on demand before spot, cheapest first."""
        found = [offer for offer in self.backend.offers(Requirements()) if offer.availability.worth_trying]
        expect(
            found,
            "offers-any",
            "nothing is offered that could be had",
            expected='at least one offer that is worth trying, with everything "any"',
            got="none",
            cure="offer what the cloud sells in the configured regions; UNKNOWN is right where the cloud does not say",
        )
        return sorted(found, key=lambda offer: (offer.spot, offer.price))

    @property
    def offer(self) -> Offer:
        """The cheapest."""
        return self.offers[0]

    def request(self, offer: Offer | None = None, *, owner: UUID | None = None, intent: UUID | None = None) -> Any:
        """A request as the engine renders it, for a new intent unless one is given."""
        owner, intent = owner or self.owner, intent or _requests.new_intent()
        return _requests.render(owner, intent, offer or self.offer, self._agent_command)

    @cached_property
    def _agent_command(self) -> tuple[str, ...]:
        # What the engine would send, so from where it has it.
        from dstack_core._transport import agent_command, build_agent

        return agent_command(build_agent(self.folder / "agent"))

    def start(self, offer: Offer | None = None, *, owner: UUID | None = None) -> Instance:
        """An instance of a new intent. If the cheapest cannot be had now, the next ones are tried."""
        for candidate in [offer] if offer else self.offers[:_TRIED]:
            with suppress(NoCapacityError):
                return self.create(self.request(candidate, owner=owner))
        pytest.skip("the cloud has no capacity for the cheapest offers now")

    def create(self, request: InstanceRequest, backend: Backend | None = None) -> Instance:
        """Asks for an instance, and remembers to end it."""
        __tracebackhide__ = True
        self.expect_to_end(request)
        instance = (backend or self.backend).create(request)
        self.know(instance)
        return instance

    def know(self, *instances: Instance) -> None:
        """These exist, so they are ended when the case is over."""
        for instance in instances:
            self._known[instance.ref.id] = instance
            self._asked.pop(instance.intent, None)

    def expect_to_end(self, *requests: InstanceRequest) -> None:
        """Whatever becomes of these requests will be ended; counts what they cost. Skips the case over the cap."""
        for request in requests:
            if request.owner not in self._owners:
                self._owners.append(request.owner)
            self._asked[request.intent] = time.monotonic()
            if self.meter is not None:
                self._count(request)

    def afford(self, count: int) -> None:
        """Skips the case if so many of the cheapest instances would go over the cap."""
        if self.meter is not None:
            try:
                self.meter.afford(self.offer.price, count)
            except OverCap as problem:
                pytest.skip(str(problem))

    def _count(self, request: InstanceRequest) -> None:
        assert self.meter is not None  # noqa: S101  # for type checkers; the caller has looked
        try:
            self.meter.start(request.owner, request.intent, request.offer.price)
        except OverCap as problem:
            pytest.skip(str(problem))

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds for a machine to get somewhere."""
        return (
            self.info.provisioning_timeout if not isinstance(self.cloud, Faulty) else min(30.0, self.info.hook_timeout)
        )

    def state(self, ref: InstanceRef, backend: Backend | None = None) -> InstanceState:
        """What the backend says; an instance that is unknown is gone."""
        known = (backend or self.backend).get(ref)
        return known.state if known else InstanceState.TERMINATED

    def until(
        self,
        condition: Callable[[], T | None],
        key: str,
        what: str,
        *,
        expected: str,
        cure: str,
        within: float | None = None,
    ) -> T:
        """Waits for a condition, and fails the case if it does not come true."""
        __tracebackhide__ = True
        try:
            found = wait_until(condition, timeout=self.patience if within is None else within, what=what)
        except TimeoutError as problem:
            fail(key, what, expected=expected, got=str(problem), cure=cure)
        assert found is not None  # noqa: S101  # for type checkers: it is true
        return found

    def running(self, instance: Instance) -> Instance:
        """Waits until it runs."""
        __tracebackhide__ = True

        def runs() -> Instance | None:
            known = self.backend.get(instance.ref)
            return known if known is not None and known.state is InstanceState.RUNNING else None

        return self.until(
            runs,
            "running",
            "an instance that was created never runs",
            expected=f"RUNNING within {self.patience:g} s",
            cure="map the cloud's states: what it calls started or active is RUNNING",
        )

    def new_servers(self) -> list[Server]:
        """The servers that came into being since the case began, ended ones included."""
        return [server for server in self.cloud.truth().servers if server.id not in self._before]

    def servers_of(self, intent: UUID) -> list[Server]:
        """Those that carry an intent."""
        return [server for server in self.new_servers() if server.intent == intent]

    def forget_new_servers(self) -> None:
        """What is there now counts as having been there before."""
        self._before = {server.id for server in self.cloud.truth().servers}

    # -- faults -----------------------------------------------------------------------------------------------------

    @contextmanager
    def failing(self, *args: Any, **options: Any) -> Iterator[Any]:
        """The cloud's calls fail inside; see `Faulty.fail`."""
        failure = self.cloud.fail(*args, **options)
        try:
            yield failure
        finally:
            self.cloud.heal()

    # -- cleaning up ------------------------------------------------------------------------------------------------

    def end(self, instance: Instance) -> None:
        """Terminates and waits until it is gone."""
        __tracebackhide__ = True
        self.backend.terminate(instance.ref)
        self.until(
            lambda: self.state(instance.ref) is InstanceState.TERMINATED,
            "end",
            "an instance was terminated and is not gone",
            expected=f"TERMINATED, or None from dstack_get_instance, within {self.patience:g} s",
            cure="ask the cloud for the end of the server itself, and map what it calls deleted or gone to TERMINATED",
        )

    def end_unmarked(self, instance: Instance) -> None:
        """Terminates what has no tags any more, and goes by the cloud's own word for its end."""
        __tracebackhide__ = True
        del self._known[instance.ref.id]
        self.backend.terminate(instance.ref)
        self.until(
            lambda: not any(server.billed for server in self.cloud.truth().servers if server.id == instance.ref.id),
            "end",
            "an instance without tags was terminated and is not gone",
            expected=f"its end within {self.patience:g} s",
            cure="terminate by the id in the reference alone",
        )

    def close(self) -> None:
        """Ends everything that the case made, and fails it if that cannot be confirmed."""
        __tracebackhide__ = True
        if isinstance(self.cloud, Faulty):
            self.cloud.heal()
        if isinstance(self.cloud, Booting):
            self.cloud.boot(0)
        try:
            if self._owners:
                self._clean(self.backend)
                self._nothing_left()
        finally:
            for backend in self._made:
                close = getattr(backend.made, "close", None)
                if callable(close):
                    close()

    def _clean(self, backend: Backend) -> None:
        """Terminates what the listing shows and what the case knows of, until nothing lives."""
        __tracebackhide__ = True
        deadline = time.monotonic() + max(self.info.visibility_window + 10, self.patience)
        if self.meter is not None:
            # What was asked for when the case was interrupted may show itself only now.
            shown = self.info.visibility_window + max(self._asked.values(), default=-inf)
            wait_until(lambda: time.monotonic() > shown, timeout=self.info.visibility_window + 10)
        for owner in self._owners:
            end_all(backend, owner, list(self._known.values()), deadline)
        if self.meter is not None:
            self.meter.end_all(self._owners)

    def _nothing_left(self) -> None:
        __tracebackhide__ = True
        if not isinstance(self.cloud, Truthful):
            return
        truth = self.cloud.truth()
        alive = [one for one in truth.servers if one.billed and one.owner in self._owners]
        left = [*(f"server {one.id} ({one.name})" for one in alive), *truth.leftovers]
        expect(
            not left,
            "end",
            "when everything was terminated, something was left that costs money",
            expected="nothing",
            got="; ".join(left),
            cure="delete with the server what was made for it, or make it so that the cloud does",
        )


def end_all(backend: Backend, owner: UUID, known: Iterable[Instance], deadline: float) -> None:
    """Terminates all instances of an owner, again and again, until none lives; fails after the deadline."""
    __tracebackhide__ = True
    refs = {instance.ref.id: instance.ref for instance in known if instance.owner == owner}
    problem = ""

    def lives(ref: InstanceRef) -> bool:
        found = backend.get(ref)
        return found is not None and found.state is not InstanceState.TERMINATED

    def none_lives() -> bool:
        nonlocal problem
        try:
            refs.update((one.ref.id, one.ref) for one in backend.listed(owner))
            living = [ref for ref in refs.values() if lives(ref)]
            for ref in living:
                backend.terminate(ref)
            problem = f"still there: {', '.join(ref.id for ref in living)}"
        except BackendError as error:
            problem = f"{type(error).__name__}: {error}"
            return False
        return not living

    try:
        wait_until(none_lives, timeout=max(1.0, deadline - time.monotonic()))
    except TimeoutError:
        fail(
            "end",
            "what the case had made could not be ended",
            expected=f"nothing of the owner {owner} lives",
            got=problem,
            cure="look at dstack_list_instances, dstack_get_instance and dstack_terminate_instance; in a live account, "
            "end by hand what carries this owner",
        )


def secrets_in(value: object) -> Iterator[str]:
    """The secrets in a configuration, however deep."""
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from secrets_in(getattr(value, field))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from secrets_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from secrets_in(inner)
