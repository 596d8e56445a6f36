"""A simulated world: one or two servers on one database and one cloud, users, and what goes wrong. One seed, one world.

outcome = World(seed=7).run()
assert not outcome.violations
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import UUID

from dstack_core._engine import reconciler, replicas, shortages, sweeper
from dstack_core._engine.restoring import Kept
from dstack_core._store.code import CodeStore
from dstack_core._store.store import FaultPoint, Store
from dstack_core.errors import Scope
from dstack_core.testing import Drought, Script, SimClock, SimCloud
from tests.sim.checks import WATCH, Checks, Reader
from tests.sim.loop import SimLoop
from tests.sim.plan import TROUBLES, Plan
from tests.sim.servers import Server, Surroundings
from tests.sim.users import Users

CONVERGES_WITHIN = 3600.0
"""Virtual seconds after which, with nothing going wrong any more, all is settled."""
CONFIRMED_AFTER = 1500.0
"""Virtual seconds after which a person confirms a restored database, if what it does not know has not ended itself."""


@dataclass
class Outcome:
    """What came of a world.

    Attributes:
        violations: invariants that did not hold, in words.
        digest: of the whole history.
        seen: how often each fault and each way out was reached.
        history: the history itself, if it was asked for.
        points: how many places there were at which a server could have been killed, by name.
        seconds: virtual time.
        steps: callbacks that ran.
    """

    seed: int
    violations: list[str]
    digest: str
    seen: Counter[str]
    history: list[str]
    points: list[str]
    seconds: float
    steps: int
    runs: dict[str, int] = field(default_factory=dict)


class Memory:
    """What is kept of a database outside of it (`restoring.Kept`)."""

    def __init__(self) -> None:
        self._starts: dict[UUID, int] = {}

    def read(self, owner: UUID) -> int:
        """How many starts were seen."""
        return self._starts.get(owner, 0)

    def write(self, owner: UUID, starts: int) -> None:
        """Remembers it."""
        self._starts[owner] = starts


class LoopClock(SimClock):
    """The cloud's clock: the loop's time."""

    def __init__(self, loop: SimLoop) -> None:
        super().__init__()
        self._loop = loop

    def time(self) -> float:
        """The loop's."""
        return self._loop.time()


