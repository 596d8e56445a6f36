"""From "it runs" to "its agent answers", step by step: what is said to a machine, when, and to whom."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from uuid import UUID

import pytest

from dstack_core._engine.booting import Booter
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._models.instances import Endpoint, Way
from dstack_core._store.store import Store
from dstack_core._transport import AgentConnection, AgentUnreachable, HostKeyRefused, Said
from dstack_core._transport.cloud_init import Boot, user_data
from dstack_core._transport.keys import key_pair
from dstack_core._transport.on_machine import MachineBroken
from tests.support.bench import Bench, ManualClock
from tests.support.cloud import ScriptedCloud

pytestmark = pytest.mark.anyio

SERVER, FIRST, OWN, STRANGER = (key_pair(bytes([number]) * 32) for number in range(4))
USER_DATA = user_data(Boot(instance="i", server_key=SERVER.public, host_key=FIRST, grace=600))
MACHINE = Endpoint(ssh_host="192.0.2.1")
ID = UUID(int=1)


class Machine:
    """A machine as the transport shows it: it lets in who knows the key that it shows, and does as it is told.

    Attributes:
        shows: the public key that it shows now; `None`: it does not answer.
        setup: what it says of its set-up.
        said: the steps that were asked of it, each with the key that was expected.
    """

    def __init__(self) -> None:
        self.shows: str | None = FIRST.public
        self.own = OWN.public
        self.setup = "done\n"
        self.said: list[tuple[str, str]] = []

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """One step."""
        assert isinstance(endpoint, Way)
        if self.shows is None:
            raise AgentUnreachable("connection refused")
        if self.shows not in endpoint.host_keys:
            raise HostKeyRefused("another key")
        step = next(name for mark, name in _STEPS.items() if mark in command)
        self.said.append((step, "first" if endpoint.host_keys == (FIRST.public,) else "own"))
        if step == "show":
            self.shows = self.own
        greeting = f"{self.own}\n{self.setup}" if self.setup else ""
        return Said(0, greeting.encode() if step == "greet" else b"", b"")

    def connect(self, endpoint: Endpoint) -> AgentConnection:
        """Nobody asks for that here."""
        raise NotImplementedError

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """Nor for that."""
        raise NotImplementedError


_STEPS = {"ssh-keygen": "greet", "reload": "show", "systemctl start": "start"}


class Desk:
    """A server that brings the machine up."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.clock = ManualClock()
        program = folder / "agent.pyz"
        program.write_bytes(b"program")
        self.machine, self.booter = machine, Booter(self.clock, machine, program)
        self.kept: list[str] = []
        self.woken = asyncio.Event()

    async def keep(self, key: str) -> None:
        """Writes it down; what the machine shows then is remembered, too."""
        assert self.machine.shows == FIRST.public
        self.kept.append(key)

    async def bring_up(self, own_key: str | None = None) -> Endpoint | None:
        """Tries."""
        return await self.booter.bring_up(ID, USER_DATA, MACHINE, own_key, self.keep, self.woken)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A machine that is ready, and a server."""
    return Desk(Machine(), tmp_path)


REST = [("start", "own")]


async def test_a_machine_that_is_ready(desk: Desk) -> None:
    """Its own key is written down before it is shown, and nothing is sent but to who shows that one."""
    assert await desk.bring_up() == Way.to(MACHINE, OWN.public)
    assert desk.kept == [OWN.public]
    assert desk.machine.said == [("greet", "first"), ("show", "first"), *REST]


@pytest.mark.parametrize(("shows", "before"), [(OWN, []), (FIRST, [("greet", "first"), ("show", "first")])])
async def test_where_another_server_died(desk: Desk, shows: object, before: list[tuple[str, str]]) -> None:
    """With the own key written down, what is left of the steps is done, whichever the machine shows by now."""
    desk.machine.shows = shows.public  # type: ignore[attr-defined]  # a pair
    assert await desk.bring_up(OWN.public) == Way.to(MACHINE, OWN.public)
    assert desk.kept == []
    assert desk.machine.said == [*before, *REST]


async def test_a_stranger_is_told_nothing(desk: Desk) -> None:
    """Neither one with a third key, nor one who has the first key, which others can read, and another own one."""
    desk.machine.shows = STRANGER.public
    assert await desk.bring_up() is None
    assert await desk.bring_up(OWN.public) is None
    assert desk.machine.said == []
    desk.machine.shows, desk.machine.own = FIRST.public, STRANGER.public
    assert await desk.bring_up(OWN.public) is None
    assert {step for step, _ in desk.machine.said} == {"greet"}
    assert "and not its own" in desk.booter.why(ID)


@pytest.mark.parametrize(
    ("shows", "setup", "why"), [(None, "", "connection refused"), (FIRST, "", "set-up is not over")]
)
async def test_a_machine_that_is_not_so_far(desk: Desk, shows: object, setup: str, why: str) -> None:
    """It is tried for some seconds, at once given up for other news, and why is known until it is forgotten."""
    desk.machine.shows = shows.public if shows is not None else None  # type: ignore[attr-defined]  # a pair
    desk.machine.setup = setup
    begin = desk.clock.now()
    assert await desk.bring_up() is None
    assert 10 <= (desk.clock.now() - begin).total_seconds() < 11
    assert why in desk.booter.why(ID)
    desk.woken.set()
    begin = desk.clock.now()
    assert await desk.bring_up() is None
    assert desk.clock.now() == begin
    desk.booter.forget(ID)
    assert desk.booter.why(ID) == ""


async def test_a_machine_whose_set_up_failed(desk: Desk) -> None:
    """It says why, and nothing more is asked of it."""
    desk.machine.setup = "failed: no docker\n"
    with pytest.raises(MachineBroken, match="the set-up of the machine failed: no docker"):
        await desk.bring_up()
    assert desk.machine.said == [("greet", "first")]


async def test_a_machine_that_never_answers_is_given_up(store: Store) -> None:
    """After the backend's time its end is asked for, with the reason why it was not reached."""
    bench = Bench(store, ScriptedCloud(), facts={"boots_machines": True, "provisioning_timeout": 60.0})
    intent = await bench.intend(Keyring(bench.seams, lambda: SERVER))
    begin = bench.clock.now()
    while await bench.status(intent) is not InstanceStatus.TERMINATED:
        assert (bench.clock.now() - begin).total_seconds() < 200
        await bench.turn()
        await bench.clock.sleep(1)
    row = await bench.row(intent)
    assert row.message == "the agent did not answer within 60 s of the instance's start: scripted silence"
    assert not bench.cloud.alive()
