"""One function, one transaction, on SQLite and PostgreSQL: what it promises, and what it refuses."""

from __future__ import annotations

import asyncio
import functools
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._store import StoreOutcomeUnknown, StoreUnavailable
from dstack_core._store.store import FaultPoint, Store
from dstack_core._store.tables import MetaRow, ProjectRow

T = TypeVar("T")

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def put(key: str, value: str = "") -> Callable[[Session], None]:
    """Returns a function that writes one row."""

    def work(session: Session) -> None:
        session.add(MetaRow(key=key, value=value))

    return work


def keys(session: Session) -> list[str]:
    """Returns which rows there are."""
    return list(session.scalars(select(MetaRow.key).order_by(MetaRow.key)))


def increment(session: Session) -> int:
    """Counts up, reading and writing."""
    row = session.get(MetaRow, "counter", with_for_update=True) or MetaRow(key="counter", value="0")
    row.value = str(int(row.value) + 1)
    session.add(row)
    return int(row.value)


@pytest.mark.anyio
async def test_a_transaction_happens_when_its_function_returns(store: Store) -> None:
    """What the function wrote is there, and what it returned is usable afterwards."""

    def work(session: Session) -> ProjectRow:
        project = ProjectRow(id=uuid4(), name="main", created_at=NOON)
        session.add(project)
        return project

    project = await store.transact(work)
    again = await store.read(lambda session: session.get_one(ProjectRow, project.id))
    assert (again.name, again.created_at) == ("main", NOON) == (project.name, project.created_at)


@pytest.mark.anyio
async def test_a_transaction_that_raises_never_happened(store: Store) -> None:
    """An exception of the function rolls back and comes out as it is."""

    def work(session: Session) -> None:
        put("lost")(session)
        session.flush()
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        await store.transact(work)
    assert await store.read(keys) == []


@pytest.mark.anyio
async def test_a_violated_constraint_is_the_callers_business(store: Store) -> None:
    """IntegrityError comes out unchanged, also when only COMMIT's flush finds it; the values are not in its text."""
    await store.transact(put("one"))
    with pytest.raises(IntegrityError) as caught:
        await store.transact(put("one", "my-secret"))
    assert "my-secret" not in str(caught.value)
    assert await store.read(keys) == ["one"]


@pytest.mark.anyio
async def test_savepoints_undo_a_part(store: Store) -> None:
    """A part that fails can be undone without the rest."""

    def work(session: Session) -> None:
        put("one")(session)
        session.flush()
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO meta (key, value) VALUES ('one', '')"))
        put("two")(session)

    await store.transact(work)
    assert await store.read(keys) == ["one", "two"]


@pytest.mark.anyio
async def test_a_transaction_cannot_span_an_await(store: Store) -> None:
    """Coroutine functions, and functions that return something to be used later, are refused and write nothing."""

    async def later(_session: Session) -> None: ...

    def sneaky(session: Session) -> Any:
        put("lost")(session)
        return later(session)

    def lazy(session: Session) -> Iterator[str]:
        yield from keys(session)

    for use in (store.transact, store.read):
        for fn in (later, functools.partial(later)):
            with pytest.raises(TypeError, match=r"takes a plain function.*cannot span an await"):
                _ = use(fn)
        with pytest.raises(TypeError, match=r"returned a coroutine.*cannot span an await"):
            await use(sneaky)
        with pytest.raises(TypeError, match=r"returned a generator.*cannot span an await"):
            await use(lazy)
    assert await store.read(keys) == []


@pytest.mark.anyio
async def test_no_transaction_within_a_transaction(store: Store) -> None:
    """Asking for a transaction from within one is refused at once; the outer one is rolled back."""

    def work(session: Session) -> None:
        put("outer")(session)
        _ = store.transact(put("inner"))

    with pytest.raises(RuntimeError, match=r"store\.transact was called from within a transaction's function"):
        await store.transact(work)
    with pytest.raises(RuntimeError, match=r"store\.read was called from within"):
        await store.read(lambda _session: [store.read(keys)])
    assert await store.read(keys) == []


