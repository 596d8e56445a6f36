"""`await store.transact(fn)`: one short transaction, of a plain function, so that it can never span an await.

    async def rename(store: Store, run_id: UUID, name: str) -> None:
        def work(session: Session) -> None:
            session.get_one(RunRow, run_id, with_for_update=True).name = name

        await store.transact(work)

The function may be run more than once (a deadlock, a lock that was not to be had, a connection lost before COMMIT), so
it does nothing but read and write rows. What it returns outlives the session: rows are detached, with what was loaded.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, Self, TypeVar
from uuid import UUID

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from dstack_core._store import StoreDamaged, StoreError, StoreOutcomeUnknown, StoreUnavailable
from dstack_core._store import records as rows
from dstack_core._store.databases import Database, Trouble, open_database
from dstack_core._store.schema import prepare
from dstack_core._store.tables import Base

__all__ = [
    "FaultPoint",
    "Faults",
    "Runner",
    "Store",
    "StoreDamaged",
    "StoreError",
    "StoreOutcomeUnknown",
    "StoreUnavailable",
]

T = TypeVar("T")

FaultPoint = Literal["before commit", "after commit"]
Faults = Callable[[FaultPoint], None]
"""Called at each point of each transaction that writes. Raising `ConnectionError` there is the connection lost at that
moment, to which the store reacts as to a real loss; any other exception comes out of `transact` as it is (a crash)."""

PAUSES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 1.0, 2.0)
"""Seconds between the tries of a transaction."""


class Runner(Protocol):
    """Runs the blocking part of a transaction. A simulator's runs it at once; the default one in a thread."""

    def __call__(self, work: Callable[[], T], *, write: bool) -> Awaitable[T]:
        """Returns what `work` returns."""


