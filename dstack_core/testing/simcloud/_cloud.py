"""A cloud in memory."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID
from weakref import WeakValueDictionary

from dstack_core.plugin import (
    Availability,
    BackendConfig,
    BackendInfo,
    Endpoint,
    Gpu,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    MachineResources,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    StateReason,
    hookimpl,
)
from dstack_core.testing.simcloud._clock import SimClock
from dstack_core.testing.simcloud._faults import Faults, Hook, Kind
from dstack_core.testing.simcloud._machines import Script, SimMachine
from dstack_core.testing.simcloud._meter import Meter

Idempotency = Literal["token", "name", "tags"]
"""How a cloud keeps a repeated create call from making a second instance.

- `token`: it knows the request by its token, at once and for ever
- `name`: names are unique, so the second call finds the name taken, and the backend takes what has it
- `tags`: it does not; the backend looks through the listing first, which may lag behind
"""

Between = tuple[float, float]
"""The least and the most of something that is drawn anew each time."""

_NEVER = float("inf")
_RECENT = 3600.0
"""Seconds for which what has ended is still listed."""


@dataclass(frozen=True)
class SimType:
    """An instance type.

    Attributes:
        name: how it is called.
        resources: what such a machine has.
        price: USD per hour.
        spot_price: the same for spot; `None`: there is none.
    """

    name: str
    resources: MachineResources
    price: float
    spot_price: float | None = None


_SMALL = MachineResources(cpus=2, memory_mib=8 << 10, disk_mib=100 << 10)
_LARGE = MachineResources(cpus=8, memory_mib=32 << 10, disk_mib=100 << 10)
_GPU = MachineResources(cpus=8, memory_mib=32 << 10, disk_mib=100 << 10, gpus=(Gpu("L4", 24 << 10),))

TYPES = (
    SimType("small", _SMALL, 0.10, 0.04),
    SimType("large", _LARGE, 0.40, 0.16),
    SimType("gpu", _GPU, 1.00, 0.35),
)
REGIONS: Mapping[str, Sequence[str]] = {"east": ("a", "b"), "west": ("a",)}


@dataclass
class Weather:
    """How long things take, in seconds. Each is drawn anew, between the two numbers.

    Attributes:
        starts: from a create call until the instance has an address and runs.
        boots: from then on until its agent answers.
        list_lag: until a new instance shows in listings.
        get_lag: until a new instance can be asked for by its id.
        ends: from a terminate call to the end.
    """

    starts: Between = (0.0, 0.0)
    boots: Between = (0.0, 0.0)
    list_lag: Between = (0.0, 0.0)
    get_lag: Between = (0.0, 0.0)
    ends: Between = (0.0, 0.0)


@dataclass(eq=False)
class SimInstance:
    """An instance as the cloud itself sees it. Times are seconds on the cloud's clock.

    Attributes:
        id: the cloud's name for it.
        owner: whose it is.
        intent: what it was made for.
        type: the name of its `SimType`.
        region: where it is.
        zone: where in that region.
        spot: it may be taken away.
        price: USD per hour.
        address: where its agent answers.
        machine: what runs on it.
        created_at: when it was accepted, and the bill began.
        runs_at: when it has an address.
        listed_from: when listings begin to show it.
        known_from: from when on it can be asked for by its id.
        tags: what it was marked with when it was made.
        expires_at: when it ends by itself; infinity: never.
        ending_at: when its end began; infinity: not yet.
        ended_at: when it was over, and with it the bill; infinity: not yet.
        reason: why it ended.
        forgotten: the cloud does not know it any more.
    """

    id: str
    owner: UUID
    intent: UUID
    type: str
    region: str
    zone: str | None
    spot: bool
    price: float
    address: str
    machine: SimMachine
    created_at: float
    runs_at: float
    listed_from: float
    known_from: float
    tags: Mapping[str, str] = field(default_factory=dict)
    expires_at: float = _NEVER
    ending_at: float = _NEVER
    ended_at: float = _NEVER
    reason: StateReason | None = None
    forgotten: bool = False

    def end(self, begin: float, takes: float, reason: StateReason | None) -> None:
        """Begins its end; the earliest one wins."""
        if begin + takes < self.ended_at:
            self.ending_at, self.ended_at, self.reason = min(begin, self.ending_at), begin + takes, reason

    def settle(self, now: float) -> None:
        """Makes what happened meanwhile have happened: the dead man's switch, the end of its time."""
        off = min(self.machine.powers_off_at(), self.expires_at)
        if off <= now and off < self.ended_at:
            self.end(off, 0.0, StateReason.SHUTDOWN_FROM_INSIDE)

    def state(self, now: float) -> InstanceState:
        """As the cloud says it."""
        if now >= self.ended_at:
            return InstanceState.TERMINATED
        if now >= self.ending_at:
            return InstanceState.STOPPING
        return InstanceState.RUNNING if now >= self.runs_at else InstanceState.PENDING


