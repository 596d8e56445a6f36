"""The local server: started once, started again, replaced, or explained. Real processes throughout."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import threading
import warnings
from pathlib import Path

import httpx
import pytest

from dstack.api import Client, ConfigurationError, ServerUnavailableError, VersionMismatchError
from dstack_core import __version__
from dstack_core._client.unix import UnixTransport
from dstack_core._home import socket_address
from dstack_core._models.wire import API_VERSION
from dstack_core.testing import wait_until
from tests.client.scripted import info
from tests.support.homes import Home, processes

ASK = """
import json
from dstack.api import Client
client = Client.from_config()
print(json.dumps([client.client.get_server_info().pid, len(client.runs.list(all=True))]))
"""


SUBMIT = """
from dstack.api import Client, Task
run = Client.from_config().runs.submit(Task(commands=["echo hi"], ports=["*:9000"]), run_name="one")
"""


@pytest.fixture
def here(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An empty home folder that this process uses, too."""
    monkeypatch.setenv("DSTACK_HOME", str(home.path))
    return home


def pid_of(client: Client) -> int:
    """Process id of the server that answers."""
    return client.client.get_server_info().pid


def servers(home: Home) -> list[int]:
    """Process ids of all servers of a home."""
    return [pid for pid, command in processes(home.path) if "dstack_core._server" in command]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, and was noticed by its parent."""
    return not Path(f"/proc/{pid}").exists()


def test_ten_programs_at_once_share_one_server(home: Home) -> None:
    """On an empty home, all of them are answered by the same process."""
    programs = [home.start(ASK) for _ in range(10)]
    said = [program.communicate(timeout=180) for program in programs]
    assert [program.returncode for program in programs] == [0] * 10, said
    pids = {json.loads(out)[0] for out, _ in said}
    assert pids == set(servers(home))
    assert len(pids) == 1


def test_threads_of_one_program_share_one_server(here: Home) -> None:
    """The same within a process."""
    pids: list[int] = []
    threads = [threading.Thread(target=lambda: pids.append(pid_of(Client.from_config()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (len(pids), set(pids)) == (8, set(servers(here)))


def test_a_killed_server_is_started_again_by_the_next_request(here: Home) -> None:
    """Also with what it left behind: its socket and its lock file."""
    client = Client.from_config()
    first = pid_of(client)
    here.kill_server()
    assert (here.path / "server.sock").exists()
    assert client.runs.list(all=True) == []
    assert pid_of(client) != first


def test_a_refused_connection_leaves_no_open_socket(here: Home) -> None:
    """The connection that finds no server is closed, not left to the garbage collector."""
    client = Client.from_config()
    client.runs.list()
    pid = pid_of(client)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            os.kill(pid, signal.SIGKILL)
            wait_until(functools.partial(is_gone, pid), what="the server's end")
            pid = pid_of(client)
            gc.collect()
    assert [str(warning.message) for warning in said] == []


def test_a_refusal_right_after_the_server_was_seen_leaves_no_open_socket(here: Home) -> None:
    """The server may die between any two looks at it."""
    here.path.mkdir()
    address = str(here.path / "nobody.sock")
    with socket.socket(socket.AF_UNIX) as bound, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bound.bind(address)
        with httpx.Client(transport=UnixTransport(address, httpx.Limits())) as http, pytest.raises(httpx.ConnectError):
            http.get("http://server/")
        gc.collect()
    assert [str(warning.message) for warning in said] == []


def test_a_killed_server_leaves_no_zombie(here: Home) -> None:
    """Nobody but the program that started it could notice its end."""
    client = Client.from_config()
    pid = pid_of(client)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid), what="the server to be gone for good")


def test_the_server_outlives_the_program_that_started_it(home: Home) -> None:
    """Neither the end of the program nor Ctrl+C in its terminal reaches it."""
    assert home.run(ASK).returncode == 0
    pid = home.server_pid()
    assert pid is not None
    assert os.getsid(pid) == pid
    assert json.loads(home.run(ASK).stdout)[0] == pid


def test_a_server_with_broken_configuration_says_so(here: Home) -> None:
    """The error is the server's own, with file and cure, and comes at once."""
    (here.path / "server").mkdir(parents=True)
    (here.path / "server" / "config.yml").write_text("projects: [\n")
    with pytest.raises(ConfigurationError, match=r"server/config\.yml"):
        Client.from_config()
    (here.path / "server" / "config.yml").unlink()
    assert Client.from_config().runs.list() == []


