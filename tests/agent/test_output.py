"""The job's output: every byte, as soon as the program prints it, whatever the bytes and however many."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from dstack_core.testing import wait_until
from tests.support.real_agents import LONG, RealAgent


def test_plain_output_and_errors_arrive_in_order(agent: RealAgent) -> None:
    """Standard output and standard error are one stream, as on a terminal."""
    agent.run("echo one; echo two >&2; echo three")
    assert agent.output() == b"one\ntwo\nthree\n"
    assert agent.wait()["exit_code"] == 0


def test_every_byte_arrives_untouched(agent: RealAgent) -> None:
    """All 256 values, control characters of terminals included, in every order of pairs."""
    agent.run(
        argv=[
            sys.executable,
            "-c",
            "import os\nfor i in range(256): os.write(1, bytes((i, j) [k] for j in range(256) for k in (0, 1)))",
        ]
    )
    expected = b"".join(bytes((i, j)) for i in range(256) for j in range(256))
    assert agent.output() == expected


def test_last_line_without_newline(agent: RealAgent) -> None:
    """Nothing is added to it and nothing held back."""
    agent.run("printf 'no newline'")
    assert agent.output() == b"no newline"


def test_not_utf8(agent: RealAgent) -> None:
    """Bytes that are no text in any encoding arrive as they are."""
    agent.run(r"printf '\377\376\200caf\351\000x'")
    assert agent.output() == b"\xff\xfe\x80caf\xe9\x00x"


PROGRAMS = {
    "python": "import time\nprint('ready')\ntime.sleep(600)",
    "perl": 'print "ready\\n"; sleep 600;',
}


@pytest.mark.parametrize("program", ["python", "perl"])
def test_programs_that_hold_output_back_on_a_pipe_do_not_here(agent: RealAgent, program: str) -> None:
    """A line arrives when it is printed, without a flush, while the program goes on."""
    path = sys.executable if program == "python" else shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}")
    agent.run(argv=[path, "-c" if program == "python" else "-e", PROGRAMS[program]])
    agent.wait_for_output(b"ready\n")
    assert agent.state()["status"] == "running"


def test_the_job_sees_a_terminal_that_is_not_its_controlling_one(agent: RealAgent) -> None:
    """Output is a terminal of 80 by 24 named dumb, input is empty, and /dev/tty cannot be opened."""
    agent.run(
        "test -t 1 && test -t 2 && echo terminal; cat; stty size <&1; echo $TERM\n"
        "(: </dev/tty) 2>/dev/null || echo none"
    )
    assert agent.output() == b"terminal\n24 80\ndumb\nnone\n"


def test_one_gigabyte(agent: RealAgent) -> None:
    """1 GiB through the terminal: same length, same checksum, and the agent's memory stays small."""
    size = 1 << 30
    agent.run(_noise(size))
    digest, length, peak = hashlib.sha256(), 0, 0
    for offset, data in agent.pieces(limit=4 << 20):
        assert offset == length
        digest.update(data)
        length += len(data)
        peak = max(peak, resident(agent.pid))
    assert length == size
    assert digest.hexdigest() == _noise_digest(size)
    assert peak < 60 << 20
    assert agent.wait()["log_lost_bytes"] == 0


BLOCK = bytes(range(256)) * 4096 + b"x"


def _noise(size: int) -> str:
    """A shell command that writes `size` bytes with a period that fits no buffer."""
    block = "(bytes(range(256)) * 4096 + b'x') * 4"
    program = f"import sys; b = {block}; n = {size}\nwhile n: n -= sys.stdout.buffer.write(b[:n])"
    return f'exec {sys.executable} -c "{program}"'


def _noise_digest(size: int) -> str:
    digest, block = hashlib.sha256(), BLOCK * 4
    while size:
        piece = block[:size]
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_bytes_in_the_terminal_when_the_process_ends_are_not_lost(agent: RealAgent) -> None:
    """A process that writes more than a terminal holds, and exits at once, has all of it kept."""
    agent.run(argv=[sys.executable, "-c", "import os; os.write(1, b'a' * 300_000); os._exit(3)"])
    assert agent.wait()["exit_code"] == 3
    assert agent.output() == b"a" * 300_000


def test_a_job_that_closes_its_output_goes_on(agent: RealAgent, tmp_path: Path) -> None:
    """Closing it ends nothing; writing elsewhere and the exit code are as ever."""
    go = tmp_path / "go"
    agent.run(f"echo before; exec >&- 2>&-; while ! test -e {go}; do sleep 0.02; done; exit 5")
    agent.wait_for_output(b"before\n")
    assert agent.state()["status"] == "running"
    begun, cpu = time.monotonic(), cpu_seconds(agent.pid)
    wait_until(lambda: time.monotonic() > begun + 0.5, what="half a second")
    assert cpu_seconds(agent.pid) - cpu < 0.25
    go.touch()
    assert agent.wait()["exit_code"] == 5
    assert agent.output() == b"before\n"


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_followers_get_each_line_when_it_is_written(agent: RealAgent, tmp_path: Path) -> None:
    """A long poll is answered by the next output, not by a timer."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    agent.run(f"while read -r line; do echo got $line; done <{fifo}")
    with fifo.open("w") as feed:
        offset = 0
        for number in range(5):
            answer: list[bytes] = []
            follower = threading.Thread(target=lambda: answer.append(agent.log(offset, wait=LONG)[0]))  # noqa: B023 - joined below
            follower.start()
            feed.write(f"{number}\n")
            feed.flush()
            follower.join(LONG)
            assert answer == [f"got {number}\n".encode()]
            offset += len(answer[0])
    assert agent.wait()["exit_code"] == 0


def test_times_of_the_output(agent: RealAgent, tmp_path: Path) -> None:
    """The index says when each run of bytes was written: after it was begun, before it was over, and growing."""
    go = tmp_path / "go"
    begun = time.time_ns() // 1000
    agent.run(f"echo first; while ! test -e {go}; do sleep 0.02; done; echo second")
    agent.wait_for_output(b"first\n")
    between = time.time_ns() // 1000
    # Bytes that are written within 10 ms of each other may share an entry.
    wait_until(lambda: time.time_ns() // 1000 > between + 20_000, what="the next entry to be due")
    go.touch()
    agent.wait()
    ended = time.time_ns() // 1000
    _, headers = agent.log()
    entries = [tuple(map(int, item.split(":"))) for item in headers["X-Log-Index"].split(",")]
    assert [offset for offset, _ in entries] == [0, 6]
    assert begun <= entries[0][1] <= between <= entries[1][1] <= ended


def test_reading_from_the_middle(agent: RealAgent) -> None:
    """Any offset and any limit give exactly those bytes; behind the end there is nothing but the end."""
    agent.run("printf 0123456789")
    agent.wait()
    data, headers = agent.log(offset=3, limit=4)
    assert (data, headers["X-Log-Offset"], headers["X-Log-End"]) == (b"3456", "3", None)
    data, headers = agent.log(offset=7)
    assert (data, headers["X-Log-Offset"], headers["X-Log-End"]) == (b"789", "7", "1")
    data, headers = agent.log(offset=10)
    assert (data, headers["X-Log-Offset"], headers["X-Log-End"]) == (b"", "10", "1")
