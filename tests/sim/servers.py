"""Server processes of a simulated world: the real engine and store, whose seams lead into the simulation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dstack_core._backends import BackendHub
from dstack_core._backends._calls import Busy
from dstack_core._engine.engine import Engine
from dstack_core._engine.restoring import Kept
from dstack_core._engine.seams import Seams
from dstack_core._store import StoreUnavailable
from dstack_core._store.code import CodeStore
from dstack_core._store.databases import Sqlite
from dstack_core._store.logs import LogStore
from dstack_core._store.store import FaultPoint, Store
from dstack_core._store.vault import Vault
from dstack_core.testing import SimCloud
from tests.sim.agents import Network
from tests.sim.loop import Killed, Process, SimLoop, VirtualClock, VirtualIds

T = TypeVar("T")


class Databases:
    """SQLite databases that are used again for the next world: their prepared statements are worth keeping."""

    def __init__(self) -> None:
        self._free: list[Sqlite] = []

    def open(self, path: Path) -> Sqlite:
        """The database in a file that has its tables already."""
        database = self._free.pop() if self._free else Sqlite(path)
        # No path: it differs from run to run, and messages are a part of the history.
        database.path, database.place = path, "the simulated database"
        database.cure = "There is none"
        return database

    def give_back(self, database: Sqlite) -> None:
        """Nobody uses it any more."""
        database.dispose()
        self._free.append(database)


DATABASES = Databases()


class Server:
    """One server process, from its start to its death.

    Args:
        world: what it lives in.
        name: its name in leases.
        alone: as `Engine`.
        skew: seconds by which its clock is ahead.
    """

    def __init__(self, world: Surroundings, name: str, *, alone: bool, skew: float) -> None:
        self._world = world
        self.name = name
        self.process = Process(world.loop, name)
        self.database = DATABASES.open(world.database)
        self.network = Network(
            world.cloud, world.rng("network"), point=self.point, trace=lambda text: world.trace(f"{name}: {text}")
        )
        self.store = Store(self.database, run=self._run, sleep=asyncio.sleep, faults=self._fault)
        clock = VirtualClock(world.loop, skew)
        rng = world.rng(f"engine {name}")
        self.engine = Engine(
            seams=Seams(clock=clock, rng=rng, ids=VirtualIds(clock, rng)),
            store=self.store,
            logs=LogStore(world.folder / "logs", run=_at_once),
            code=world.code,
            vault=Vault(world.folder / "secret.key"),
            backends=hub_of(world.cloud, HookCaller(self, world), world.loop, world.facts),
            transport=self.network,
            agent_pyz=Path("/agent.pyz"),
            lease_owner=name,
            alone=alone,
            kept=world.kept,
        )

    async def start(self) -> None:
        """Starts the engine.

        Raises:
            ConnectionError: it was killed before it was up.
        """
        self._world.trace(f"{self.name}: starts")
        await self.process.ask(self.engine.start)

    async def stop(self) -> None:
        """Ends in an orderly way."""
        self._world.trace(f"{self.name}: stops")
        try:
            await self.process.ask(self.engine.stop)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends at once."""
        if not self.process.dead:
            self._world.trace(f"{self.name}: is killed")
            self.process.kill()
            # The kernel closes its connections, as it were; not now, it may be in the middle of a transaction.
            self._world.defer(lambda: DATABASES.give_back(self.database))

    async def ask(self, request: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """A request of a client.

        Raises:
            ConnectionError: the server is not there, or died; nothing is known about the request.
        """
        return await self.process.ask(lambda: request(self.engine))

    # -- where the engine meets the world ------------------------------------------------------------------------

    def point(self, name: str) -> None:
        """A side effect is about to happen, or has just happened: here the process may be killed."""
        if self.process.dead:
            raise Killed
        if self._world.dies_here(self, name):
            self.kill()
            raise Killed

    async def _run(self, work: Callable[[], T], *, write: bool) -> T:
        """A transaction: takes a while before and after, in which others run, where the history says so."""
        before, after = self._world.store_delays()
        if before:
            await asyncio.sleep(before)
        if self.process.dead:
            raise Killed
        if not write and self._world.store_is_away():
            raise StoreUnavailable("simulated: the database does not answer")
        result = work()
        if write and self._world.stands_still(self):
            # What was written is written; what was to follow has to wait until it goes on.
            await asyncio.sleep(0)
        if after:
            await asyncio.sleep(after)
        return result

    def _fault(self, point: FaultPoint) -> None:
        self.point(point)
        self._world.store_fault(point)


class Surroundings:
    """What a server needs of its world."""

    loop: SimLoop
    cloud: SimCloud
    database: Path
    folder: Path
    code: CodeStore
    facts: dict[str, Any]
    kept: Kept | None
    outside: Context
    """Of no process."""

    def rng(self, name: str) -> random.Random:
        """Chance for one purpose."""
        raise NotImplementedError

    def trace(self, text: str) -> None:
        """Writes the history down."""
        raise NotImplementedError

    def defer(self, work: Callable[[], None]) -> None:
        """Has something done when what runs now has ended."""
        raise NotImplementedError

    def dies_here(self, server: Server, point: str) -> bool:
        """Whether a server is killed at this point."""
        raise NotImplementedError

    def stands_still(self, server: Server) -> bool:
        """Whether a server stands still from here on, for a while."""
        raise NotImplementedError

    def hook_delays(self) -> tuple[float, float]:
        """Seconds until a request reaches the cloud, and until its answer is back."""
        raise NotImplementedError

    def arrives_twice(self) -> float | None:
        """Seconds after which a request arrives once more; `None`: it does not."""
        raise NotImplementedError

    def repeat(self, function: Callable[[], object]) -> None:
        """A request arrives once more, and nobody waits for its answer."""
        raise NotImplementedError

    def store_delays(self) -> tuple[float, float]:
        """Seconds before and after a transaction."""
        raise NotImplementedError

    def store_is_away(self) -> bool:
        """Whether the database does not answer now."""
        raise NotImplementedError

    def store_fault(self, point: FaultPoint) -> None:
        """Raises what happens to the connection at this point."""
        raise NotImplementedError


class HookCaller:
    """Runs hooks at once, between the way to the cloud and the way back. What was sent arrives, whoever dies."""

    def __init__(self, server: Server, world: Surroundings) -> None:
        self._server = server
        self._world = world
        self._places: dict[str, asyncio.Semaphore] = {}

    async def __call__(self, key: str, limit: int, timeout: float, function: Callable[[], T]) -> T:
        """See `Caller`."""
        loop = self._world.loop
        deadline = loop.time() + timeout
        places = self._places.setdefault(key, asyncio.Semaphore(limit))
        try:
            async with asyncio.timeout_at(deadline):
                await places.acquire()
        except TimeoutError:
            raise Busy from None
        self._server.point("before hook")
        answer: asyncio.Future[Callable[[], T]] = loop.create_future()
        self._send(function, answer, places)
        async with asyncio.timeout_at(deadline):
            outcome = await answer
        result = outcome()
        self._server.point("after hook's answer")
        return result

    def _send(
        self, function: Callable[[], T], answer: asyncio.Future[Callable[[], T]], places: asyncio.Semaphore
    ) -> None:
        there, back = self._world.hook_delays()
        loop, again = self._world.loop, self._world.arrives_twice()

        def arrive() -> None:
            outcome = _outcome(function)
            self._world_point()
            loop.call_later(back, end, outcome, context=self._world.outside)

        def end(outcome: Callable[[], T]) -> None:
            places.release()
            if not answer.done() and not self._server.process.dead:
                answer.set_result(outcome)

        loop.call_later(there, arrive, context=self._world.outside)
        if again is not None:
            loop.call_later(there + again, self._world.repeat, function, context=self._world.outside)

    def _world_point(self) -> None:
        """The cloud has done it, and nobody knows yet."""
        if not self._server.process.dead and self._world.dies_here(self._server, "after hook"):
            self._server.kill()


def _outcome(function: Callable[[], T]) -> Callable[[], T]:
    """What a hook came to: gives its result, or raises its error, where it is called.

    The error travels as a result: it may reach a server that is killed before it looks, and nobody misses it then.
    """
    try:
        result = function()
    except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets it
        return partial(_raise, error)
    return lambda: result


def _raise(error: Exception) -> NoReturn:
    raise error


async def _at_once(work: Callable[[], T]) -> T:
    return work()


class _Registration:
    """What the entry point of a SimCloud leads to."""

    def __init__(self, cloud: SimCloud, facts: dict[str, Any]) -> None:
        from dstack_core._hookspecs import hookimpl

        info = cloud.info(**facts)
        self.dstack_register_backends = hookimpl(lambda: [info])


class _EntryPoint:
    name, value, dist = "sim", "dstack_core.testing.simcloud", None

    def __init__(self, registration: _Registration) -> None:
        self._registration = registration

    def load(self) -> object:
        """The plugin."""
        return self._registration


def hub_of(cloud: SimCloud, call: HookCaller, loop: SimLoop, facts: dict[str, Any]) -> BackendHub:
    """A hub whose only backend is this cloud."""
    point = _EntryPoint(_Registration(cloud, facts))
    return BackendHub.discover(entry_points=lambda **_: [point], call=call, clock=loop.time, load_timeout=None)