class SimCloudConfig(BackendConfig):
    """Which cloud of this process a backend talks to.

    Attributes:
        type: the name of the backend.
        cloud: its `SimCloud.key`.
    """

    type: Literal["sim"] = "sim"
    cloud: str = ""


_CLOUDS: WeakValueDictionary[str, SimCloud] = WeakValueDictionary()


def connect(config: SimCloudConfig) -> SimCloud:
    """The factory of the backend: the cloud that a configuration names.

    Raises:
        LookupError: there is no such cloud in this process.
    """
    cloud = _CLOUDS.get(config.cloud)
    if cloud is None:
        raise LookupError(f"There is no SimCloud with the key {config.cloud!r} in this process.")
    return cloud


class SimCloud:
    """A cloud in memory, with prices, a bill, and everything that goes wrong with clouds, on a virtual clock.

    It is a backend itself: its methods `dstack_…` are the hooks, plain functions that return at once. How long a call
    takes is up to whoever calls. What it does is a function of its clock, its seed, and the calls.

    Args:
        clock: virtual time.
        seed: decides what is left to chance.
        key: names it in this process, for the configuration of its backend.
        types: what can be bought.
        regions: zones by region.
        idempotency: what a repeated create call does.
        page_size: how many instances a page of a listing has.
        rate: calls per second that are answered, with twice as many at once; `None` for no limit.
        grace: seconds after which a machine without a server powers itself off; `None`: never.
        script_of: what a job does, from its id and what its agent was asked for.

    Attributes:
        faults: what goes wrong.
        weather: how long things take.
        meter: the bill.
        instances: all that ever were, by id.
        reuse_addresses: a new instance gets the address of one that has ended.
        calls: how often each hook was called.
        trespasses: instances of others that somebody tried to terminate.
        watch: told in words of each call and what came of it.
    """

    def __init__(
        self,
        clock: SimClock,
        *,
        seed: int = 0,
        key: str = "",
        types: Sequence[SimType] = TYPES,
        regions: Mapping[str, Sequence[str]] = REGIONS,
        idempotency: Idempotency = "token",
        page_size: int = 50,
        rate: float | None = None,
        grace: float | None = 600.0,
        script_of: Callable[[str, Any], Script] = lambda _, __: Script(),
    ) -> None:
        self.clock = clock
        self.key = key
        self.idempotency = idempotency
        self.faults = Faults(seed=seed + 1)
        self.weather = Weather()
        self.meter = Meter()
        self.instances: dict[str, SimInstance] = {}
        self.reuse_addresses = False
        self.calls: Counter[str] = Counter()
        self.trespasses: list[str] = []
        self.watch: Callable[[str], None] = lambda _: None
        self._rng = random.Random(seed)  # noqa: S311  # reproducible on purpose
        self._types = {one.name: one for one in types}
        self._offers = list(_offers(types, regions))
        self._page_size = page_size
        self._bucket = _Bucket(rate)
        self._grace = grace
        self._script_of = script_of
        self._bodies: dict[UUID, str] = {}
        self._live: dict[str, SimInstance] = {}
        self._by_address: dict[str, list[SimInstance]] = {}
        self._by_intent: dict[UUID, list[SimInstance]] = {}
        _CLOUDS[key] = self

    # -- the backend -------------------------------------------------------------------------------------------------

    def info(self, **facts: Any) -> BackendInfo:
        """What this backend declares, with other facts where given."""
        declared: dict[str, Any] = {
            "name": "sim",
            "title": "SimCloud",
            "config": SimCloudConfig,
            "factory": f"{__name__}:connect",
            "default_config": SimCloudConfig(cloud=self.key),
            "native_idempotency": self.idempotency == "token",
            "offers_ttl": 0.0,
        }
        return BackendInfo(**{**declared, **facts})

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:  # noqa: ARG002  # the core filters
        """All that can be bought."""
        with self._call("offers", ""):
            return self._offers

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Makes an instance, once for each intent, as far as `idempotency` goes."""
        with self._call("create", request.intent) as fault:
            known = self._made_before(request)
            if known is not None and fault == "mismatch":
                self.faults.struck["create: mismatch"] += 1
                raise InvalidRequestError(f"simulated: the token of intent {request.intent} is one of another request")
            instance = known if known is not None else self._make(request)
            if known is None and fault == "late shortage":
                self.faults.struck["create: late shortage"] += 1
                self._give_up(instance)
            return self._describe(instance)

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """One instance; `None` if the cloud does not know it, yet or any more."""
        with self._call("get", ref.id):
            found = self.instances.get(ref.id)
            if found is None or found.forgotten or self.clock.time() < found.known_from:
                return None
            return self._describe(found)

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All instances of an owner, page by page, those that ended of late included."""
        with self._call("list", owner) as fault:
            pages = list(self._pages())
            if fault == "page lost" and len(pages) > 1:
                self.faults.after("list", fault)
            return [self._describe(one) for page in pages for one in page if one.owner == owner]

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the end of an instance."""
        with self._call("terminate", ref.id) as fault:
            found = self.instances.get(ref.id)
            if found is None or found.forgotten:
                return
            if found.tags.get("managed-by") != "dstack":
                self.trespasses.append(found.id)
            if fault == "ignored":
                self.faults.struck["terminate: ignored"] += 1
                return
            self._settle()
            if found.ending_at > self.clock.time():
                found.end(self.clock.time(), self._draw(self.weather.ends), StateReason.REQUESTED)

    # -- what happens in a cloud -------------------------------------------------------------------------------------

    def alive(self, owner: UUID | None = None) -> list[SimInstance]:
        """What is billed now, oldest first."""
        self._settle()
        return [one for one in self._live.values() if owner is None or one.owner == owner]

    def at(self, address: str) -> SimInstance | None:
        """The instance that has an address now."""
        # Agents are called more often than anything else: what has other addresses is not looked at.
        self._settle(self._by_address.get(address, ()))
        now = self.clock.time()
        return next((one for one in self._by_address.get(address, ()) if now >= one.runs_at), None)

    def interrupt(self, instance: SimInstance, notice: float = 120.0) -> None:
        """Takes a spot instance away, after a notice of so many seconds."""
        instance.end(self.clock.time(), notice, StateReason.SPOT_INTERRUPTION)
        self._settle()

    def kill(self, instance: SimInstance, *, forget: bool = False) -> None:
        """Ends an instance without a word. `forget`: the cloud does not know it any more, either."""
        instance.end(self.clock.time(), 0.0, StateReason.FAILURE)
        instance.forgotten = forget
        self._settle()

    def crash(self, instance: SimInstance) -> None:
        """Has a machine hang for ever, while the cloud says that it runs."""
        instance.machine.crashed_at = self.clock.time()
        instance.machine.tell()

    def lift_limits(self) -> None:
        """Answers any number of calls from now on."""
        self._bucket.lift()

    def add_foreign(self, owner: UUID, intent: UUID) -> SimInstance:
        """Puts an instance of somebody else into the account."""
        kind = next(iter(self._types.values()))
        offer = next(one for one in self._offers if one.instance_type == kind.name)
        return self._add(owner, intent, offer, {"owner": str(owner)}, _NEVER, None)

    # -- inside --------------------------------------------------------------------------------------------------

    def _call(self, hook: Hook, what: object) -> _Call:
        self.calls[hook] += 1
        wait = self._bucket.take(self.clock.time())
        if wait:
            self.faults.struck["rate limit"] += 1
            raise RateLimitedError("simulated: too many calls", retry_after=wait)
        return _Call(self, hook, what)

    def _made_before(self, request: InstanceRequest) -> SimInstance | None:
        body = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        if self.idempotency != "tags" and self._bodies.setdefault(request.intent, body) != body:
            raise InvalidRequestError(f"The token of intent {request.intent} was used with another request.")
        known = self._by_intent.get(request.intent, [])
        if self.idempotency == "tags":
            now = self.clock.time()
            known = [one for one in known if one.listed_from <= now]
        if known:
            self.faults.struck["create: known already"] += 1
        return known[0] if known else None

    def _make(self, request: InstanceRequest) -> SimInstance:
        self._check_capacity(request.offer)
        expires = _NEVER
        if request.expires_at is not None:
            expires = self.clock.time() + (request.expires_at - self.clock.now()).total_seconds()
        return self._add(request.owner, request.intent, request.offer, request.tags, expires, self._grace)

    def _give_up(self, one: SimInstance) -> None:
        """Ends an instance when it would have run, or a second later: there is no place for it."""
        short_at = max(one.runs_at, self.clock.time() + 1.0)
        one.runs_at, one.machine.crashed_at = _NEVER, self.clock.time()
        one.end(short_at, self._draw(self.weather.ends), StateReason.NO_CAPACITY)

    def _check_capacity(self, offer: Offer) -> None:
        now = self.clock.time()
        for one in self.faults.droughts:
            if one.covers(now, offer.instance_type, offer.region, offer.zone, spot=offer.spot):
                self.faults.struck[f"create: drought of the {one.scope}"] += 1
                raise NoCapacityError(f"no {offer.instance_type} in {offer.region}/{offer.zone}", scope=one.scope)
        quota = self.faults.quotas.get(offer.region)
        if quota is not None and sum(one.region == offer.region for one in self.alive()) >= quota:
            self.faults.struck["create: quota of the region"] += 1
            raise QuotaExceededError(f"at most {quota} instances in {offer.region}", scope="region")

    def _add(
        self,
        owner: UUID,
        intent: UUID,
        offer: Offer,
        tags: Mapping[str, str],
        expires_at: float,
        grace: float | None,
    ) -> SimInstance:
        now, number = self.clock.time(), len(self.instances) + 1
        runs_at = now + self._draw(self.weather.starts)
        boots_at = runs_at + self._draw(self.weather.boots)
        instance = SimInstance(
            id=f"i-{number:04d}",
            owner=owner,
            intent=intent,
            type=offer.instance_type,
            region=offer.region,
            zone=offer.zone,
            spot=offer.spot,
            price=offer.price,
            address=self._address(number),
            machine=SimMachine(self.clock, intent, boots_at, grace, self._script_of),
            created_at=now,
            runs_at=runs_at,
            listed_from=now + self._draw(self.weather.list_lag),
            known_from=now + self._draw(self.weather.get_lag),
            tags=dict(tags),
            expires_at=expires_at,
        )
        self.instances[instance.id] = self._live[instance.id] = instance
        self._by_address.setdefault(instance.address, []).append(instance)
        self._by_intent.setdefault(intent, []).append(instance)
        self.meter.add(instance)
        return instance

    def _address(self, number: int) -> str:
        if self.reuse_addresses:
            taken = {one.address for one in self.alive()}
            number = next(free for free in range(1, number + 1) if _numbered(free) not in taken)
            if number <= len(self.instances):
                self.faults.struck["an address was used again"] += 1
        return _numbered(number)

    def _settle(self, those: Iterable[SimInstance] | None = None) -> None:
        """Makes what time has brought have happened, to all that live or to some of them."""
        now = self.clock.time()
        for one in list(self._live.values() if those is None else those):
            one.settle(now)
            if one.ended_at <= now:
                del self._live[one.id]
                self._by_address[one.address].remove(one)
                if one.reason is StateReason.SHUTDOWN_FROM_INSIDE:
                    self.faults.struck["a machine powered itself off"] += 1
                one.machine.tell()

    def _pages(self) -> Iterator[list[SimInstance]]:
        self._settle()
        now = self.clock.time()
        shown = [
            one
            for one in self.instances.values()
            if one.listed_from <= now and not one.forgotten and now < one.ended_at + _RECENT
        ]
        for begin in range(0, len(shown), self._page_size):
            yield shown[begin : begin + self._page_size]

    def _describe(self, one: SimInstance) -> Instance:
        now = self.clock.time()
        one.settle(now)
        ref = InstanceRef(backend="sim", id=one.id, region=one.region, zone=one.zone)
        state = one.state(now)
        return Instance(
            ref=ref,
            intent=one.intent,
            owner=one.owner,
            state=state,
            reason=one.reason if now >= one.ending_at else None,
            created_at=self.clock.at(one.created_at),
            endpoint=Endpoint(ssh_host=one.address) if now >= one.runs_at else None,
        )

    def _draw(self, between: Between) -> float:
        return self._rng.uniform(*between)


def _offers(types: Sequence[SimType], regions: Mapping[str, Sequence[str]]) -> Iterator[Offer]:
    for region, zones in regions.items():
        for number, zone in enumerate(zones):
            for kind in types:
                # A little dearer from zone to zone, so that there is an order.
                step = 1 + 0.01 * number + (0.05 if region != next(iter(regions)) else 0.0)
                for spot, price in ((False, kind.price), (True, kind.spot_price)):
                    if price is not None:
                        yield Offer(
                            backend="sim",
                            instance_type=kind.name,
                            region=region,
                            zone=zone,
                            resources=kind.resources,
                            price=round(price * step, 6),
                            spot=spot,
                            availability=Availability.UNKNOWN,
                        )


def _numbered(number: int) -> str:
    return f"10.0.{number // 256}.{number % 256}"


class _Call:
    """One call: what happens before it, and what happens to its answer."""

    def __init__(self, cloud: SimCloud, hook: Hook, what: object) -> None:
        self._cloud = cloud
        self._hook = hook
        self._what = what
        self._kind: Kind | None = None

    def __enter__(self) -> Kind | None:
        self._kind = self._cloud.faults.draw(self._hook)
        try:
            self._cloud.faults.before(self._hook, self._kind)
        except Exception as error:
            self._say(error)
            raise
        return self._kind

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._say(error)
        if kind is None and self._kind != "page lost":
            self._cloud.faults.after(self._hook, self._kind)

    def _say(self, error: BaseException | None) -> None:
        outcome = f"{type(error).__name__}: {error}" if error else self._kind or "done"
        self._cloud.watch(f"{self._hook} {self._what}: {outcome}")


class _Bucket:
    """A token bucket."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._most = 2 * rate if rate is not None else 0.0
        self._left = self._most
        self._at = 0.0

    def take(self, now: float) -> float:
        """Takes a token; else the seconds until there is one."""
        if self._rate is None:
            return 0.0
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0

    def lift(self) -> None:
        """No limit any more."""
        self._rate = None
