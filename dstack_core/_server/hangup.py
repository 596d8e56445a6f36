"""How the answer to a request learns that the client is gone, without a task that waits for it."""

from __future__ import annotations

import asyncio

HANGUP = "hangup"
"""Key in a request's `state`: the `Hangup` of its connection."""


class Hangup:
    """The end of one client's connection.

    Attributes:
        lost: whether the client is gone.
        task: what is cancelled when the client goes: it answers a request that nobody waits for any more.
    """

    __slots__ = ("lost", "task")

    def __init__(self) -> None:
        self.lost = False
        self.task: asyncio.Task[None] | None = None

    def happened(self) -> None:
        """The client is gone."""
        self.lost = True
        if self.task is not None:
            self.task.cancel()