def test_a_server_that_dies_while_it_starts(here: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said, the end of its log, and what to do."""
    (here.path / "server").mkdir(parents=True)
    (here.path / "server" / "server.log").write_text("many lines\nthe last line of the log\n")
    fake = tmp_path / "dstack_core"
    (fake / "_server").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "_server" / "__init__.py").touch()
    (fake / "_server" / "__main__.py").write_text("import os; print('out of luck', flush=True); os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ServerUnavailableError, match=r"ended while it started \(exit code 7\)") as raised:
        Client.from_config()
    assert "out of luck" in str(raised.value)
    assert "the last line of the log" in str(raised.value)
    assert "To see more, start it yourself: dstack server" in str(raised.value)


def test_a_home_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the variable that leads elsewhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigurationError, match=r"file/home .*DSTACK_HOME"):
        Client.from_config()


@pytest.mark.parametrize("path", ["/proc/none", "/proc/self"])
def test_a_home_that_is_not_writable(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the variable that leads elsewhere; not even root may write there."""
    monkeypatch.setenv("DSTACK_HOME", path)
    with pytest.raises(ConfigurationError, match=f"{path}.*DSTACK_HOME"):
        Client.from_config()


def test_a_home_whose_path_is_too_long_for_a_socket(home: Home) -> None:
    """Works like any other, for every program that uses it."""
    home.path = home.path.joinpath(*["a-long-name"] * 12)
    home.env["DSTACK_HOME"] = str(home.path)
    home.path.parent.mkdir(parents=True)
    first, second = home.run(ASK), home.run(ASK)
    assert first.returncode == second.returncode == 0, first.stderr.decode()
    assert first.stdout == second.stdout


def test_relative_paths_reach_the_server(home: Home) -> None:
    """A program that found the package through a relative PYTHONPATH, in a home that is relative, too."""
    root = Path(home.env["PYTHONPATH"])
    home.env["PYTHONPATH"] = os.path.relpath(root, home.path.parent)
    home.env["DSTACK_HOME"] = home.path.name
    done = home.run(ASK)
    assert done.returncode == 0, done.stderr.decode()


def test_a_forked_child_starts_the_server_again(here: Home) -> None:
    """A client that was made before the fork works in the child, also when the server died meanwhile."""
    client = Client.from_config()
    client.runs.list()
    here.kill_server()
    code = """
import os
from dstack.api import Client
client = Client.from_config()
client.runs.list()
pid = os.fork()
if not pid:
    os._exit(0 if client.runs.list(all=True) == [] else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = here.run(code)
    assert done.returncode == 0, done.stderr.decode()


def test_a_suspended_client_holds_up_nobody(home: Home) -> None:
    """A program that was stopped (Ctrl+Z) while it starts the server: the others get theirs all the same."""
    (home.path / "server").mkdir(parents=True, mode=0o700)
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"
    holder = home.start(held, str(home.path / "server" / "start.lock"), stdin=-1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    impatient = ASK.replace(
        "client =", "import dstack_core._client.local_server as l; l.START_TIMEOUT = 1\nclient =", 1
    )
    done = home.run(impatient)
    holder.communicate(b"\n", timeout=30)
    assert done.returncode == 0, done.stderr.decode()


# ------------------------------------------------------------------------------------------------------- versions --


OTHER_VERSION = """
import sys
import dstack_core._models.wire as wire
import dstack_core._server.app as app

wire.API_VERSION = app.API_VERSION = int(sys.argv.pop(1))
version = sys.argv.pop(1)
app._version = lambda: version

from dstack_core._server.__main__ import main

sys.exit(main(["--local"]))
"""


class Others:
    """Servers of other versions: the real one, which says so."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def start(self, api: int, version: str) -> int:
        """Starts one, and gives its process id when it is up."""
        process = self._home.start(OTHER_VERSION, str(api), version, stdin=-3, stdout=-3, stderr=-3)
        threading.Thread(target=process.wait, daemon=True).start()
        path = self._home.path / "server.sock"
        wait_until(lambda: process.returncode is not None or listens(path), timeout=60, what="the server to listen")
        assert process.returncode is None
        return process.pid


def listens(path: Path) -> bool:
    """Whether a server accepts connections at a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(socket_address(path)) == 0


@pytest.fixture
def others(here: Home) -> Others:
    """Starts servers of other versions in the home."""
    return Others(here)


def test_an_older_server_is_replaced_and_its_runs_go_on(here: Home, others: Others) -> None:
    """Also if only its package is older: asked to end, and the run is found again by the new one."""
    old = others.start(API_VERSION, "0.0.1")
    program = ASK + "from dstack.api import Task\nrun = client.runs.submit(Task(commands=['echo up; read x < $GO']))\n"
    # A client of the old version, which finds nothing to replace.
    fifo = here.path / "go"
    os.mkfifo(fifo)
    client_of_old = program.replace("import json", "import json, dstack_core\ndstack_core.__version__ = '0.0.1'", 1)
    here.env["GO"] = str(fifo)
    submit = client_of_old.replace("['echo up; read x < $GO']", f"['echo up; read x < {fifo}; echo on']")
    done = here.run(submit + "print(run.name, next(iter(run.logs())))")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout.splitlines()[0])[0] == old
    client = Client.from_config()
    assert pid_of(client) != old
    assert client.client.get_server_info().version == __version__
    (run,) = client.runs.list()
    fifo.write_text("\n")
    assert b"".join(run.logs()) == b"up\non\n"


def test_a_server_of_an_older_api_is_replaced(here: Home, others: Others) -> None:
    """It could not answer this client."""
    old = others.start(API_VERSION - 1, "0.0.1")
    client = Client.from_config()
    assert client.client.get_server_info().api == API_VERSION
    assert pid_of(client) != old


def test_ten_programs_replace_an_older_server_once(here: Home, others: Others) -> None:
    """None of them ends the new server that another one has just started."""
    others.start(API_VERSION, "0.0.1")
    programs = [here.start(ASK) for _ in range(10)]
    said = [program.communicate(timeout=180) for program in programs]
    assert [program.returncode for program in programs] == [0] * 10, said
    assert len({json.loads(out)[0] for out, _ in said}) == 1


def test_a_newer_server_of_the_same_api_is_used(here: Home, others: Others) -> None:
    """It can do all that this client asks for."""
    newer = others.start(API_VERSION, "99.1")
    assert pid_of(Client.from_config()) == newer


def test_a_server_of_a_newer_api_needs_a_newer_client(here: Home, others: Others) -> None:
    """It is left alone, and the pip line says what to install."""
    newer = others.start(API_VERSION + 1, "99.1")
    with pytest.raises(VersionMismatchError, match=r"pip install --upgrade 'dstack-core==99\.1'"):
        Client.from_config()
    assert here.server_pid() == newer or newer in [pid for pid, _ in processes(here.path)]


def test_what_a_server_of_no_known_version_says() -> None:
    """A version that cannot be read is no reason to end a server."""
    from dstack_core._client.connection import is_older

    assert not is_older(info(version="unknown").version)
    assert not is_older("0+unknown")
    assert is_older("0.0.9", than="0.1.0")
    assert is_older("0.9.0", than="0.10.0")
    assert not is_older("0.10.0", than="0.10.0")


def test_a_task_started_by_one_program_is_read_by_another(home: Home) -> None:
    """The run belongs to the server, not to the program."""
    assert home.run(SUBMIT).returncode == 0
    read = "from dstack.api import Client; print(b''.join(Client.from_config().runs.get('one').logs()))"
    assert home.run(read).stdout == b"b'hi\\n'\n"


def test_a_program_in_development_mode_has_nothing_to_complain_about(home: Home) -> None:
    """It closes nothing itself, and leaves nothing open."""
    home.env |= {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    done = home.run(SUBMIT + "print(b''.join(run.logs()))")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"b'hi\\n'\n", b"")
