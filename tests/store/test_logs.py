"""The bytes of jobs: exactly once by offset, whatever is killed; gaps; time stamps; followers; no room."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_core._store import LogStoreClosed, LogStoreFull
from dstack_core._store.logs import LogStore
from dstack_core.testing import wait_until

T = TypeVar("T")

JOB = "0190b6f0-0000-7000-8000-000000000001"


def at(us: int) -> datetime:
    """Returns the time that many microseconds after 1970."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


async def everything(logs: LogStore, job: str = JOB) -> list[tuple[int, bytes]]:
    """Returns all pieces of a log."""
    pieces = []
    offset = 0
    while (piece := await logs.read(job, offset))[1]:
        pieces.append(piece)
        offset = piece[0] + len(piece[1])
    return pieces


async def follow(logs: LogStore, job: str = JOB, offset: int = 0) -> AsyncIterator[bytes]:
    """Follows a log to its end, as the docstring of `LogStore` shows."""
    while True:
        offset, data = await logs.read(job, offset)
        if data:
            yield data
            offset += len(data)
        elif (state := await logs.wait(job, offset, timeout=30)).complete and state.end <= offset:
            return


@pytest.fixture
async def logs(tmp_path: Path, anyio_backend: str) -> AsyncIterator[LogStore]:
    """An empty store."""
    store = LogStore(tmp_path / "logs")
    yield store
    await store.aclose()


@pytest.mark.anyio
async def test_bytes_come_back_as_they_were(logs: LogStore) -> None:
    """Any bytes, non-UTF-8 among them, are stored and read from any offset."""
    data = bytes(range(256)) * 40
    assert await logs.append(JOB, 0, data[:5000]) == 5000
    assert await logs.append(JOB, 5000, data[5000:]) == len(data)
    assert await logs.read(JOB, 0) == (0, data)
    assert await logs.read(JOB, 1234, limit=10) == (1234, data[1234:1244])
    assert await logs.read(JOB, len(data)) == (len(data), b"")
    assert await logs.end(JOB) == len(data)


@pytest.mark.anyio
async def test_an_unknown_job_is_an_empty_one(logs: LogStore) -> None:
    """Reading, asking and deleting need no job that exists."""
    assert await logs.read(JOB, 0) == (0, b"")
    assert await logs.state(JOB) == (0, False, 0)
    assert await logs.offset_at(JOB, at(1)) == 0
    await logs.delete(JOB)


@pytest.mark.anyio
async def test_what_is_there_already_is_ignored(logs: LogStore) -> None:
    """A repeated or overlapping chunk adds only what is new."""
    await logs.append(JOB, 0, b"hello ", [(0, 10)])
    assert await logs.append(JOB, 0, b"hello ", [(0, 10)]) == 6
    assert await logs.append(JOB, 3, b"lo world", [(3, 10), (6, 20)]) == 11
    assert await logs.append(JOB, 2, b"l") == 11
    assert await logs.read(JOB, 0) == (0, b"hello world")
    assert await logs.offset_at(JOB, at(11)) == 6


@pytest.mark.anyio
async def test_lost_bytes_are_a_gap(logs: LogStore) -> None:
    """An offset behind the end records a gap: reads stop before it and go on behind it."""
    await logs.append(JOB, 0, b"before")
    await logs.append(JOB, 1 << 33, b"after")
    assert await logs.read(JOB, 2) == (2, b"fore")
    assert await logs.read(JOB, 6) == (1 << 33, b"after")
    assert await logs.read(JOB, 1 << 20) == (1 << 33, b"after")
    assert await logs.state(JOB) == ((1 << 33) + 5, False, (1 << 33) - 6)
    assert (logs._directory / f"{JOB}.log").stat().st_blocks < 100


@pytest.mark.anyio
async def test_a_gap_at_the_end_needs_no_bytes(logs: LogStore, tmp_path: Path) -> None:
    """Bytes lost at the very end of a job are known as lost, also after a restart."""
    await logs.append(JOB, 0, b"x")
    assert await logs.append(JOB, 100, b"") == 100
    again = LogStore(tmp_path / "logs")
    assert await again.state(JOB) == (100, False, 99)
    assert await again.read(JOB, 1) == (100, b"")
    await again.aclose()


