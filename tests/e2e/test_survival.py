"""Whatever dies, nothing is lost, doubled or left behind: real processes, real signals."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dstack.api import Client, Run, RunStatus, Task
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended, processes

MIB = 1 << 20
# Every line is different, so that a lost, doubled or swapped piece changes the checksum.
NOISY = "import sys, time\nfor n in range({lines}):\n    sys.stdout.write('%099d\\n' % n)\n"


def noisy(lines: int) -> tuple[Task, str]:
    """A task that writes `lines` lines of 100 bytes, and the checksum of them all."""
    digest = hashlib.sha256()
    for first in range(0, lines, 10_000):
        digest.update(b"".join(b"%099d\n" % n for n in range(first, min(lines, first + 10_000))))
    return Task(commands=[f'{sys.executable} -c "{NOISY.format(lines=lines)}"']), digest.hexdigest()


def checksum(run: Run) -> str:
    """The checksum of all output of a run."""
    digest = hashlib.sha256()
    for chunk in run.logs():
        digest.update(chunk)
    return digest.hexdigest()


def left(home: Home) -> list[tuple[int, str]]:
    """What still runs in a home besides its server."""
    return [one for one in processes(home.path) if "dstack_core._server" not in one[1]]


def test_a_killed_server_loses_nothing_of_200_mb(client: Client, home: Home) -> None:
    """SIGKILL in the middle of the output, several times: the task is unharmed and every byte arrives, once."""
    task, expected = noisy(2_000_000)
    run = client.runs.submit(configuration=task)
    digest, size, kills = hashlib.sha256(), 0, 0
    for chunk in run.logs():
        digest.update(chunk)
        size += len(chunk)
        if size > (kills + 1) * 50 * MIB and kills < 3:
            kills += 1
            home.kill_server()
    assert (kills, digest.hexdigest()) == (3, expected)
    assert ended(run).status is RunStatus.DONE


def test_a_new_client_finds_the_task_of_a_dead_server(client: Client, home: Home) -> None:
    """Server and client gone: the task works on, another program finds it and reads all of its output."""
    task, expected = noisy(100_000)
    task = Task(commands=["while [ ! -e $GO ]; do sleep 0.05; done", *task.commands], env={"GO": str(home.path / "go")})
    run = client.runs.submit(configuration=task, run_name="orphan")
    wait_until(home.agents, what="the agent")
    wait_until(lambda: refreshed(run) is RunStatus.RUNNING, what="the task to run")
    home.kill_server()
    (home.path / "go").touch()
    found = Client.from_config().runs.get("orphan")
    assert found is not None
    assert checksum(found) == expected
    assert ended(found).status is RunStatus.DONE


def refreshed(run: Run) -> RunStatus:
    """The run's status now."""
    run.refresh()
    return run.status


@pytest.mark.parametrize("whom", ["pid", "watchdog_pid", "both"])
def test_a_killed_agent_leaves_no_process(client: Client, home: Home, whom: str) -> None:
    """SIGKILL of the agent: the run fails with that reason, and nothing of its tree is left, daemons included."""
    daemon = "(setsid sh -c 'trap \"\" TERM HUP; sleep 1000' &)"
    run = client.runs.submit(configuration=Task(commands=[daemon, "echo up", "sleep 1000"], stop_duration=1))
    assert next(iter(run.logs())) == b"up\n"
    (agent,) = home.agents()
    for victim in ("pid", "watchdog_pid") if whom == "both" else (whom,):
        os.kill(agent[victim], signal.SIGKILL)
    if whom == "watchdog_pid":
        # The agent itself lives, and so does the job, until it is stopped.
        run.stop(abort=True)
        assert ended(run).status is RunStatus.ABORTED
    else:
        assert ended(run).status is RunStatus.FAILED
        assert "agent" in (run.message or "")
    wait_until(lambda: not left(home), timeout=30, what=f"an empty tree, not {left(home)}")


def test_ten_programs_at_once_start_one_server(home: Home) -> None:
    """An empty home and ten programs: one server, ten clients."""
    program = (
        "from dstack.api import Client; c = Client.from_config(); c.runs.list();print(c.client.get_server_info().pid)"
    )
    started = [home.start(program) for _ in range(10)]
    outputs = [one.communicate(timeout=120) for one in started]
    assert [one.returncode for one in started] == [0] * 10, [err.decode()[-500:] for _, err in outputs]
    assert len({out for out, _ in outputs}) == 1


def test_a_suspended_server_goes_on_after_waking(client: Client, home: Home) -> None:
    """SIGSTOP for longer than a lease renewal, then SIGCONT: same run, all output."""
    task = Task(
        commands=["echo one", "while [ ! -e $GO ]; do sleep 0.05; done", "echo two"], env={"GO": str(home.path / "go")}
    )
    run = client.runs.submit(configuration=task)
    logs = iter(run.logs())
    assert next(logs) == b"one\n"
    pid = home.kill_server(signal.SIGSTOP)
    (home.path / "go").touch()
    wait_until(lambda: stopped(pid), what="the server to be suspended")
    threading.Timer(6, os.kill, (pid, signal.SIGCONT)).start()
    assert b"".join(logs) == b"two\n"
    assert ended(run).status is RunStatus.DONE