class World(Surroundings):
    """Everything there is.

    Args:
        seed: decides all that the plan leaves open.
        plan: what happens; drawn from the seed by default.
        kill_at: numbers of the points at which the server that gets there is killed, see `Outcome.points`.
        keep: keep the history in words.
    """

    def __init__(
        self, seed: int, plan: Plan | None = None, *, kill_at: tuple[int, ...] = (), keep: bool = False
    ) -> None:
        self.seed = seed
        self.plan = plan or Plan.draw(random.Random(f"{seed} plan"))
        self.loop = SimLoop(seed)
        self.outside = Context()
        self.folder = Path(tempfile.mkdtemp(prefix="dsim-", dir=_memory()))
        self.database = self.folder / "server.db"
        shutil.copyfile(_template(), self.database)
        self.reader = Reader(self.database)
        self.cloud = SimCloud(
            LoopClock(self.loop),
            seed=seed,
            key=f"world-{seed}",
            idempotency=self.plan.idempotency,
            page_size=3,
            rate=self.plan.rate,
            grace=self.plan.grace,
            script_of=self._script_of,
        )
        self.cloud.watch = self._watch_cloud
        self.code = CodeStore(self.folder / "code")
        self.kept: Kept | None = Memory() if self.plan.kept else None
        self.facts = {"visibility_window": 90.0, "provisioning_timeout": 150.0, "hook_timeout": 30.0}
        self.seen: Counter[str] = Counter()
        self.points: list[str] = []
        self.history: list[str] = []
        self.servers: list[Server] = []
        self._kill_at = frozenset(kill_at)
        self._keep = keep
        self._digest = hashlib.sha256()
        self._deferred: list[Callable[[], None]] = []
        self._names = 0
        self._last_event = 0
        self._ends: Counter[str] = Counter()
        self.copied_at: float | None = None
        self.restored_at: float | None = None
        self.confirmed = False
        self._away_until = 0.0
        self._calm = False
        self._healed = asyncio.Event()
        self._chance = self.rng("chance")
        self.users = Users(self)
        self.checks = Checks(self)

    # -- the history -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Runs it to its end."""
        with _quiet(self):
            try:
                self.loop.run(self._main())
            finally:
                for server in self.live():
                    server.kill()
                self._do_deferred()
                self.reader.close()
                shutil.rmtree(self.folder, ignore_errors=True)
        self.seen.update({f"cloud: {name}": count for name, count in self.cloud.faults.struck.items()})
        for server in self.servers:
            self.seen.update(server.network.struck)
        self.checks.violations.extend(f"the loop: {problem}" for problem in self.loop.problems)
        return Outcome(
            seed=self.seed,
            violations=self.checks.violations,
            digest=self._digest.hexdigest(),
            seen=self.seen,
            history=self.history,
            points=self.points,
            seconds=self.loop.time(),
            steps=self.loop.steps,
        )

    async def _main(self) -> None:
        self._begin_weather()
        if self.plan.restore is not None:
            self.loop.call_later(self.plan.restore[0], self._copy_database, context=self.outside)
            self.loop.call_later(self.plan.restore[1], self._restore, context=self.outside)
        for number in range(self.plan.foreign):
            self.cloud.add_foreign(_uuid(self.rng(f"owner {number}")), _uuid(self.rng(f"intent {number}")))
        keeping = [asyncio.create_task(self._supervise(slot)) for slot in range(self.plan.servers)]
        watching = asyncio.create_task(self.checks.watch())
        using = asyncio.create_task(self.users.use())
        trouble = asyncio.create_task(self._trouble())
        await self.sleep(self.plan.lasts)
        trouble.cancel()
        await asyncio.wait([trouble])
        await self.heal()
        await using
        await self._settle()
        await self._end_servers(keeping)
        watching.cancel()
        await asyncio.wait([watching])
        await self.checks.at_the_end()

    async def _settle(self) -> None:
        """Waits until nothing is left to do."""
        deadline = self.loop.time() + CONVERGES_WITHIN
        confirm_at = self.loop.time() + CONFIRMED_AFTER
        while not self.checks.settled():
            if self.restored_at is not None and not self.confirmed and self.loop.time() > confirm_at:
                await self._confirm_restore()
            if self.loop.time() > deadline:
                self.checks.violate(f"not settled {CONVERGES_WITHIN:g} s after all was well: {self.checks.unsettled()}")
                break
            await self.sleep(10.0)

    async def _confirm_restore(self) -> None:
        """A person has looked, and says that what the restored database does not know may be ended."""
        self.confirmed = True
        self.trace("a person confirms the restored database")
        await self.live()[0].ask(lambda engine: engine.doctor.confirm_restore())

    async def _end_servers(self, keeping: list[asyncio.Task[None]]) -> None:
        """Stops them in an orderly way, each but those that are killed in the middle of it."""
        for task in keeping:
            task.cancel()
        await asyncio.wait(keeping)
        for server in self.live():
            with suppress(ConnectionError):
                await server.stop()

    async def _supervise(self, slot: int) -> None:
        """Keeps one server up, as a service manager would: whenever it has died, it is started again after a while."""
        rng = self.rng(f"supervisor {slot}")
        while True:
            server = self._new_server()
            died = self.loop.create_future()
            server.process.on_death(partial(_end, died))
            self.servers.append(server)
            try:
                await server.start()
            except ConnectionError:
                pass
            except Exception as error:  # noqa: BLE001  # it is started again, whatever it was
                self.trace(f"{server.name}: did not start: {error!r}")
                server.kill()
            await died
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._calm else rng.uniform(0.5, self.plan.down_for)):
                    await self._healed.wait()

    def _new_server(self) -> Server:
        self._names += 1
        skew = self.rng(f"skew {self._names}").uniform(-1, 1) * self.plan.skew
        server = Server(self, f"server-{self._names}", alone=self.plan.servers == 1, skew=skew)
        server.network.loss, server.network.twice = self._chances("agent loss"), self._chances("agent twice")
        return server

    def live(self) -> list[Server]:
        """The servers that are up."""
        return [server for server in self.servers if not server.process.dead]

    # -- trouble -----------------------------------------------------------------------------------------------------

    def _begin_weather(self) -> None:
        plan, cloud = self.plan, self.cloud
        cloud.weather = plan.weather
        cloud.reuse_addresses = plan.reuse_addresses
        cloud.faults.chances.update(plan.hook_faults)
        cloud.faults.droughts.extend(plan.droughts)
        for at in plan.interrupts:
            self.loop.call_later(at, self._take_spots, context=self.outside)
        if plan.vanish is not None:
            self.loop.call_later(plan.vanish, self._vanish, context=self.outside)

    def _take_spots(self) -> None:
        for one in self._ours():
            if one.spot:
                self.trace(f"{one.id}: is interrupted")
                self.cloud.interrupt(one, 5.0)

    def _vanish(self) -> None:
        for one in self._ours():
            self.trace(f"{one.id}: hangs, and is not listed any more")
            self._note("a machine hung and was not listed any more")
            one.listed_from = float("inf")
            self.cloud.crash(one)

    def _copy_database(self) -> None:
        self.copied_at = self.loop.time()
        self.reader.copy_to(self.folder / "copy.db")

    def _restore(self) -> None:
        """Puts the copy in the place of the database, with all servers down."""
        for server in self.live():
            server.kill()

        def put_back() -> None:
            with closing(Reader(self.folder / "copy.db")) as copy:
                copy.copy_to(self.database)
            self.restored_at = self.loop.time()
            self.trace("the database is that of a while ago")
            self._note("an old copy of the database was restored")

        # When their connections are closed; no new server is up before.
        self.loop.call_later(0.1, put_back, context=self.outside)

    async def _trouble(self) -> None:
        """Does what the plan has in store, at times that the seed decides."""
        rng = self.rng("trouble")
        kinds = sorted(self.plan.troubles)
        while kinds:
            await self.sleep(rng.expovariate(1 / self.plan.trouble_every))
            kind = rng.choice(kinds)
            if await getattr(self, f"_{kind}")(rng):
                self._note(TROUBLES[kind])

    async def _kill(self, rng: random.Random) -> bool:
        live = self.live()
        if live:
            rng.choice(live).kill()
        return bool(live)

    async def _stop(self, rng: random.Random) -> bool:
        live = [server for server in self.live() if not server.process.frozen]
        if live:
            server = rng.choice(live)
            try:
                await server.stop()
            except Exception as error:  # noqa: BLE001  # a store that is away, for example
                self.trace(f"{server.name}: did not stop well: {error!r}")
        return bool(live)

    async def _freeze(self, rng: random.Random) -> bool:
        live = [server for server in self.live() if not server.process.frozen]
        if live:
            self._freeze_for(rng.choice(live), rng.choice((5.0, 31.0, 90.0)))
        return bool(live)

    def _freeze_for(self, server: Server, seconds: float) -> None:
        self.trace(f"{server.name}: is frozen for {seconds:g} s")
        server.process.freeze()
        self.loop.call_later(seconds, self._thaw, server, context=self.outside)

    def _thaw(self, server: Server) -> None:
        if server.process.frozen and not server.process.dead:
            self.trace(f"{server.name}: goes on")
            server.process.thaw()

    async def _cut_off(self, rng: random.Random) -> bool:
        live = self.live()
        if live:
            server = rng.choice(live)
            server.network.cut_until = self.loop.time() + rng.uniform(5, 400)
            self.trace(f"{server.name}: cut off until {server.network.cut_until:.3f}")
        return bool(live)

    async def _lose_store(self, rng: random.Random) -> bool:
        self._away_until = self.loop.time() + rng.choice((0.2, 3.0, 40.0))
        self.trace(f"the database is away until {self._away_until:.3f}")
        return True

    async def _drought(self, rng: random.Random) -> bool:
        now = self.loop.time()
        kind, region = rng.choice((None, "small", "large")), rng.choice((None, "east", "west"))
        zone, spot = rng.choice((None, "a", "b")), rng.choice((None, True, False))
        scopes: tuple[Scope, ...] = ("zone", "region", "type", "account")
        scope = rng.choice(scopes)
        drought = Drought(now, now + rng.uniform(30, 600), kind, region, zone, spot, scope)
        self.cloud.faults.droughts.append(drought)
        self.trace(f"drought: {drought}")
        return True

    async def _quota(self, rng: random.Random) -> bool:
        region, most = rng.choice(("east", "west")), rng.randint(0, 2)
        self.cloud.faults.quotas[region] = most
        self.trace(f"quota: {most} in {region}")
        return True

    async def _interrupt(self, rng: random.Random) -> bool:
        spots = [one for one in self._ours() if one.spot]
        if spots:
            one = rng.choice(spots)
            self.cloud.interrupt(one, rng.choice((0.0, 30.0, 120.0)))
            self.trace(f"{one.id}: is interrupted at {one.ended_at:.3f}")
        return bool(spots)

    async def _lose_instance(self, rng: random.Random) -> bool:
        ours = self._ours()
        if ours:
            one, forget = rng.choice(ours), rng.random() < 0.5
            self.trace(f"{one.id}: is killed, {'forgotten' if forget else 'remembered'}")
            self.cloud.kill(one, forget=forget)
        return bool(ours)

    async def _crash(self, rng: random.Random) -> bool:
        ours = self._ours()
        if ours:
            one = rng.choice(ours)
            self.trace(f"{one.id}: hangs")
            self.cloud.crash(one)
        return bool(ours)

    async def _unplug(self, rng: random.Random) -> bool:
        ours = self._ours()
        if ours:
            one = rng.choice(ours)
            one.machine.offline_until = self.loop.time() + rng.choice((3.0, 60.0, 280.0, 700.0))
            one.machine.tell()
            self.trace(f"{one.id}: without network until {one.machine.offline_until:.3f}")
        return bool(ours)

    def _ours(self) -> list[Any]:
        return [one for one in self.cloud.alive() if one.tags.get("managed-by") == "dstack"]

    async def heal(self) -> None:
        """Nothing goes wrong from now on."""
        self.trace("all is well from here on")
        self._calm = True
        self._healed.set()
        self._away_until = 0.0
        self.cloud.faults.heal()
        self.cloud.lift_limits()
        for one in self.cloud.alive():
            one.machine.offline_until = 0.0
        for server in self.live():
            self._thaw(server)
            server.network.cut_until = server.network.loss = server.network.twice = 0.0

    # -- what servers ask --------------------------------------------------------------------------------------------

    def rng(self, name: str) -> random.Random:
        """Chance for one purpose."""
        return random.Random(f"{self.seed} {name}")

    def _watch_cloud(self, text: str) -> None:
        self.trace(text)
        hook, what, _ = text.split(" ", 2)
        if hook == "terminate":
            self.checks.ending(what.removesuffix(":"))
            self._ends[what] += 1
            if self._ends[what] == 2:
                self._note("a termination was asked for again")

    def trace(self, text: str) -> None:
        """Writes the history down."""
        line = f"{self.loop.time():.6f} {text}"
        self._digest.update(line.encode())
        if self._keep:
            self.history.append(line)

    def defer(self, work: Callable[[], None]) -> None:
        """Has something done when what runs now has ended."""
        self._deferred.append(work)
        self.loop.call_soon(self._do_deferred, context=self.outside)

    def _do_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for work in deferred:
            work()

    def dies_here(self, server: Server, point: str) -> bool:
        """Whether a server is killed at this point."""
        number = len(self.points)
        self.points.append(point)
        dies = number in self._kill_at or (not self._calm and self._chance.random() < self.plan.kills.get(point, 0.0))
        if dies:
            self._note(f"killed {point}")
        return dies

    def stands_still(self, server: Server) -> bool:
        """Whether a server stands still from here on, for longer than its leases. Another one goes on."""
        if not self.plan.stills or self._calm:
            return False
        chances = [self.plan.stills.get(kind, 0.0) for kind in self._new_moves()]
        if self._chance.random() >= max(chances, default=0.0):
            return False
        if not any(other is not server and not other.process.frozen for other in self.live()):
            return False
        seconds = self._chance.choice(self.plan.still_for)
        self._note("a server stood still right after a transaction")
        self._freeze_for(server, seconds)
        return True

    def _new_moves(self) -> list[str]:
        """What the transaction that has just ended did, in the terms of `Plan.stills`."""
        texts = self.reader.all("SELECT id, text FROM events WHERE id > ? ORDER BY id", self._last_event)
        self._last_event = texts[-1][0] if texts else self._last_event
        return ["intent" if text.endswith("-> provisioning") else "move" for _, text in texts]

    def hook_delays(self) -> tuple[float, float]:
        """Seconds until a request reaches the cloud, and until its answer is back."""
        rng = self._chance
        if not self._calm and rng.random() < self.plan.slow_hooks:
            self._note("a hook was slow")
            # At most 20 s until it arrives: a request that arrives later than its time-out cannot be waited for.
            return rng.uniform(0, 20), rng.uniform(0, 40)
        return rng.uniform(0.02, 0.5), rng.uniform(0.02, 0.5)

    def arrives_twice(self) -> float | None:
        """Seconds after which a request arrives once more; `None`: it does not."""
        if self._calm or self._chance.random() >= self.plan.hook_twice:
            return None
        self._note("a request to the cloud arrived twice")
        return self._chance.uniform(0, 60)

    def repeat(self, function: Callable[[], object]) -> None:
        """A request arrives once more. What only this made, no row need answer for: that is for the sweeper."""
        known = len(self.cloud.instances)
        with suppress(Exception):  # nobody waits for its answer
            function()
        made = list(self.cloud.instances)[known:]
        self.checks.unasked.update(made)
        if made:
            self._note("a request that arrived twice made an instance")

    def store_delays(self) -> tuple[float, float]:
        """Seconds before and after a transaction."""
        if self._chance.random() >= self.plan.slow_store:
            return 0.0, 0.0
        return self._chance.uniform(0, 0.02), self._chance.uniform(0, 0.02)

    def store_is_away(self) -> bool:
        """Whether the database does not answer now."""
        return self.loop.time() < self._away_until

    def store_fault(self, point: FaultPoint) -> None:
        """Raises what happens to the connection at this point."""
        if self._calm:
            return
        if point == "before commit" and self.store_is_away():
            raise ConnectionError("simulated: the database is away")
        if self._chance.random() < self.plan.store_faults.get(point, 0.0):
            self._note(f"the connection to the database was lost {point}")
            raise ConnectionError(f"simulated: lost {point}")

    # -- small things ------------------------------------------------------------------------------------------------

    async def sleep(self, seconds: float) -> None:
        """Lets virtual time pass."""
        await asyncio.sleep(seconds)

    def _chances(self, name: str) -> float:
        return 0.0 if self._calm else self.plan.network_faults.get(name, 0.0)

    def _note(self, what: str) -> None:
        self.seen[what] += 1

    def _script_of(self, job_id: str, spec: Any) -> Script:
        """A job's environment says what it does; chance says whether it fails."""
        env = spec.env
        fails = random.Random(f"{self.seed} {job_id}").random() < float(env.get("SIM_FAILS", "0"))
        return Script(
            seconds=float(env.get("SIM_SECONDS", "30")),
            exit_code=3 if fails else 0,
            lines=int(env.get("SIM_LINES", "5")),
            lingers=float(env.get("SIM_LINGERS", "1")),
        )


