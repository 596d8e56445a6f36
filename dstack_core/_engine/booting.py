"""What happens between "the cloud says that it runs" and "its agent answers", on a machine that boots.

    silent ──▶ greeted ──▶ its own key kept ──▶ its own key shown ──▶ agent sent ──▶ agent started
               (first key)  (in its row)         (pinned from now on)

Each step may be repeated, by any server, and none goes without the ones before it: what a server had done when it died
is found on the machine. Whoever shows neither key is told nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

from dstack_core._engine.seams import Clock
from dstack_core._models.instances import Endpoint, Way
from dstack_core._transport import AgentUnreachable, HostKeyRefused, Transport
from dstack_core._transport.cloud_init import first_host_key
from dstack_core._transport.on_machine import Program, greet, show_own_key, start_agent

Keep = Callable[[str], Awaitable[None]]
"""Writes down the host key that a machine made for itself."""

_PATIENCE, _FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 0.05, 0.25
"""Seconds for which a machine is tried before its cloud is asked about it, and between two attempts."""
CONSOLE_LINES = 40
_LONGEST_LINE = 300
# What terminals understand and people do not: colours, the cursor, and control characters.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f]")


def way_to(endpoint: Endpoint, host_key: str | None) -> Endpoint:
    """How an agent is reached whose machine has this key; none is needed on this computer."""
    return endpoint if host_key is None else Way.to(endpoint, host_key)


class Booter:
    """Brings machines from their start to a running agent.

    Args:
        clock: for the pauses between two attempts.
        transport: the way to them.
        agent_pyz: the agent's program.
    """

    def __init__(self, clock: Clock, transport: Transport, agent_pyz: Path) -> None:
        self._clock = clock
        self._transport = transport
        self._why: dict[UUID, str] = {}
        self._program = Program(agent_pyz)

    async def bring_up(
        self,
        instance: UUID,
        user_data: str,
        endpoint: Endpoint,
        own_key: str | None,
        keep: Keep,
        woken: asyncio.Event,
    ) -> Endpoint | None:
        """Tries again and again, for a few seconds, or until there is other news.

        Args:
            instance: whose machine it is.
            user_data: what the machine was given.
            endpoint: where it is.
            own_key: the host key that it made for itself, if that is written down already.
            keep: writes that down.
            woken: there is other news.

        Returns:
            The way to the agent, which was started; `None` while the machine is not so far, and `why` says why.

        Raises:
            MachineBroken: it will never run a job; says why.
        """
        known, begin, pause = own_key, self._clock.now(), _FIRST_PAUSE

        async def keep_and_know(key: str) -> None:
            nonlocal known
            await keep(key)
            known = key

        while True:
            try:
                way = await self._advance(user_data, endpoint, known, keep_and_know)
                self._why[instance] = "its set-up is not over"
            except AgentUnreachable as silence:
                self._why[instance], way = str(silence), None
            if way is not None or woken.is_set() or (self._clock.now() - begin).total_seconds() >= _PATIENCE:
                return way
            await self._clock.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def why(self, instance: UUID) -> str:
        """What was the matter with a machine at the last look, to go on with a sentence; empty if nothing is known."""
        return f": {self._why[instance]}" if instance in self._why else ""

    def forget(self, instance: UUID) -> None:
        """It is not brought up any more."""
        self._why.pop(instance, None)

    async def _advance(self, user_data: str, endpoint: Endpoint, own_key: str | None, keep: Keep) -> Endpoint | None:
        """Goes as far as the machine is."""
        if own_key is not None:
            try:
                return await self._start(Way.to(endpoint, own_key))
            except HostKeyRefused:
                # It may not show it yet: a server died in between, or its SSH server has not read it.
                pass
        first = Way.to(endpoint, first_host_key(user_data))
        greeting = await greet(self._transport, first)
        if not greeting.ready:
            return None
        if own_key is None:
            own_key = greeting.own_key
            await keep(own_key)
        elif own_key != greeting.own_key:
            raise HostKeyRefused(f"What answers at {endpoint.ssh_host} has the machine's first key, and not its own.")
        await show_own_key(self._transport, first)
        return await self._start(Way.to(endpoint, own_key))

    async def _start(self, way: Way) -> Way:
        await start_agent(self._transport, way, self._program)
        return way


def last_words(console: str) -> list[str]:
    """The end of a machine's console, for people: lines without what only a terminal understands."""
    lines = (_CONTROL.sub("", line).strip() for line in console.replace("\r", "\n").split("\n"))
    return [line[:_LONGEST_LINE] for line in lines if line][-CONSOLE_LINES:]