@pytest.mark.anyio
async def test_offset_at_finds_the_first_byte_not_before(logs: LogStore) -> None:
    """A start time is looked up by time stamps, through gaps, and answers the end for the future."""
    await logs.append(JOB, 0, b"a" * 10, [(0, 1_000), (4, 2_000)])
    await logs.append(JOB, 50, b"b" * 10, [(50, 5_000)])
    await logs.close_job(JOB)
    expected = {0: 0, 1_000: 0, 1_001: 4, 2_000: 4, 2_001: 50, 5_000: 50, 5_001: 60}
    assert {us: await logs.offset_at(JOB, at(us)) for us in expected} == expected


@pytest.mark.anyio
async def test_a_clock_that_goes_back_does_not_spoil_the_index(logs: LogStore) -> None:
    """Time stamps before the last one count as the last one."""
    await logs.append(JOB, 0, b"a" * 30, [(0, 1_000), (10, 500), (20, 2_000)])
    assert [await logs.offset_at(JOB, at(us)) for us in (600, 1_000, 1_500)] == [0, 0, 20]


@pytest.mark.anyio
async def test_a_complete_log_takes_no_more(logs: LogStore, tmp_path: Path) -> None:
    """Completion is remembered across restarts; repeated bytes are still fine, new ones are not."""
    await logs.append(JOB, 0, b"all")
    await logs.close_job(JOB)
    await logs.close_job(JOB)
    again = LogStore(tmp_path / "logs")
    assert await again.state(JOB) == (3, True, 0)
    assert await again.append(JOB, 0, b"all") == 3
    with pytest.raises(LogStoreClosed, match="complete with 3 bytes"):
        await again.append(JOB, 3, b"!")
    await again.aclose()


@pytest.mark.anyio
async def test_delete_leaves_nothing(logs: LogStore, tmp_path: Path) -> None:
    """After deletion there is no file, and the job is unknown."""
    await logs.append(JOB, 0, b"x" * 100)
    await logs.delete(JOB)
    assert list((tmp_path / "logs").iterdir()) == []
    assert await logs.read(JOB, 0) == (0, b"")
    assert await logs.end(JOB) == 0


@pytest.mark.anyio
async def test_logs_are_for_their_owner_alone(logs: LogStore, tmp_path: Path) -> None:
    """Files have mode 0600, their directory 0700."""
    await logs.append(JOB, 0, b"x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "logs").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0b", "x" * 200])
async def test_an_id_cannot_leave_the_directory(logs: LogStore, name: str) -> None:
    """Ids that are no plain file names are refused."""
    with pytest.raises(ValueError, match="cannot be the id of a job"):
        await logs.append(name, 0, b"x")


@pytest.mark.anyio
async def test_followers_wake_at_once(tmp_path: Path, anyio_backend: str) -> None:
    """An append and a completion in this process wake followers without polling."""
    logs = LogStore(tmp_path / "logs", poll=3600)

    async def collect() -> bytes:
        return b"".join([piece async for piece in follow(logs)])

    followers = [asyncio.create_task(collect()) for _ in range(5)]
    parts = [b"one\n", b"two\n", b"three"]
    offset = 0
    for part in parts:
        await asyncio.sleep(0)
        offset = await logs.append(JOB, offset, part)
    await logs.close_job(JOB)
    assert await asyncio.wait_for(asyncio.gather(*followers), 30) == [b"".join(parts)] * 5
    await logs.aclose()


@pytest.mark.anyio
async def test_wait_ends_with_its_timeout(logs: LogStore) -> None:
    """Without news, waiting answers the state after the timeout."""
    await logs.append(JOB, 0, b"x")
    assert await logs.wait(JOB, 1, timeout=0.05) == (1, False, 0)
    assert await logs.wait(JOB, 1, timeout=0) == (1, False, 0)
    assert await logs.wait(JOB, 0, timeout=3600) == (1, False, 0)