class Store:
    """A database. Make one with `Store.open`, and close it."""

    def __init__(
        self,
        database: Database,
        *,
        run: Runner | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        faults: Faults | None = None,
    ) -> None:
        self._database = database
        self._threads = None if run else _Threads(database)
        self._turns = _Turns(database.writers)
        self._run: Runner = run or self._in_threads
        self._sleep = sleep
        self._faults = faults
        self._here = threading.local()

    @classmethod
    def open(
        cls,
        url: str | None = None,
        path: Path | None = None,
        *,
        run: Runner | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        faults: Faults | None = None,
    ) -> Self:
        """Opens a database and makes or migrates its tables. Blocks: call it before the event loop runs.

        Args:
            url: what `DSTACK_DATABASE_URL` says: `postgresql+psycopg://…` or `sqlite:////path`.
            path: the SQLite file to use when there is no URL (`None` or `""`).
            run: runs a transaction's blocking part, in place of the store's own threads.
            sleep: waits between tries.
            faults: called at the points of a transaction where a connection may be lost.

        Raises:
            ConfigurationError: the URL cannot be read, the driver is missing, the file cannot be written, or the
                database is of a newer version or of another program.
            StoreDamaged: the file is not a database.
            StoreUnavailable: the database does not answer.
        """
        database = open_database(url, path)
        try:
            prepare(database)
        except BaseException:
            database.dispose()
            raise
        return cls(database, run=run, sleep=sleep, faults=faults)

    @property
    def dialect(self) -> str:
        """`"sqlite"` or `"postgresql"`."""
        return self._database.dialect

    @property
    def place(self) -> str:
        """Where the database is, for people. Never a password."""
        return self._database.place

    def ahead(self) -> AbstractContextManager[None]:
        """While a request is being answered: transactions that are no part of it mostly wait."""
        return self._turns.ahead()

    def transact(
        self, fn: Callable[[Session], T], *, ahead: bool = False, quick: bool = False
    ) -> Coroutine[Any, Any, T]:
        """Runs `fn(session)` as one transaction: committed when it returns, rolled back when it raises.

        An exception of `fn` comes out as it is, violated constraints (`sqlalchemy.exc.IntegrityError`) among them.
        `fn` is run again where the database asks for it. Cancelled: a transaction that has begun ends on its own.

        Args:
            fn: reads and writes rows, and does nothing else.
            ahead: a request waits for it, so it does not queue behind the engine's own.
            quick: it looks at a few rows by their keys. On SQLite that takes less time than handing it to a thread, so
                it runs where it is.

        Raises:
            TypeError: `fn` is a coroutine function or returned something to await: a transaction cannot span an await.
            RuntimeError: called from within a transaction's function, or the store is closed.
            StoreUnavailable: nothing was written, in spite of all retries.
            StoreOutcomeUnknown: the connection broke during COMMIT.
        """
        self._check(fn, "transact")
        return self._in_turn(functools.partial(self._write, fn), ahead=ahead, quick=quick)

    def read(self, fn: Callable[[Session], T], *, quick: bool = False) -> Coroutine[Any, Any, T]:
        """Runs `fn(session)` on one consistent state of the database. Writing is an error. As `transact` otherwise."""
        self._check(fn, "read")
        return self._repeat(functools.partial(self._look, fn), write=False, quick=quick)

    async def close(self) -> None:
        """Ends after the transactions that have begun. Closing twice is fine."""
        await self._turns.end()
        threads, self._threads = self._threads, None
        if threads:
            await asyncio.to_thread(threads.close)
        self._database.dispose()

    def _check(self, fn: Callable[[Session], T], name: str) -> None:
        if getattr(self._here, "busy", False):
            raise RuntimeError(f"store.{name} was called from within a transaction's function: use its session instead")
        if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(f"store.{name} takes a plain function, not the coroutine function {_name(fn)}: {_NO_AWAIT}")

    async def _in_turn(self, work: Callable[[], T], *, ahead: bool, quick: bool) -> T:
        await self._turns.take(ahead=ahead)
        try:
            return await self._repeat(work, write=True, quick=quick)
        finally:
            self._turns.give_back()

    async def _repeat(self, work: Callable[[], T], *, write: bool, quick: bool = False) -> T:
        run = self._here_and_now if quick and self._threads and self.dialect == "sqlite" else self._run
        for pause in PAUSES:
            try:
                return await run(work, write=write)
            except _Again:
                await self._sleep(pause)
        try:
            return await run(work, write=write)
        except _Again as again:
            raise StoreUnavailable(
                f"{self.place} did not take the transaction, tried {len(PAUSES) + 1} times ({again}). "
                f"{self._database.cure}."
            ) from again.__cause__

    async def _here_and_now(self, work: Callable[[], T], *, write: bool) -> T:  # noqa: ARG002  # a Runner
        return work()

    def _in_threads(self, work: Callable[[], T], *, write: bool) -> Awaitable[T]:
        if self._threads is None:
            raise RuntimeError(f"the store is closed: it cannot {'write' if write else 'read'} any more")
        return asyncio.get_running_loop().run_in_executor(self._threads.of(write), work)

    def _write(self, fn: Callable[[Session], T]) -> T:
        with _TransactSession(self._database.writer) as session:
            try:
                value = self._call(fn, session)
                session.flush()
                self._fault("before commit")
            except (DBAPIError, _Lost) as error:
                self._failed(error)
            try:
                session.commit_all()
                self._fault("after commit")
            except (DBAPIError, _Lost) as error:
                self._failed(error, committing=True)
        return value

    def _look(self, fn: Callable[[Session], T]) -> T:
        with _TransactSession(self._database.reader) as session:
            try:
                value = self._call(fn, session)
            except DBAPIError as error:
                if self._database.trouble(error) is Trouble.READONLY:
                    raise RuntimeError(f"{_name(fn)} writes: {_NO_WRITE}") from error
                self._failed(error)
            if session.changed():
                raise RuntimeError(f"{_name(fn)} changes rows: {_NO_WRITE}")
        return value

    def _call(self, fn: Callable[[Session], T], session: Session) -> T:
        self._here.busy = True
        try:
            value = fn(session)
        finally:
            self._here.busy = False
        if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            if inspect.iscoroutine(value):
                value.close()
            raise TypeError(
                f"{_name(fn)} returned a {type(value).__name__} to be used after the transaction: {_NO_AWAIT}"
            )
        return value

    def _fault(self, point: FaultPoint) -> None:
        if self._faults:
            try:
                self._faults(point)
            except ConnectionError as error:
                raise _Lost(str(error)) from error

    def _failed(self, error: DBAPIError | _Lost, *, committing: bool = False) -> NoReturn:
        """Raises what an error means for the transaction."""
        trouble = Trouble.LOST if isinstance(error, _Lost) else self._database.trouble(error)
        words = self._database.scrub(error)
        match trouble:
            case Trouble.LOST if committing:
                raise StoreOutcomeUnknown(
                    f"The connection to {self.place} broke during COMMIT ({words}): "
                    "the transaction happened wholly or not at all. Read before doing it again."
                ) from error
            case Trouble.LOST | Trouble.AGAIN:
                raise _Again(words) from error
            case Trouble.FULL | Trouble.READONLY:
                raise StoreUnavailable(
                    f"{self.place} cannot be written ({words}). See to room and permissions."
                ) from error
            case Trouble.DAMAGED:
                raise StoreDamaged(f"{self.place} is damaged ({words}). Stop the server and restore a copy.") from error
        raise error


