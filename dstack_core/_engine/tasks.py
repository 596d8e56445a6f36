"""Ending background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

_AGAIN = 1.0
"""Seconds after which a task that goes on is cancelled once more."""


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks until all have ended: what they call may swallow a cancellation. Their errors are dropped."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_AGAIN)
        for task in done:
            if not task.cancelled():
                task.exception()