@pytest.mark.anyio
async def test_only_the_store_ends_a_transaction(store: Store) -> None:
    """A function cannot commit or roll back half of what it does."""
    with pytest.raises(RuntimeError, match="commits when the function returns"):
        await store.transact(lambda session: session.commit())
    with pytest.raises(RuntimeError, match="begin_nested"):
        await store.transact(lambda session: session.rollback())


@pytest.mark.anyio
async def test_reading_cannot_write(store: Store) -> None:
    """A write by a reading function fails, and says what to use instead, also if it would only be flushed later."""
    with pytest.raises(RuntimeError, match=r"writes: what writes is given to store\.transact"):
        await store.read(lambda session: session.execute(text("INSERT INTO meta (key, value) VALUES ('a', 'b')")))
    with pytest.raises(RuntimeError, match=r"put.*changes rows: what writes is given to store\.transact"):
        await store.read(put("one"))
    assert await store.read(keys) == []


@pytest.mark.anyio
async def test_reading_sees_one_state(store: Store) -> None:
    """Two queries of one reading function see the same rows, whatever is written between them."""
    await store.transact(put("one"))
    looked, written = threading.Event(), threading.Event()

    def twice(session: Session) -> tuple[list[str], list[str]]:
        first = keys(session)
        looked.set()
        assert written.wait(60)
        return first, keys(session)

    reading = asyncio.create_task(store.read(twice))
    assert await asyncio.to_thread(looked.wait, 60)
    await store.transact(put("two"))
    written.set()
    assert await reading == (["one"], ["one"])
    assert await store.read(keys) == ["one", "two"]


@pytest.mark.anyio
async def test_transactions_do_not_lose_each_other(store: Store) -> None:
    """Any number of transactions at once that read and write one row all count."""
    await store.transact(increment)
    results = await asyncio.gather(*(store.transact(increment) for _ in range(60)))
    assert sorted(results) == list(range(2, 62))


@pytest.mark.anyio
async def test_times_are_aware_and_the_same_everywhere(store: Store) -> None:
    """Any time zone goes in, UTC comes out; a time without zone is refused."""
    elsewhere = NOON.astimezone(timezone(timedelta(hours=5, minutes=30))) + timedelta(microseconds=1)

    def work(session: Session, at: datetime, name: str) -> UUID:
        project = ProjectRow(id=uuid4(), name=name, created_at=at)
        session.add(project)
        return project.id

    added = await store.transact(lambda session: work(session, elsewhere, "one"))
    back = await store.read(lambda session: session.get_one(ProjectRow, added).created_at)
    assert back == elsewhere
    assert back.utcoffset() == timedelta(0)
    with pytest.raises(Exception, match="naive datetime"):
        await store.transact(lambda session: work(session, NOON.replace(tzinfo=None), "two"))


@pytest.mark.anyio
async def test_a_cancelled_transaction_ends_on_its_own(store: Store) -> None:
    """Cancelling the caller neither stops a transaction half way nor harms the store."""
    begun, proceed = threading.Event(), threading.Event()

    def work(session: Session) -> None:
        put("one")(session)
        begun.set()
        assert proceed.wait(60)

    task = asyncio.create_task(store.transact(work))
    assert await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    proceed.set()
    await store.close()
    # Closing waited for it: it is there for whoever opens next.
    assert begun.is_set()


@pytest.mark.anyio
async def test_closing_waits_and_ends(store_url: str) -> None:
    """What was begun is finished; afterwards the store refuses, and is empty-handed."""
    store = Store.open(store_url)
    pending = [asyncio.create_task(store.transact(put(f"{number:02}"))) for number in range(20)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*pending)
    with pytest.raises(RuntimeError, match="the store is closed"):
        await store.transact(increment)
    await store.close()
    again = Store.open(store_url)
    assert len(await again.read(keys)) == 20
    await again.close()


@pytest.mark.anyio
async def test_what_a_request_waits_for_goes_ahead(store_url: str) -> None:
    """It passes all that wait, and while requests are answered the others go on, one at a time."""
    store = Store.open(store_url)
    done: list[str] = []

    async def step(name: str, *, ahead: bool = False) -> None:
        await store.transact(put(name), ahead=ahead)
        done.append(name)

    with store.ahead():
        steps = [asyncio.create_task(step(f"step {number:03}")) for number in range(50)]
        await asyncio.sleep(0)
        await step("request", ahead=True)
        assert len(done) < 25
        await asyncio.gather(*steps[:3])
    await asyncio.gather(*steps)
    if store.dialect == "sqlite":
        assert [name for name in done if name != "request"] == sorted(done)[1:]
    await store.close()


