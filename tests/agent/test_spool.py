"""The spool: the newest output is kept, a full disk harms nobody, and what is lost is counted."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core.testing import wait_until
from tests.support.real_agents import LONG, RealAgent, StartAgent


def numbered(count: int) -> str:
    """A command that prints numbered lines of 100 bytes."""
    return f"exec {sys.executable} -c \"for i in range({count}): print('%099d' % i)\""


def check(offset: int, data: bytes) -> None:
    """Every byte is where it was written."""
    first = offset // 100 * 100
    whole = b"".join(b"%099d\n" % number for number in range(first // 100, (offset + len(data)) // 100 + 1))
    assert data == whole[offset - first : offset - first + len(data)]


def disk_use(agent: RealAgent) -> int:
    """Bytes in the spool's files."""
    return sum(path.stat().st_size for path in (agent.directory / "log").iterdir())


def test_size_cap_drops_the_oldest(agent: RealAgent) -> None:
    """20 MB through a spool of 1 MB: the end is there, the disk holds no more than the cap, the loss is exact."""
    agent.run(numbered(200_000), log_limit=1 << 20)
    state = agent.wait()
    assert (state["exit_code"], state["log_bytes"]) == (0, 20_000_000)
    assert disk_use(agent) < (1 << 20) + 65536
    pieces = list(agent.pieces())
    assert pieces[0][0] > 18_000_000
    assert sum(len(data) for _, data in pieces) == 20_000_000 - pieces[0][0]
    for offset, data in pieces:
        check(offset, data)
    assert agent.state()["log_lost_bytes"] == pieces[0][0]


def test_what_was_read_before_it_was_dropped_is_not_lost(agent: RealAgent) -> None:
    """A reader that keeps up gets everything, though the spool is small, and nothing counts as lost."""
    agent.run("mkfifo feed; for i in $(seq 40); do head -c 50000 /dev/zero; read -r _ <feed; done", log_limit=1 << 19)
    received = 0
    for offset, data in agent.pieces():
        assert offset == received
        received += len(data)
        if received % 50_000 == 0:
            (agent.directory / "job/feed").write_text("\n")
    assert received == 2_000_000
    assert agent.wait()["log_lost_bytes"] == 0
    assert disk_use(agent) < (1 << 19) + 65536


def test_a_file_that_may_not_grow(start_agent: StartAgent) -> None:
    """A limit on the size of files (EFBIG) costs nothing: the spool goes on in the next file."""
    limit = 300_000
    agent = start_agent(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    agent.run(numbered(20_000))
    assert agent.output() == b"".join(b"%099d\n" % number for number in range(20_000))
    assert agent.wait()["log_lost_bytes"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode()}")
    yield place
    wait_until(
        lambda: subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0,
        timeout=LONG,
        what="the file system to be free",
    )


@pytest.mark.root
def test_disk_full(small_disk: Path, start_agent: StartAgent, request: pytest.FixtureRequest) -> None:
    """The job goes on at its own speed; what does not fit is counted; what is kept is in its place."""
    agent = start_agent(directory=small_disk)
    request.addfinalizer(agent.end)
    agent.run(numbered(50_000))
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("exited", 0)
    assert state["log_bytes"] == 5_000_000
    assert state["log_lost_bytes"] > 3_000_000
    kept = 0
    for offset, data in agent.pieces():
        check(offset, data)
        kept += len(data)
    assert kept + state["log_lost_bytes"] == 5_000_000
    assert kept > 500_000


@pytest.mark.root
def test_disk_full_and_then_not(small_disk: Path, start_agent: StartAgent, request: pytest.FixtureRequest) -> None:
    """When there is room again the spool goes on, with the right offsets, after the hole."""
    agent = start_agent(directory=small_disk)
    request.addfinalizer(agent.end)
    hog = small_disk / "hog"
    hog.write_bytes(b"x" * 700_000)
    agent.run(f"{numbered(10_000)[5:]}; while ! test -e go; do sleep 0.02; done; echo after")
    wait_until(lambda: agent.state()["log_bytes"] == 1_000_000, timeout=LONG, what="the first part")
    lost = agent.state()["log_lost_bytes"]
    assert lost > 0
    hog.unlink()
    (agent.directory / "job/go").touch()
    assert agent.wait()["log_lost_bytes"] == lost
    pieces = list(agent.pieces())
    assert pieces[-1] == (1_000_000, b"after\n")
    assert sum(len(data) for _, data in pieces) == 1_000_006 - lost


@pytest.mark.root
def test_a_full_disk_gives_up_what_the_reader_has(
    small_disk: Path, start_agent: StartAgent, request: pytest.FixtureRequest
) -> None:
    """With a reader that keeps up, a disk of 1 MB is enough for 4 MB of output."""
    agent = start_agent(directory=small_disk)
    request.addfinalizer(agent.end)
    agent.run("mkfifo feed; for i in $(seq 80); do head -c 50000 /dev/zero; read -r _ <feed; done", log_limit=1 << 22)
    received = 0
    for offset, data in agent.pieces():
        assert offset == received
        received += len(data)
        if received % 50_000 == 0:
            (agent.directory / "job/feed").write_text("\n")
    assert received == 4_000_000
    assert agent.wait()["log_lost_bytes"] == 0


def test_many_short_lines_fit_the_headers(agent: RealAgent) -> None:
    """However often the job writes, a response has at most 256 times, and all bytes have one."""
    agent.run("for i in $(seq 400); do echo $i; sleep 0.011; done")
    agent.wait()
    offset, entries = 0, 0
    while True:
        _, headers = agent.log(offset)
        index = [tuple(map(int, item.split(":"))) for item in headers["X-Log-Index"].split(",")]
        assert len(index) <= 256
        assert index[0][0] == offset
        assert index == sorted(index)
        entries += len(index)
        offset += int(headers["Content-Length"])
        if headers["X-Log-End"]:
            break
    assert entries > 300