def _end(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _uuid(rng: random.Random) -> UUID:
    return UUID(int=rng.getrandbits(128))


@cache
def _memory() -> str | None:
    """A folder in memory, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@cache
def _template() -> Path:
    """An empty database of this version, with triggers that write down what must never happen."""
    folder = Path(tempfile.mkdtemp(prefix="dsim-template-", dir=_memory()))
    import atexit
    import sqlite3

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "empty.db"
    store = Store.open(path=path)
    store._database.dispose()
    connection = sqlite3.connect(path)
    connection.executescript(WATCH)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Without the log and the garbage collector, and with loops that look less often where nobody is there to see."""
    saved = reconciler.RESYNC, reconciler.RENEWAL, sweeper.AT_FIRST, replicas.SLOW_LOOK, gc.isenabled()
    shortages.Memory = partial(_Memory, world)  # type: ignore[assignment,misc]  # the same, and it counts
    handler = _Listener(world)
    logger = logging.getLogger("dstack_core")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    plan = world.plan
    reconciler.RESYNC, reconciler.RENEWAL, sweeper.AT_FIRST = plan.resync, plan.renewal, plan.sweeps
    replicas.SLOW_LOOK = 3600.0
    gc.disable()
    try:
        yield
    finally:
        reconciler.RESYNC, reconciler.RENEWAL, sweeper.AT_FIRST, replicas.SLOW_LOOK = saved[:4]
        shortages.Memory = _Memory.__base__  # type: ignore[assignment,misc]  # as it was
        logger.removeHandler(handler)
        logger.propagate = propagates
        if saved[4]:
            gc.enable()


class _Memory(shortages.Memory):
    """Counts how often a shortage that is remembered has an offer passed over."""

    def __init__(self, world: World, known: Any, now: Any) -> None:
        super().__init__(known, now)
        self._world = world

    def of(self, offer: Any) -> Any:
        """As before."""
        found = super().of(offer)
        if found is not None:
            self._world.seen["an offer was passed over for a remembered shortage"] += 1
        return found


class _Listener(logging.Handler):
    """Counts what the engine says aloud, and takes an exception that nobody foresaw for what it is: a bug."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one message."""
        self._world.checks.said(record)