@pytest.mark.anyio
async def test_a_cancelled_turn_is_passed_on(store_url: str) -> None:
    """Whoever gives up while waiting keeps nobody else from the database."""
    store = Store.open(store_url)
    with store.ahead():
        waiting = [
            asyncio.create_task(store.transact(put(f"{number:03}"), ahead=number % 2 == 0)) for number in range(40)
        ]
        await asyncio.sleep(0)
        for task in waiting[::3]:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await store.transact(increment, ahead=True)
    await store.transact(increment)
    await store.close()


@pytest.mark.anyio
async def test_a_simulator_runs_it_inline(store_url: str) -> None:
    """With a runner of one's own there are no threads: work runs where the caller is."""
    ran: list[tuple[bool, threading.Thread]] = []

    async def run(work: Callable[[], T], *, write: bool) -> T:
        ran.append((write, threading.current_thread()))
        return work()

    before = threading.active_count()
    store = Store.open(store_url, run=run)
    await store.transact(put("one"))
    assert await store.read(keys) == ["one"]
    assert ran == [(True, threading.current_thread()), (False, threading.current_thread())]
    assert threading.active_count() == before
    await store.close()


# Lost connections and crashes, injected.


class Script:
    """Loses the connection, or crashes, at the points that it is told."""

    def __init__(self, *plan: FaultPoint | BaseException | None) -> None:
        self.plan = list(plan)
        self.seen: list[FaultPoint] = []

    def __call__(self, point: FaultPoint) -> None:
        self.seen.append(point)
        if not self.plan:
            return
        match self.plan[0]:
            case BaseException() as crash:
                self.plan.pop(0)
                raise crash
            case wanted if wanted == point:
                self.plan.pop(0)
                raise ConnectionResetError(f"injected {point}")
            case None:
                self.plan.pop(0)


LOST_AGAIN: list[FaultPoint] = ["before commit"] * 100


async def no_sleep(_seconds: float) -> None:
    """Waits no time."""


@pytest.mark.anyio
async def test_lost_before_commit_is_tried_again(store_url: str) -> None:
    """A connection lost before COMMIT costs a retry; the transaction happens once."""
    script = Script("before commit", "before commit")
    store = Store.open(store_url, faults=script, sleep=no_sleep)
    assert await store.transact(increment) == 1
    assert script.seen == ["before commit", "before commit", "before commit", "after commit"]
    assert await store.transact(increment) == 2
    await store.close()


@pytest.mark.anyio
async def test_lost_in_commit_is_said_and_not_repeated(store_url: str) -> None:
    """A connection lost after COMMIT leaves the outcome unknown: it is never run again blindly."""
    script = Script("after commit")
    store = Store.open(store_url, faults=script, sleep=no_sleep)
    with pytest.raises(StoreOutcomeUnknown, match=r"broke during COMMIT.*injected.*Read before doing it again"):
        await store.transact(increment)
    assert script.seen == ["before commit", "after commit"]
    assert await store.read(keys) == ["counter"]
    await store.close()


@pytest.mark.anyio
async def test_retries_end(store_url: str) -> None:
    """A database that never takes the transaction is unavailable, and nothing was written."""
    store = Store.open(store_url, faults=Script(*LOST_AGAIN), sleep=no_sleep)
    with pytest.raises(StoreUnavailable, match=r"tried 10 times \(injected before commit\)"):
        await store.transact(increment)
    assert await store.read(keys) == []
    await store.close()


@pytest.mark.anyio
async def test_a_crash_comes_through(store_url: str) -> None:
    """Any other exception of the fault hook is a crash at that point: before COMMIT nothing is left."""
    store = Store.open(store_url, faults=Script(SystemError("crash")), sleep=no_sleep)
    with pytest.raises(SystemError, match="crash"):
        await store.transact(increment)
    assert await store.transact(increment) == 1
    await store.close()


# Other processes.