class _Again(Exception):
    """Nothing of the transaction was written, and it may be run again."""


class _Lost(Exception):
    """An injected loss of the connection."""


class _TransactSession(Session):
    """A session whose transaction is not its user's to end."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(expire_on_commit=False)
        self._engine = engine
        self.records: dict[tuple[type[Base], UUID], rows.Record] = {}
        self._link: Connection | None = None

    def connection(self, *_: Any, **__: Any) -> Connection:
        """The one connection of the transaction, which begins with its first use."""
        if self._link is None:
            self._link = self._engine.connect()
            self._link.begin()
        return self._link

    def get_bind(self, *_: Any, **__: Any) -> Connection:
        """What the ORM joins when it is used."""
        return self.connection()

    def commit_all(self) -> None:
        """Commits, after everything was flushed."""
        if self.in_transaction():
            super().commit()
        if self._link is not None:
            self._link.commit()

    def close(self) -> None:
        """Rolls back what is not committed, and gives the connection back."""
        try:
            super().close()
        finally:
            link, self._link = self._link, None
            if link is not None:
                link.close()

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Writes what was changed, on records and on rows of the ORM."""
        if self.records:
            rows.flush(self, [(table, record) for (table, _), record in self.records.items()])
        super().flush(objects)

    def changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.new or self.dirty or self.deleted or any(one.changes() for one in self.records.values()))

    def commit(self) -> NoReturn:
        raise RuntimeError("the store commits when the function returns")

    def rollback(self) -> NoReturn:
        raise RuntimeError("the store rolls back when the function raises; for a part of it use session.begin_nested()")


class _Turns:
    """Requests first: whoever made one waits for it, and the engine's own steps can wait.

    No more transactions begin at once than there are writers. One that goes ahead takes the next place. The others come
    one by one, and while a request is being answered at intervals only: each of them takes the interpreter from it.
    """

    INTERVAL = 0.01

    def __init__(self, writers: int) -> None:
        self._free = writers
        self._first: deque[asyncio.Future[None]] = deque()
        self._second: deque[asyncio.Future[None]] = deque()
        self._head = asyncio.Lock()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._requests = 0
        self._begun = 0.0
        self._inside = 0
        self._empty: asyncio.Event | None = None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """A request is being answered."""
        self._requests += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._quiet.set()

    async def take(self, *, ahead: bool) -> None:
        """Waits for a place, which is to be given back."""
        self._inside += 1
        try:
            await self._wait(ahead=ahead)
        except BaseException:
            self._leave()
            raise

    async def end(self) -> None:
        """Returns when everybody who came has left."""
        while self._inside:
            self._empty = asyncio.Event()
            await self._empty.wait()

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside and self._empty:
            self._empty.set()

    async def _wait(self, *, ahead: bool) -> None:
        if ahead:
            await self._take(self._first)
        else:
            # At most one of these waits for a place, so what goes ahead has to pass one of them at most.
            async with self._head:
                if self._requests:
                    await self._let_pass()
                await self._take(self._second)

    def give_back(self) -> None:
        """Lets the next one in."""
        self._leave()
        self._next()

    def _next(self) -> None:
        while queue := self._first or self._second:
            place = queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    async def _take(self, queue: deque[asyncio.Future[None]]) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._next()
            raise

    async def _let_pass(self) -> None:
        """Until no request is being answered, or it has been long enough."""
        loop = asyncio.get_running_loop()
        left = self._begun + self.INTERVAL - loop.time()
        if left > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._quiet.wait()
        self._begun = loop.time()


class _Threads:
    """SQLite has one thread that writes and some that read; PostgreSQL one set for both."""

    def __init__(self, database: Database) -> None:
        self._write: Executor = ThreadPoolExecutor(database.writers, "dstack-store")
        self._read = ThreadPoolExecutor(database.readers, "dstack-store-read") if database.readers else self._write

    def of(self, write: bool) -> Executor:
        """Returns the threads for one kind of transaction."""
        return self._write if write else self._read

    def close(self) -> None:
        """Waits for what runs, and drops nothing that was accepted."""
        self._write.shutdown()
        self._read.shutdown()


_NO_WRITE = "what writes is given to store.transact"
_NO_AWAIT = "a transaction cannot span an await. Fetch what it needs before, and send what it decides after"


def _name(fn: Callable[..., object]) -> str:
    return getattr(fn, "__qualname__", repr(fn))
