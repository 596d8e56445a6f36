"""The users of a world: they submit runs, follow them, stop them, and remember what they were promised."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dstack_core._models.configurations import Task
from dstack_core._models.profiles import Profile, RetryPolicy
from dstack_core._models.runs import RunSpec
from dstack_core._models.wire import StopRunsRequest
from dstack_core._store import StoreError
from dstack_core.errors import NoOffersError, NotFoundError, RunNameTakenError, ServerClientError

if TYPE_CHECKING:
    from tests.sim.servers import Server
    from tests.sim.world import World

_PATIENCE = 400


@dataclass
class Wish:
    """A run that somebody wants.

    Attributes:
        at: when it is submitted.
        stop_after: seconds after which it is stopped; `None`: never.
    """

    name: str
    at: float
    seconds: float = 30.0
    lines: int = 5
    fails: float = 0.0
    lingers: float = 1.0
    spot: str = "auto"
    max_price: float | None = None
    max_duration: int | None = None
    retry: tuple[str, ...] = ()
    retry_limit: int = 900
    stop_after: float | None = None
    abort: bool = False

    def spec(self) -> RunSpec:
        """As it is submitted."""
        env = {
            "SIM_SECONDS": f"{self.seconds:g}",
            "SIM_LINES": str(self.lines),
            "SIM_FAILS": f"{self.fails:g}",
            "SIM_LINGERS": f"{self.lingers:g}",
        }
        facts: dict[str, Any] = {"spot_policy": self.spot}
        if self.retry:
            facts["retry_policy"] = RetryPolicy(retry=True, limit=self.retry_limit, on_events=list(self.retry))
        if self.max_price is not None:
            facts["max_price"] = self.max_price
        if self.max_duration is not None:
            facts["max_duration"] = self.max_duration
        task = Task(commands=["work"], env=env, stop_duration=5)
        return RunSpec(run_name=self.name, configuration=task, profile=Profile(**facts))

    @classmethod
    def draw(cls, rng: random.Random, number: int, lasts: float) -> Wish:
        """A wish of a seed."""
        events = ("no-capacity", "interruption", "error")
        return cls(
            name=f"run-{number}",
            at=rng.uniform(0, lasts / 2),
            seconds=rng.choice((0.1, 5.0, 5.0, 30.0, 120.0)),
            lines=rng.choice((0, 3, 12)),
            fails=rng.choice((0.0, 0.0, 0.4)),
            lingers=rng.choice((0.0, 1.0, 30.0)),
            spot=rng.choice(("auto", "spot", "on-demand")),
            max_price=rng.choice((None, None, 0.11)),
            max_duration=rng.choice((None, None, 20)),
            retry=rng.choice(((), events, events, events[:2])),
            stop_after=rng.choice((None, None, None, rng.uniform(0, 20), rng.uniform(0, 100))),
            abort=rng.random() < 0.5,
        )


@dataclass
class Promise:
    """A run that a server has accepted."""

    wish: Wish
    run_id: UUID
    at: float
    stopped_at: float | None = None


@dataclass
class Users:
    """All of them.

    Attributes:
        promises: accepted runs, by name.
        refused: names of runs that were refused.
    """

    world: World
    promises: dict[str, Promise] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    async def use(self) -> None:
        """Does all that they want, one task for each run."""
        import asyncio

        rng = self.world.rng("users")
        plan = self.world.plan
        wishes = plan.script or [Wish.draw(rng, number, plan.lasts) for number in range(plan.runs)]
        work = [asyncio.create_task(self._want(wish, self.world.rng(f"user {wish.name}"))) for wish in wishes]
        await asyncio.gather(*work)

    async def _want(self, wish: Wish, rng: random.Random) -> None:
        await self.world.sleep(wish.at)
        await self._submit(wish, rng)
        if wish.stop_after is not None and wish.name in self.promises:
            await self.world.sleep(wish.stop_after)
            await self._stop(wish, rng)

    async def _submit(self, wish: Wish, rng: random.Random) -> None:
        """Asks until there is an answer, with the same key: what a client does."""
        key = UUID(int=rng.getrandbits(128))
        spec = wish.spec()
        for _ in range(_PATIENCE):
            server = self._server(rng)
            try:
                if server is None:
                    raise ConnectionError("no server")  # noqa: TRY301  # as if it had not answered
                run = await server.ask(lambda engine: engine.service.submit("main", "me", spec, key))
            except (ConnectionError, StoreError, RuntimeError) as error:
                self.world.trace(f"user: submit of {wish.name}: {type(error).__name__}")
                await self.world.sleep(rng.uniform(0.5, 3))
                continue
            except (NoOffersError, RunNameTakenError) as error:
                self.world.trace(f"user: {wish.name} is refused: {type(error).__name__}")
                self.refused.append(wish.name)
                return
            if rng.random() < 0.1:
                # The answer was lost on its way: the same again.
                self.world.seen["user: an accepted run was submitted again"] += 1
                continue
            self.world.trace(f"user: {wish.name} is accepted as {run.id}")
            self.promises[wish.name] = Promise(wish, run.id, self.world.loop.time())
            return
        self.world.checks.violate(f"{wish.name} got no answer")

    async def _stop(self, wish: Wish, rng: random.Random) -> None:
        promise = self.promises[wish.name]
        request = StopRunsRequest(run_ids=(promise.run_id,), abort=wish.abort)
        for _ in range(_PATIENCE):
            server = self._server(rng)
            try:
                if server is None:
                    raise ConnectionError("no server")  # noqa: TRY301  # as if it had not answered
                await server.ask(lambda engine: engine.service.stop("main", request))
            except NotFoundError:
                if self.world.restored_at is None:
                    self.world.checks.violate(f"the accepted run {wish.name} is not known")
                return
            except (ConnectionError, StoreError, RuntimeError, ServerClientError) as error:
                self.world.trace(f"user: stop of {wish.name}: {type(error).__name__}")
                await self.world.sleep(rng.uniform(0.5, 3))
                continue
            self.world.trace(f"user: {wish.name} is to {'abort' if wish.abort else 'stop'}")
            promise.stopped_at = self.world.loop.time()
            return
        self.world.checks.violate(f"{wish.name} could not be stopped")

    def _server(self, rng: random.Random) -> Server | None:
        live = [server for server in self.world.live() if not server.process.frozen]
        return rng.choice(live) if live else None
