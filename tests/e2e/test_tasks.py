"""Tasks on this computer, through the public API, with nothing set up before."""

from __future__ import annotations

import sys
import textwrap

import pytest

from dstack.api import Client, ConfigurationError, NoOffersError, Resources, RunNameTakenError, RunStatus, Task
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended, processes

PYTHON = sys.executable
DAEMON = 'import os; os.fork() or (os.setsid(), os.fork() or os.execlp("sleep", "sleep", "1000"))'


def output(client: Client, task: Task, **options: object) -> bytes:
    """Runs a task to its end and gives its output."""
    run = client.runs.submit(configuration=task, **options)  # type: ignore[arg-type]  # options by name
    return b"".join(run.logs())


def test_a_plain_task_runs_here_and_its_output_streams(client: Client) -> None:
    """No resources named, nothing set up: the task runs on this computer, free of charge."""
    run = client.runs.submit(configuration=Task(commands=["echo hello", "echo world >&2"]))
    assert b"".join(run.logs()) == b"hello\nworld\n"
    ended(run)
    assert (run.status, run.backend, run.exit_code) == (RunStatus.DONE, "local", 0)
    assert run.hostname


def test_the_output_of_a_finished_run_is_still_there(client: Client) -> None:
    """After its instance is gone, and for any other client, the same bytes."""
    run = client.runs.submit(configuration=Task(commands=["printf 'a\\nb'"]), run_name="again")
    ended(run)
    other = client.runs.get("again")
    assert other is not None
    assert b"".join(other.logs()) == b"a\nb" == b"".join(run.logs())


def test_an_exit_code_fails_the_run_and_is_told(client: Client) -> None:
    """The run's status, exit code and message say how it ended; later commands do not run."""
    run = client.runs.submit(configuration=Task(commands=["exit 7", "echo never"]))
    assert b"".join(run.logs()) == b""
    ended(run)
    assert (run.status, run.exit_code) == (RunStatus.FAILED, 7)


def test_the_longest_name(client: Client) -> None:
    """What the client accepts as a name, the server does."""
    run = client.runs.submit(configuration=Task(commands=["echo $DSTACK_RUN_NAME"]), run_name="a" * 41)
    assert b"".join(run.logs()) == b"a" * 41 + b"\n"


def test_output_is_untouched_bytes(client: Client) -> None:
    """Carriage returns, bytes that are no UTF-8 and a missing last newline arrive as written."""
    script = r"printf 'a\r\nb\t\033[1mc\377\376\000d\ne'"
    assert output(client, Task(commands=[script])) == b"a\r\nb\t\x1b[1mc\xff\xfe\x00d\ne"


def test_output_arrives_when_it_is_printed(client: Client) -> None:
    """A program that would hold its output back on a pipe is seen line by line, while it still runs."""
    code = "print('first'); import sys; sys.stdin.close(); import time; time.sleep(3600)"
    run = client.runs.submit(configuration=Task(commands=[f'{PYTHON} -c "{code}"']))
    logs = iter(run.logs())
    assert next(logs) == b"first\n"
    run.stop(abort=True)
    assert ended(run).status is RunStatus.ABORTED


def test_environment_and_working_directory(client: Client) -> None:
    """The task sees its variables, in a fresh working directory."""
    task = Task(commands=["echo $GREETING", "ls -A | wc -l"], env={"GREETING": "hej"})
    assert output(client, task).split() == [b"hej", b"0"]


@pytest.mark.parametrize(
    "body",
    [
        "trap '' TERM; while true; do sleep 1; done",
        "(setsid sleep 1000 &) ; sleep 1000 & sleep 1000",
        f"{PYTHON} -c '{DAEMON}'; sleep 1000",
        "exec >&- 2>&-; sleep 1000",
    ],
    ids=["ignores SIGTERM", "forks", "daemonises", "closes stdout"],
)
def test_stop_ends_the_whole_tree(client: Client, home: Home, body: str) -> None:
    """Whatever a task did to its processes, after stop none of them is left."""
    task = Task(commands=["echo up", body], stop_duration=1)
    run = client.runs.submit(configuration=task)
    assert next(iter(run.logs())) == b"up\n"
    run.stop()
    ended(run)
    assert run.status is RunStatus.TERMINATED
    wait_until(lambda: not [p for p in processes(home.path) if "_server" not in p[1]], what="an empty tree")


def test_stop_twice_and_stop_after_the_end_do_nothing(client: Client) -> None:
    """Stopping is idempotent; a finished run keeps its status."""
    run = client.runs.submit(configuration=Task(commands=["sleep 1000"], stop_duration=1))
    run.stop()
    run.stop()
    assert ended(run).status is RunStatus.TERMINATED
    run.stop(abort=True)
    run.refresh()
    assert run.status is RunStatus.TERMINATED


