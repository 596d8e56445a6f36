"""A real PostgreSQL that fails: connections cut before, in and after COMMIT, deadlocks, serialization failures."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from dstack_core._store import StoreOutcomeUnknown, StoreUnavailable
from dstack_core._store.store import Store
from dstack_core._store.tables import MetaRow
from dstack_core.testing import wait_until
from tests.support.postgres import PostgresServer

pytestmark = [pytest.mark.postgres, pytest.mark.anyio]


def put(key: str) -> Callable[[Session], None]:
    """Returns a function that writes one row."""
    return lambda session: session.add(MetaRow(key=key, value=""))


def keys(session: Session) -> list[str]:
    """Returns which rows there are."""
    return list(session.scalars(select(MetaRow.key).order_by(MetaRow.key)))


async def no_sleep(_seconds: float) -> None:
    """Waits no time."""


async def appears(server: PostgresServer, query: str, parameter: str) -> list[tuple[Any, ...]]:
    """Waits until a query has rows."""
    return await asyncio.to_thread(wait_until, lambda: server.execute(query, parameter), timeout=60, what=query)


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[str]:
    """The name of an empty database with the real tables."""
    name = postgres_server.create_with_tables()
    yield name
    postgres_server.drop(name)


async def test_idle_connections_that_were_cut_are_replaced(postgres_server: PostgresServer, database: str) -> None:
    """A server that was restarted between transactions is not noticed by anybody."""
    store = Store.open(postgres_server.url(database), sleep=no_sleep)
    await asyncio.gather(*(store.transact(put(f"before {number}")) for number in range(8)))
    assert postgres_server.terminate_connections(database) >= 1
    await asyncio.gather(*(store.transact(put(f"after {number}")) for number in range(8)))
    assert postgres_server.terminate_connections(database) >= 1
    assert len(await store.read(keys)) == 16
    await store.close()


@pytest.mark.parametrize("use", ["transact", "read"])
async def test_cut_in_the_middle_is_tried_again(
    postgres_server: PostgresServer, database: str, use: Literal["transact", "read"]
) -> None:
    """A backend terminated while the function runs costs a retry; what it wrote happens once."""
    store = Store.open(postgres_server.url(database), sleep=no_sleep)
    runs = 0

    def work(session: Session) -> int:
        nonlocal runs
        runs += 1
        pid = session.scalar(select(func.pg_backend_pid()))
        if use == "transact":
            put("once")(session)
            session.flush()
        if runs < 3:
            postgres_server.execute("SELECT pg_terminate_backend(%s, 60000)", pid)
        return session.scalar(select(func.count()).select_from(MetaRow)) or 0

    assert await getattr(store, use)(work) == (use == "transact")
    assert runs == 3
    await store.close()


async def test_a_statement_that_is_running_is_cut(postgres_server: PostgresServer, database: str) -> None:
    """A connection that is cut while the server works on a statement is tried again, too."""
    store = Store.open(postgres_server.url(database), sleep=no_sleep)
    pids: list[int] = []

    def work(session: Session) -> None:
        pids.append(session.scalar(select(func.pg_backend_pid())) or 0)
        put("once")(session)
        session.flush()
        if len(pids) == 1:
            session.execute(text("SELECT pg_sleep(3600)"))

    task = asyncio.create_task(store.transact(work))
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = %s"
    found = await appears(postgres_server, sleeping, database)
    postgres_server.execute("SELECT pg_terminate_backend(%s)", found[0][0])
    await task
    assert await store.read(keys) == ["once"]
    assert len(set(pids)) == 2
    await store.close()


SLOW_COMMIT = """
CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3600); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON meta DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION dawdle();
"""


async def test_terminated_in_commit_is_unknown(postgres_server: PostgresServer, database: str) -> None:
    """A backend terminated while it commits leaves the outcome unknown, and the transaction is not repeated."""
    postgres_server.execute(SLOW_COMMIT, database=database)
    store = Store.open(postgres_server.url(database), sleep=no_sleep)
    task = asyncio.create_task(store.transact(put("once")))
    sleeping = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COMMIT%%' AND state = 'active' AND datname = %s"
    found = await appears(postgres_server, sleeping, database)
    postgres_server.execute("SELECT pg_terminate_backend(%s)", found[0][0])
    with pytest.raises(StoreOutcomeUnknown, match="broke during COMMIT"):
        await task
    assert await store.read(keys) == []
    await store.close()


class Wire:
    """A stand-in for the network: passes bytes on, and cuts the connection around a COMMIT when told."""

    def __init__(self, target: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="dstack-wire-"))
        self.cut: Literal["request", "answer"] | None = None
        self._target = str(target)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.directory / ".s.PGSQL.5432"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=[client], daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        """Passes one request and its answers at a time: that is how the protocol is used here."""
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._target)
            upstream = threading.Thread(target=self._answers, args=[server, client], daemon=True)
            upstream.start()
            with contextlib.suppress(OSError):
                while request := client.recv(1 << 16):
                    if b"COMMIT\0" in request and self.cut == "request":
                        break
                    if b"COMMIT\0" in request and self.cut == "answer":
                        client.shutdown(socket.SHUT_RDWR)
                    server.sendall(request)
            # The server gets to read what was sent, and answers somebody who is gone.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
                server.shutdown(socket.SHUT_WR)
            upstream.join()

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        # A server that goes away with something unread resets the connection: that is an end like any other.
        with contextlib.suppress(OSError):
            while answer := server.recv(1 << 16):
                with contextlib.suppress(OSError):
                    client.sendall(answer)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the listener and all its threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)
        shutil.rmtree(self.directory)


@pytest.fixture
def wire(postgres_server: PostgresServer) -> Iterator[Wire]:
    """A network between the store and the server."""
    made = Wire(postgres_server.directory / ".s.PGSQL.5432")
    yield made
    made.close()


@pytest.mark.parametrize(("cut", "happened"), [("request", []), ("answer", ["once"])])
async def test_the_network_breaks_around_commit(
    postgres_server: PostgresServer,
    database: str,
    wire: Wire,
    cut: Literal["request", "answer"],
    happened: list[str],
) -> None:
    """Whether COMMIT or its answer got lost cannot be known: both are unknown, and reading tells which it was."""
    store = Store.open(f"postgresql+psycopg://dstack@/{database}?host={wire.directory}", sleep=no_sleep)
    wire.cut = cut
    with pytest.raises(StoreOutcomeUnknown, match="Read before doing it again"):
        await store.transact(put("once"))
    wire.cut = None
    query = "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = %s AND state <> 'idle')"
    await appears(postgres_server, query, database)
    assert await store.read(keys) == happened
    await store.close()


async def test_deadlocks_are_resolved(postgres_server: PostgresServer, database: str) -> None:
    """Two transactions that wait for each other both happen: the one that is sacrificed runs again."""
    store = Store.open(postgres_server.url(database))
    await store.transact(lambda session: session.add_all([MetaRow(key="a", value=""), MetaRow(key="b", value="")]))
    both, runs = threading.Barrier(2), []

    def work(session: Session, first: str, second: str) -> None:
        runs.append(first)
        session.get_one(MetaRow, first, with_for_update=True).value += first
        if len(runs) <= 2:
            both.wait(60)
        session.get_one(MetaRow, second, with_for_update=True).value += first

    await asyncio.gather(
        store.transact(lambda session: work(session, "a", "b")), store.transact(lambda session: work(session, "b", "a"))
    )
    values = await store.read(lambda session: list(session.scalars(select(MetaRow.value).order_by(MetaRow.key))))
    assert len(runs) == 3
    assert sorted(values[0]) == sorted(values[1]) == ["a", "b"]
    await store.close()


async def test_serialization_failures_are_tried_again(postgres_server: PostgresServer, database: str) -> None:
    """What the server rolls back for the sake of order is run again."""
    store = Store.open(postgres_server.url(database), sleep=no_sleep)
    runs = []

    def work(session: Session) -> None:
        runs.append(1)
        put("once")(session)
        session.flush()
        if len(runs) < 3:
            session.execute(text("DO $$ BEGIN RAISE 'not now' USING ERRCODE = 'serialization_failure'; END $$"))

    await store.transact(work)
    assert (len(runs), await store.read(keys)) == (3, ["once"])
    await store.close()


async def test_a_violation_found_by_commit_is_no_loss(postgres_server: PostgresServer, database: str) -> None:
    """An error that the server itself answers to COMMIT is definite: nothing happened, and it is not 'unknown'."""
    deferred = "ALTER TABLE meta ADD CONSTRAINT u UNIQUE (value) DEFERRABLE INITIALLY DEFERRED"
    postgres_server.execute(deferred, database=database)
    store = Store.open(postgres_server.url(database))
    await store.transact(put("one"))
    with pytest.raises(Exception, match="duplicate key") as caught:
        await store.transact(put("two"))
    assert type(caught.value).__name__ == "IntegrityError"
    assert await store.read(keys) == ["one"]
    await store.close()


async def test_a_server_that_is_gone_is_unavailable(postgres_server: PostgresServer, database: str, wire: Wire) -> None:
    """When nothing answers any more, the error names the database without its password, and what to look at."""
    url = f"postgresql+psycopg://dstack:hunter2@/{database}?host={wire.directory}"
    store = Store.open(url, sleep=no_sleep)
    (wire.directory / ".s.PGSQL.5432").unlink()
    postgres_server.terminate_connections(database)
    with pytest.raises(
        StoreUnavailable, match=rf"'{database}' at {wire.directory} did not take.*See that it runs"
    ) as e:
        await store.transact(put("lost"))
    assert "hunter2" not in str(e.value)
    await store.close()


async def test_sessions_are_set_up_as_promised(postgres_server: PostgresServer, database: str) -> None:
    """READ COMMITTED for what writes, a snapshot for what reads, UTC, and no lock is held by a replica that sleeps."""
    store = Store.open(postgres_server.url(database))

    def settings(session: Session) -> list[str]:
        names = ("transaction_isolation", "transaction_read_only", "TimeZone", "idle_in_transaction_session_timeout")
        return [str(session.execute(text(f"SHOW {name}")).scalar()) for name in names]

    for _ in range(2):
        assert await store.transact(settings) == ["read committed", "off", "UTC", "1min"]
        assert await store.read(settings) == ["repeatable read", "on", "UTC", "1min"]
    await store.close()