HOLDER = """
import asyncio, sys
from dstack_core._store.store import Store
from dstack_core._store.tables import MetaRow

def work(session):
    session.add(MetaRow(key="half", value=""))
    session.flush()
    print("writing", flush=True)
    sys.stdin.readline()

store = Store.open(sys.argv[1])
asyncio.run(store.transact(work))
"""


def holder(url: str) -> subprocess.Popen[str]:
    """Starts a process that stays within a transaction until it gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.anyio
async def test_a_process_killed_in_a_transaction_leaves_nothing(store_url: str) -> None:
    """SIGKILL within a transaction: nothing of it is there, and its locks are free at once."""
    store = Store.open(store_url)
    with holder(store_url) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    await store.transact(put("half"))
    assert await store.read(keys) == ["half"]
    await store.close()


@pytest.mark.anyio
async def test_sqlite_waits_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes, a transaction is tried again until that is done."""
    monkeypatch.setattr("dstack_core._store.databases.BUSY_TIMEOUT", 0.01)
    url = f"sqlite:///{tmp_path / 'server.db'}"
    pauses: list[float] = []

    async def release(pause: float) -> None:
        pauses.append(pause)
        if process.poll() is None:
            await asyncio.to_thread(process.communicate, "go on\n", 60)

    store = Store.open(url, sleep=release)
    process = holder(url)
    await store.transact(put("mine"))
    assert pauses[0] > 0
    assert await store.read(keys) == ["half", "mine"]
    await store.close()


@pytest.mark.anyio
async def test_sqlite_locked_for_good_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that does not go away ends in an error that names the file and what to look for; reading still works."""
    monkeypatch.setattr("dstack_core._store.databases.BUSY_TIMEOUT", 0.01)
    path = tmp_path / "server.db"
    store = Store.open(None, path, sleep=no_sleep)
    with holder(f"sqlite:///{path}") as process:
        with pytest.raises(StoreUnavailable, match=rf"{path}.*database is locked.*another program"):
            await store.transact(put("mine"))
        assert await store.read(keys) == []
        process.communicate("go on\n", 60)
    await store.transact(put("mine"))
    await store.close()


def test_many_processes_open_a_blank_database_at_once(blank_store_url: str) -> None:
    """Six processes that start together on nothing all get the same tables, made once."""
    code = (
        "import asyncio, sys; from dstack_core._store.store import Store; sys.stdin.readline();"
        "store = Store.open(sys.argv[1]); asyncio.run(store.close()); print('fine', 'alembic' in sys.modules)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, blank_store_url], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[0] for process in started] == ["fine False\n"] * 6


# The file.


@pytest.mark.anyio
async def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """The database and its companions have mode 0600, also where a wider file was there before."""
    path = tmp_path / "server.db"
    path.touch(0o644)
    store = Store.open(None, path)
    await store.transact(put("secret"))
    assert modes(tmp_path) == {"server.db": 0o600, "server.db-wal": 0o600, "server.db-shm": 0o600}
    await store.close()
    assert modes(tmp_path) == {"server.db": 0o600}


def modes(directory: Path) -> dict[str, int]:
    """Returns the mode of each file."""
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


def open_files() -> int:
    """Counts this process's open files."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.anyio
async def test_sqlite_is_set_up_as_promised(tmp_path: Path) -> None:
    """WAL, synchronous=NORMAL, foreign keys and the busy time-out hold on the connections that are used."""
    store = Store.open(None, tmp_path / "server.db")

    def settings(session: Session) -> list[Any]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        # A connection learns of WAL when it reads.
        keys(session)
        return [session.execute(text(f"PRAGMA {name}")).scalar() for name in names]

    assert await store.transact(settings) == ["wal", 1, 1, 50]
    assert await store.read(settings) == ["wal", 1, 1, 50]
    await store.close()


@pytest.mark.anyio
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
async def test_closing_closes_files(tmp_path: Path) -> None:
    """A closed store holds no file and no thread."""
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        store = Store.open(None, tmp_path / "server.db")
        await asyncio.gather(*(store.read(keys) for _ in range(8)), *(store.transact(increment) for _ in range(8)))
        await store.close()
    # One file and one thread for the event loop's own pool, which `close` uses.
    assert open_files() == files
    assert threading.active_count() <= threads + 3