@pytest.mark.anyio
async def test_followers_see_another_process(logs: LogStore, tmp_path: Path) -> None:
    """What a second process writes arrives by polling, its end included."""
    with run_writer(tmp_path / "logs", seed=1, total=200_000, close=True) as writer:
        got = b"".join([piece async for piece in follow(logs)])
    assert writer.returncode == 0
    assert got == stream(1, 200_000)


# One process appends, is killed, and another one goes on.

WRITER = """
import asyncio, random, sys
from pathlib import Path
from dstack_core._store.logs import LogStore

directory, seed, total, close = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "close"
data = random.Random(seed).randbytes(total)

async def main():
    logs = LogStore(directory)
    sizes = random.Random()
    offset = await logs.end("JOB_ID")
    print("ready", flush=True)
    while offset < total:
        # As after a crash, the agent is asked again for what may be there already.
        start = max(0, offset - sizes.choice([0, 0, 7, 3000]))
        part = data[start : start + sizes.choice([1, 100, 5000, 70_000, 1 << 20])]
        index = [(at, 1_000_000 + at) for at in range(start, start + len(part), max(1, len(part) // 4))]
        offset = await logs.append("JOB_ID", start, part, index)
    if close:
        await logs.close_job("JOB_ID")
    await logs.aclose()

asyncio.run(main())
""".replace("JOB_ID", JOB)


def stream(seed: int, total: int) -> bytes:
    """Returns the bytes that a writer process writes."""
    return random.Random(seed).randbytes(total)


def run_writer(directory: Path, *, seed: int, total: int, close: bool = False) -> subprocess.Popen[str]:
    """Starts a writer process."""
    arguments = [str(directory), str(seed), str(total), "close" if close else "open"]
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], text=True, stdout=subprocess.PIPE)


def test_killed_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    """After any number of SIGKILLs in the middle of appends the bytes are exactly those that were written."""
    total = 48 << 20
    data, rng = stream(7, total), random.Random(11)
    path, kills = tmp_path / f"{JOB}.log", 0
    while True:
        with run_writer(tmp_path, seed=7, total=total, close=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            goal = path.stat().st_size + rng.randrange(8 << 20) if path.exists() else rng.randrange(1 << 20)
            wait_until(partial(has_grown, writer, path, goal), what="bytes to appear")
            writer.send_signal(signal.SIGKILL)
        kills += writer.returncode == -signal.SIGKILL
        assert path.read_bytes() == data[: path.stat().st_size]
        if writer.returncode == 0:
            break
    assert kills >= 3
    asyncio.run(check_index(tmp_path, data))


def has_grown(writer: subprocess.Popen[str], path: Path, goal: int) -> bool:
    """Says whether a file is larger than that, or its writer is done."""
    return writer.poll() is not None or (path.exists() and path.stat().st_size > goal)


async def check_index(directory: Path, data: bytes) -> None:
    """Checks a finished log as a reader sees it, its time stamps included."""
    logs = LogStore(directory)
    assert b"".join(piece for _, piece in await everything(logs)) == data
    assert await logs.state(JOB) == (len(data), True, 0)
    for offset in range(0, len(data), 999_983):
        # The writer stamps byte N, at the latest, with N microseconds after the first second, a quarter chunk apart.
        assert offset <= await logs.offset_at(JOB, at(1_000_000 + offset)) <= offset + (1 << 20)
    await logs.aclose()


def test_two_writers_of_one_job_do_no_harm(tmp_path: Path) -> None:
    """Two processes that copy the same output at the same time store it once."""
    writers = [run_writer(tmp_path, seed=3, total=4 << 20) for _ in range(2)]
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0]
    logs = LogStore(tmp_path)
    assert asyncio.run(everything(logs)) == pieces_of(stream(3, 4 << 20))
    asyncio.run(logs.aclose())


def pieces_of(data: bytes) -> list[tuple[int, bytes]]:
    """Returns data as `everything` reads it when there is no gap."""
    return [(start, data[start : start + (1 << 20)]) for start in range(0, len(data), 1 << 20)]