def test_max_duration_ends_a_task(client: Client) -> None:
    """A task that runs too long is ended, and says so."""
    run = client.runs.submit(configuration=Task(commands=["sleep 1000"], max_duration=1, stop_duration=1))
    ended(run)
    assert run.status is RunStatus.TERMINATED
    assert "max_duration" in (run.message or "")


def test_names_active_taken_finished_reused(client: Client) -> None:
    """An active run keeps its name; a finished one gives it away."""
    first = client.runs.submit(configuration=Task(commands=["sleep 1000"], stop_duration=1), run_name="same")
    with pytest.raises(RunNameTakenError, match="'same' is active"):
        client.runs.submit(configuration=Task(commands=["true"]), run_name="same")
    first.stop(abort=True)
    ended(first)
    second = client.runs.submit(configuration=Task(commands=["echo second"]), run_name="same")
    assert b"".join(second.logs()) == b"second\n"
    found = client.runs.get("same")
    assert found is not None
    assert b"".join(found.logs()) == b"second\n"


def test_an_unknown_run_is_none(client: Client) -> None:
    """`get` of a name that nobody has."""
    assert client.runs.get("nobody") is None


def test_a_name_that_is_no_name(client: Client) -> None:
    """Said with what a name looks like."""
    with pytest.raises(ConfigurationError, match="small letters"):
        client.runs.submit(configuration=Task(commands=["true"]), run_name="Not A Name")


def test_impossible_resources_name_the_backend_and_the_nearest_offer(client: Client) -> None:
    """More memory than there is: refused at once, with what this computer has."""
    with pytest.raises(NoOffersError) as refusal:
        client.runs.submit(configuration=Task(commands=["true"]), resources=Resources(memory="900TB"))
    assert "local" in str(refusal.value)
    assert "memory" in str(refusal.value)
    assert client.runs.list(all=True) == []


def test_list_shows_the_active_or_else_the_latest(client: Client) -> None:
    """`list()` is about now, `list(all=True)` about everything, newest first."""
    for name in ("one", "two"):
        ended(client.runs.submit(configuration=Task(commands=["true"]), run_name=name))
    assert [run.name for run in client.runs.list()] == ["two"]
    assert [run.name for run in client.runs.list(all=True)] == ["two", "one"]
    active = client.runs.submit(configuration=Task(commands=["sleep 1000"], stop_duration=1), run_name="three")
    assert [run.name for run in client.runs.list()] == ["three"]
    active.stop(abort=True)


def test_a_gigabyte_of_output_without_a_newline(client: Client) -> None:
    """1 GiB from the task to the client, every byte of it."""
    import hashlib

    run = client.runs.submit(configuration=Task(commands=["head -c 1073741824 /dev/zero"]))
    digest, size = hashlib.sha256(), 0
    for chunk in run.logs():
        digest.update(chunk)
        size += len(chunk)
    assert size == 1 << 30
    assert digest.hexdigest() == "49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14"


def test_diagnose_tells_what_the_engine_did(client: Client) -> None:
    """`logs(diagnose=True)` is the engine's account, with instance and attempts."""
    run = client.runs.submit(configuration=Task(commands=["exit 3"]))
    ended(run)
    account = b"".join(run.logs(diagnose=True)).decode()
    assert "submitted by" in account
    assert "intent -> starting" in account
    assert "exit code 3" in account


def test_two_hundred_at_once(client: Client) -> None:
    """Submitted as fast as one client can, all finish, none is lost."""
    runs = [client.runs.submit(configuration=Task(commands=[f"echo {number}"])) for number in range(200)]
    for number, run in enumerate(runs):
        assert b"".join(run.logs()) == f"{number}\n".encode()
    assert {ended(run).status for run in runs} == {RunStatus.DONE}


def test_a_program_as_a_newcomer_writes_it(home: Home) -> None:
    """A program of its own, with nothing set up: runs, prints the output, ends, leaves nothing but an idle server."""
    program = textwrap.dedent("""
        import sys
        from dstack.api import Client, Task

        client = Client.from_config()
        run = client.runs.submit(configuration=Task(commands=["echo from the task"]))
        run.attach()
        try:
            for log in run.logs():
                sys.stdout.buffer.write(log)
        finally:
            run.detach()
    """)
    done = home.run(program)
    assert (done.returncode, done.stdout) == (0, b"from the task\n"), done.stderr.decode()
