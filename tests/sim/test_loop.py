"""The loop: time that jumps, an order that the seed decides, processes that stop there and then."""

from __future__ import annotations

import asyncio

import pytest

from tests.sim.loop import Deadlock, Process, SimLoop, pass_time


def order_of(seed: int) -> list[int]:
    """The order in which ten timers of the same moment go off."""
    loop, order = SimLoop(seed), list[int]()

    async def main() -> None:
        for number in range(10):
            loop.call_later(1.0, order.append, number)
        await pass_time(2)

    loop.run(main())
    return order


def test_time_jumps_to_what_comes_next() -> None:
    """A year passes at once, and nothing but timers moves the time."""
    loop = SimLoop(0)

    async def main() -> tuple[float, float]:
        before = loop.time()
        await pass_time(0)
        still = loop.time()
        await pass_time(365 * 86400)
        return still - before, loop.time()

    assert loop.run(main()) == (0.0, 365 * 86400)


def test_the_seed_decides_the_order_of_one_moment() -> None:
    """What asyncio leaves open differs from seed to seed, and never for one seed."""
    orders = [order_of(seed) for seed in range(8)]
    assert orders == [order_of(seed) for seed in range(8)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == list(range(10)) for order in orders)


def test_callbacks_keep_the_order_that_asyncio_promises() -> None:
    """`call_soon` is first come, first served, whatever the seed."""
    loop, order = SimLoop(3), list[int]()

    async def main() -> None:
        for number in range(10):
            loop.call_soon(order.append, number)
        await pass_time(1)

    loop.run(main())
    assert order == list(range(10))


def test_a_deadlock_is_found() -> None:
    """Where a real loop would wait for ever, this one says so."""
    with pytest.raises(Deadlock, match="nothing can run"):
        SimLoop(0).run(asyncio.Event().wait())


def test_there_are_no_threads() -> None:
    """A thread would make two runs of one seed differ."""
    with pytest.raises(RuntimeError, match="thread"):
        SimLoop(0).run(asyncio.to_thread(print))


def test_sets_of_tasks_have_one_order() -> None:
    """Tasks are hashed by number, not by address."""

    def numbers() -> list[str]:
        async def main() -> list[str]:
            tasks = [asyncio.create_task(pass_time(1), name=f"{number}") for number in range(50)]
            done, _ = await asyncio.wait(tasks)
            return [task.get_name() for task in done]

        return SimLoop(0).run(main())

    assert numbers() == numbers()


def test_nothing_of_a_killed_process_runs_any_more() -> None:
    """Neither its tasks nor those that they started, and no `finally`; whoever asked it something is told."""
    loop, seen = SimLoop(0), list[str]()

    async def work(name: str) -> None:
        try:
            while True:
                await pass_time(1)
                seen.append(name)
        finally:
            await pass_time(0)
            seen.append(f"{name} cleaned up")

    async def both() -> None:
        child = asyncio.create_task(work("child"))
        await work("parent")
        await child

    async def main() -> None:
        process = Process(loop, "server")
        asked = asyncio.create_task(process.ask(both))
        await pass_time(2.5)
        process.kill()
        with pytest.raises(ConnectionError, match="server was killed"):
            await asked
        await pass_time(10)

    loop.run(main())
    assert sorted(seen) == ["child", "child", "parent", "parent"]


def test_a_frozen_process_goes_on_where_it_stood() -> None:
    """What came meanwhile comes afterwards, in its order, and no time has passed for it that it did not see."""
    loop, seen = SimLoop(0), list[float]()

    async def work() -> None:
        while True:
            await pass_time(1)
            seen.append(loop.time())

    async def main() -> None:
        process = Process(loop, "server")
        working = process.start(work())
        await pass_time(1.5)
        process.freeze()
        await pass_time(90)
        assert seen == [1.0]
        process.thaw()
        await pass_time(1.5)
        assert not working.done()

    loop.run(main())
    assert seen == [1.0, 91.5, 92.5]