@pytest.mark.anyio
@pytest.mark.parametrize("keep", [1, 5, 15, 16, 17, 40])
async def test_any_torn_index_is_mended(logs: LogStore, tmp_path: Path, keep: int) -> None:
    """What a killed writer left in the index beyond the data is cut off by the next one."""
    await logs.append(JOB, 0, b"0123456789", [(0, 100)])
    with (tmp_path / "logs" / f"{JOB}.idx").open("ab") as index:
        index.write((b"\x0a" + bytes(7) + b"\xff" * 8 + b"\x14" + bytes(7) + b"\xff" * 8 + bytes(16))[:keep])
    again = LogStore(tmp_path / "logs")
    assert await again.append(JOB, 10, b"abc", [(10, 200)]) == 13
    assert [await again.offset_at(JOB, at(us)) for us in (100, 101, 201)] == [0, 10, 13]
    assert (tmp_path / "logs" / f"{JOB}.idx").stat().st_size == 32
    await again.aclose()


# No room.

LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from dstack_core._store.logs import LogStore, LogStoreFull

async def main():
    logs = LogStore(Path(sys.argv[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    data = bytes(range(250)) * 1000
    try:
        await logs.append("JOB_ID", 0, data[:60_000], [(0, 1)])
        await logs.append("JOB_ID", 60_000, data[60_000:], [(60_000, 2), (110_000, 3)])
    except LogStoreFull as error:
        print(error, await logs.end("JOB_ID"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    end = await logs.end("JOB_ID")
    await logs.append("JOB_ID", end, data[end:], [(end, 2), (110_000, 3)])
    assert (await logs.read("JOB_ID", 0)) == (0, data)
    assert (await logs.state("JOB_ID")) == (250_000, False, 0)
    await logs.aclose()

asyncio.run(main())
""".replace("JOB_ID", JOB)


def test_no_room_keeps_what_fitted(tmp_path: Path) -> None:
    """A full disk (here: a limit on file sizes) is a typed error with the cure; later it goes on where it stopped."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"No room for the log of job {JOB} in {tmp_path} (File too large). Free some space there. 100000\n"
    )


@pytest.mark.root
@pytest.mark.root
def test_a_full_file_system(tmp_path: Path) -> None:
    """On a file system without room the store says so, keeps what fitted, and goes on when there is room."""
    mounted = tmp_path / "tiny"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", mounted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr}")
    try:
        asyncio.run(fill(mounted))
    finally:
        subprocess.run(["umount", mounted], check=True)


async def fill(directory: Path) -> None:
    """Writes until there is no room, makes room, and goes on."""
    (directory / "ballast").write_bytes(bytes(128 << 10))
    data, logs = random.Random(5).randbytes(220 << 10), LogStore(directory / "logs")
    with pytest.raises(LogStoreFull, match="Free some space"):
        await append_in_parts(logs, data)
    stored = await logs.end(JOB)
    assert 0 < stored < len(data)
    with pytest.raises(LogStoreFull):
        await logs.append(JOB, stored, data[stored:])
    (directory / "ballast").unlink()
    stored = await logs.end(JOB)
    await logs.append(JOB, stored, data[stored:])
    await logs.close_job(JOB)
    assert await everything(logs) == [(0, data)]
    await logs.aclose()


async def append_in_parts(logs: LogStore, data: bytes) -> None:
    """Appends as a job that prints now and then."""
    for start in range(0, len(data), 10_000):
        await logs.append(JOB, start, data[start : start + 10_000], [(start, start + 1)])


# Against a model.


class Model:
    """What a log is: bytes, of which some are lost, and the time of each."""

    def __init__(self) -> None:
        self.bytes: list[int | None] = []
        self.times: list[tuple[int, int]] = []

    def append(self, offset: int, data: bytes, index: list[tuple[int, int]]) -> None:
        end = len(self.bytes)
        if offset + len(data) <= end:
            return
        fresh = max(offset, end)
        last = self.times[-1][1] if self.times else 0
        for start, us in index:
            if start < offset + len(data) and us > last:
                self.times.append((max(start, fresh), us))
                last = us
        self.bytes += [None] * (fresh - end) + list(data[fresh - offset :])

    def pieces(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for offset, byte in enumerate(self.bytes):
            if byte is None:
                continue
            if found and found[-1][0] + len(found[-1][1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + bytes([byte]))
            else:
                found.append((offset, bytes([byte])))
        return found

    def offset_at(self, us: int) -> int:
        return next((offset for offset, time in self.times if time >= us), len(self.bytes))


STEPS = st.lists(
    st.tuples(
        st.integers(-20, 20),
        st.binary(max_size=30),
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), max_size=3),
        st.sampled_from(["go on", "reopen", "torn"]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, looks=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 110)), max_size=5))
def test_it_behaves_as_bytes_do(steps: list[Any], looks: list[tuple[int, int]]) -> None:
    """Any appends, reopened and torn in between, give what a list of bytes gives."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(compare(Path(directory), steps, looks))


def inline() -> Callable[..., Any]:
    """Returns a runner that does the work at once, as a simulator's does."""

    async def run(work: Callable[[], T]) -> T:
        return work()

    return run


async def compare(directory: Path, steps: list[Any], looks: list[tuple[int, int]]) -> None:
    """Does the same to a store and to the model, and compares what can be seen."""
    logs, model = LogStore(directory, run=inline()), Model()
    for shift, data, raw, then in steps:
        offset = max(0, len(model.bytes) + shift)
        index = sorted((offset + start, us) for start, us in raw)
        model.append(offset, data, index)
        assert await logs.append(JOB, offset, data, index) == len(model.bytes)
        if then == "torn":
            with (directory / f"{JOB}.idx").open("ab") as file:
                file.write((len(model.bytes) + shift % 3).to_bytes(8, "little") + b"\x01")
        if then != "go on":
            logs = LogStore(directory, run=inline())
    assert await everything(logs) == model.pieces()
    assert (await logs.state(JOB)).lost == model.bytes.count(None)
    for offset, us in looks:
        assert await logs.offset_at(JOB, at(us)) == model.offset_at(us)
        start, data = await logs.read(JOB, offset, limit=7)
        assert list(data) == model.bytes[start : start + len(data)]
        assert all(byte is None for byte in model.bytes[offset:start])


# Speed and memory.


@pytest.mark.anyio
async def test_a_quarter_gigabyte_in_flat_memory(logs: LogStore) -> None:
    """Memory does not grow with the logs that are written and read."""
    chunk, count = random.Random(0).randbytes(1 << 20), 256
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        await logs.append(JOB, number << 20, chunk, [(number << 20, number + 1)])
    await logs.close_job(JOB)
    offset = 0
    while (data := (await logs.read(JOB, offset))[1]) == chunk:
        offset += len(data)
    assert offset == count << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.anyio
async def test_a_follower_gets_what_was_just_stored(logs: LogStore) -> None:
    """Piece by piece, as it was stored, while earlier and later places are read from the file."""
    pieces = [bytes([number]) * (1000 + number) for number in range(8)]
    at = 0
    for piece in pieces:
        told = asyncio.create_task(logs.wait(JOB, at, timeout=30))
        await asyncio.sleep(0)
        await logs.append(JOB, at, piece)
        assert (await told).end == at + len(piece)
        assert await logs.read(JOB, at) == (at, piece)
        assert await logs.read(JOB, at + 1) == (at + 1, piece[1:])
        assert await logs.read(JOB, at, limit=10) == (at, piece[:10])
        at += len(piece)
    await logs.close_job(JOB)
    assert b"".join([data async for data in follow(logs)]) == b"".join(pieces)


@pytest.mark.anyio
async def test_a_follower_finds_what_another_process_goes_on_to_store(tmp_path: Path, logs: LogStore) -> None:
    """Though this process has stored something a moment ago, and nobody tells it of more."""
    other = LogStore(tmp_path / "logs")
    await logs.append(JOB, 0, b"ours")
    told = asyncio.create_task(logs.wait(JOB, 4, timeout=30))
    await asyncio.sleep(0)
    await other.append(JOB, 4, b", theirs")
    assert (await told).end == len(b"ours, theirs")
    assert (await logs.read(JOB, 0))[1] == b"ours, theirs"
    await other.aclose()
