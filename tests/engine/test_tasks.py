"""Ending tasks that do not want to end."""

from __future__ import annotations

import asyncio

import pytest

from dstack_core._engine.seams import SystemClock
from dstack_core._engine.tasks import end_tasks

pytestmark = pytest.mark.anyio


async def test_a_task_that_swallows_a_cancellation_ends_all_the_same() -> None:
    """Cancelled again and again, until it gives in."""
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 2:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end_tasks([task])
    assert task.cancelled()


async def test_a_wait_does_not_swallow_a_cancellation_that_comes_with_its_result() -> None:
    """What is waited for and the cancellation arrive at the same moment: the task ends."""
    event = asyncio.Event()
    went_on = False

    async def work() -> None:
        nonlocal went_on
        await SystemClock().wait_for(event.wait(), 60)
        await asyncio.sleep(0)
        went_on = True

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    event.set()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not went_on