def stopped(pid: int) -> bool:
    """True if a process is suspended."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_a_submit_whose_server_dies_runs_once(client: Client, home: Home) -> None:
    """SIGKILL of the server at many moments during submit: each run exists exactly once and runs exactly once."""
    marks = home.path / "marks"
    marks.mkdir()
    for number in range(12):
        client.runs.list()
        pid = home.server_pid()
        assert pid is not None
        killer = threading.Timer(number * 0.004, kill_quietly, (pid,))
        killer.start()
        task = Task(commands=[f"echo ran >> {marks}/{number}"])
        run = client.runs.submit(configuration=task, run_name=f"once-{number}")
        killer.join()
        assert ended(run).status is RunStatus.DONE
        assert (marks / str(number)).read_text() == "ran\n"
    assert len(client.runs.list(all=True)) == 12


def kill_quietly(pid: int) -> None:
    """SIGKILL, if the process is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_a_server_with_nothing_to_do_goes_away(home: Home) -> None:
    """After the idle time, and not while something runs."""
    home.env["DSTACK_SERVER_IDLE_SECONDS"] = "1"
    program = (
        "from dstack.api import Client, Task; c = Client.from_config();"
        "r = c.runs.submit(configuration=Task(commands=['sleep 4', 'echo done'])); print(r.name)"
    )
    done = home.run(program)
    assert done.returncode == 0, done.stderr.decode()
    pid = home.server_pid()
    assert pid is not None
    wait_until(lambda: not home.agents(), timeout=60, what="the end of the task")
    wait_until(lambda: home.server_pid() is None, timeout=60, what="the end of the idle server")
    assert not processes(home.path)


INTERRUPTED = """
import sys
from dstack.api import Client, Task

client = Client.from_config()
run = client.runs.submit(configuration=Task(commands=["echo up", "sleep 1000"], stop_duration=1), run_name="ctrl-c")
run.attach()
try:
    for log in run.logs():
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()
except KeyboardInterrupt:
    run.stop(abort=True)
finally:
    run.detach()
"""


def test_ctrl_c_stops_the_run_and_the_program_ends_cleanly(client: Client, home: Home) -> None:
    """SIGINT to the program of the API page: the run is aborted, the program exits without a traceback."""
    program = home.start(INTERRUPTED)
    assert program.stdout is not None
    assert program.stdout.read(3) == b"up\n"
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (0, b"")
    run = client.runs.get("ctrl-c")
    assert run is not None
    assert ended(run).status is RunStatus.ABORTED
    wait_until(lambda: not left(home), timeout=30, what="an empty tree")


def test_ctrl_c_while_logs_are_read_leaves_the_run_alone(client: Client, home: Home) -> None:
    """Without a handler of its own a program dies of SIGINT, and the run goes on for whoever comes next."""
    program = home.start(INTERRUPTED.partition("run.attach()")[0] + "for log in run.logs(): print(log, flush=True)")
    assert program.stdout is not None
    program.stdout.readline()
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=60)
    run = client.runs.get("ctrl-c")
    assert run is not None
    assert not run.status.is_finished
    run.stop(abort=True)
    ended(run)


def test_two_clients_read_the_same_output(client: Client) -> None:
    """Attached or not, live or late, two readers get the same bytes."""
    task, expected = noisy(50_000)
    run = client.runs.submit(configuration=task)
    sums: list[str] = []
    readers = [threading.Thread(target=lambda: sums.append(checksum(run))) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert sums == [expected] * 3


def test_start_time_skips_what_was_before(client: Client, home: Home) -> None:
    """`logs(start_time=…)` begins with what was written at that time or later."""
    from datetime import UTC, datetime

    task = Task(
        commands=["echo before", "while [ ! -e $GO ]; do sleep 0.05; done", "echo after"],
        env={"GO": str(home.path / "go")},
    )
    run = client.runs.submit(configuration=task)
    assert next(iter(run.logs())) == b"before\n"
    time.sleep(0.05)
    between = datetime.now(UTC)
    (home.path / "go").touch()
    assert b"".join(run.logs(start_time=between)) == b"after\n"


def test_the_server_gives_jobs_none_of_its_secrets(home: Home) -> None:
    """A token in the server's environment is not in the task's."""
    home.env["DSTACK_SERVER_TOKEN"] = "hush-hush"
    program = (
        "from dstack.api import Client, Task; task = Task(commands=['env']);"
        "r = Client.from_config().runs.submit(configuration=task);"
        "print(b''.join(r.logs()).decode())"
    )
    done = home.run(program)
    assert done.returncode == 0, done.stderr.decode()
    assert b"hush-hush" not in done.stdout
    assert subprocess.run(["grep", "-r", "hush-hush", home.path], check=False, stdout=subprocess.PIPE).stdout == b""
