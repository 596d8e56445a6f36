"""One key for all servers of a database, and new ones for machines."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from dstack_core._engine.booting import last_words
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.seams import Seams, SystemClock, SystemIds
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow
from dstack_core._transport.keys import key_pair
from dstack_core.errors import ConfigurationError

pytestmark = pytest.mark.anyio


def ring(number: int) -> Keyring:
    """That of a server with this key."""
    rng = random.Random(number)
    seams = Seams(clock=SystemClock(), rng=rng, ids=SystemIds(rng))
    return Keyring(seams, lambda: key_pair(bytes([number]) * 32))


async def checked(store: Store, number: int) -> None:
    """A server with this key starts."""
    await store.transact(lambda session: ring(number).check(session, ["clouds"]))


async def has_machine(store: Store, backend: str, status: str) -> None:
    """There is one."""
    row = InstanceRow(
        id=uuid4(),
        backend=backend,
        region="r",
        status=status,
        request="{}",
        request_hash="",
        name=f"m-{uuid4().hex[:8]}",
        created_at=datetime.now(UTC),
    )
    await store.transact(lambda session: session.add(row))


async def test_the_first_servers_key_is_everybodys(store: Store) -> None:
    """Another key is refused as long as a machine lets the first one in; the message names it, and the cure."""
    await checked(store, 1)
    await checked(store, 1)
    await has_machine(store, "clouds", "running")
    await checked(store, 1)
    with pytest.raises(ConfigurationError, match=r"1 machines let in another .*\(m-.*DSTACK_SSH_KEY_FILE"):
        await checked(store, 2)
    await checked(store, 1)


async def test_a_lost_key_is_no_trouble_without_machines(store: Store) -> None:
    """When nothing lets the first key in any more, a new one takes its place."""
    await checked(store, 1)
    await has_machine(store, "clouds", "terminated")
    await has_machine(store, "local", "running")
    await checked(store, 2)
    await has_machine(store, "clouds", "starting")
    with pytest.raises(ConfigurationError):
        await checked(store, 1)


def test_every_machine_has_a_key_of_its_own() -> None:
    """They are drawn from the chance that is passed in."""
    first, again = ring(1), ring(1)
    keys = [first.new_host_key() for _ in range(3)]
    assert len({key.public for key in keys}) == 3
    assert [again.new_host_key() for _ in range(3)] == keys


def test_the_last_words_of_a_machine() -> None:
    """Of its console people get the end, in lines, without what only terminals understand."""
    text = "".join(f"line {number}\r\n" for number in range(100))
    text += "\x1b[0;32m  OK  \x1b[0m\x07 up\r\n\r\n" + "x" * 1000
    lines = last_words(text)
    assert len(lines) == 40
    assert lines[-3:] == ["line 99", "OK   up", "x" * 300]
    assert last_words("") == []
