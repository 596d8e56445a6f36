"""Where a simulated server meets its cloud: what is sent arrives, and an answer that comes too late is nobody's."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from contextvars import Context
from types import SimpleNamespace
from typing import Any

import pytest

from dstack_core.errors import UnknownOutcomeError
from tests.sim.loop import Process, SimLoop, pass_time
from tests.sim.servers import HookCaller, Server, Surroundings


class _Fair(Surroundings):
    """A second there and a second back, and nothing goes wrong."""

    def __init__(self) -> None:
        self.loop = SimLoop(0)
        self.outside = Context()

    def rng(self, name: str) -> random.Random:
        return random.Random(name)

    def trace(self, text: str) -> None:
        pass

    def dies_here(self, server: Server, point: str) -> bool:
        return False

    def hook_delays(self) -> tuple[float, float]:
        return 1.0, 1.0

    def arrives_twice(self) -> float | None:
        return None


def _calls(world: _Fair, hook: Callable[[], object]) -> tuple[Process, Callable[[], Any]]:
    """A server, and a call of a hook from it."""
    process = Process(world.loop, "server")
    server: Any = SimpleNamespace(process=process, point=lambda _: None)
    caller = HookCaller(server, world)
    return process, lambda: process.ask(lambda: caller("sim", 1, 30.0, hook))


def _refuse() -> None:
    raise UnknownOutcomeError("the connection broke")


def test_the_error_of_a_hook_comes_out_where_it_was_called() -> None:
    """It takes its way there and back, and is what the hook raised."""
    world = _Fair()
    _, call = _calls(world, _refuse)

    async def main() -> None:
        with pytest.raises(UnknownOutcomeError, match="the connection broke"):
            await call()
        assert world.loop.time() == 2.0

    world.loop.run(main())
    assert world.loop.problems == []


def test_an_error_for_a_server_that_is_killed_is_missed_by_nobody() -> None:
    """It reaches a server that stands still and is killed before it looks: that is no bug of the engine."""
    world = _Fair()
    process, call = _calls(world, _refuse)

    async def main() -> None:
        asked = asyncio.create_task(call())
        await pass_time(0.5)
        process.freeze()
        await pass_time(5)
        process.kill()
        with pytest.raises(ConnectionError, match="server was killed"):
            await asked

    world.loop.run(main())
    gc.collect()
    assert world.loop.problems == []
