"""The server with all its real parts, as a process: what it costs, how it ends, and what it takes from whom."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dstack.api import Client, RunStatus, Task
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended

TOKEN = "a-good-long-token-0123"
LIST = "/api/project/main/backends/list"


def speak(home: Home) -> httpx.Client:
    """A connection to the home's server, below the client library."""
    transport = httpx.HTTPTransport(uds=str(home.path / "server.sock"))
    return httpx.Client(transport=transport, base_url="http://server", timeout=60)


def test_a_stopped_server_leaves_its_runs_alone(client: Client, home: Home) -> None:
    """SIGTERM in the middle of a run: the server is gone, the job is not, and the next server has it all."""
    lines = "for i in 1 2 3; do echo $i; done; while [ ! -e $GO ]; do sleep 0.05; done; echo end"
    run = client.runs.submit(configuration=Task(commands=[lines], env={"GO": str(home.path / "go")}))
    assert next(iter(run.logs()))[:1] == b"1"
    agents = home.agents()
    home.kill_server(signal.SIGTERM)
    assert not (home.path / "server.sock").exists()
    assert home.agents() == agents
    (home.path / "go").touch()
    assert b"".join(run.logs()) == b"1\n2\n3\nend\n"
    assert ended(run).status is RunStatus.DONE


def test_an_idle_server_is_small_and_sleeps(client: Client, home: Home) -> None:
    """With every part loaded and a run behind it, a server without work is under 120 MB and uses no CPU to speak of."""
    run = client.runs.submit(configuration=Task(commands=["true"]))
    assert ended(run).status is RunStatus.DONE
    wait_until(lambda: not home.agents(), timeout=60, what="the instance to be given back")
    pid = home.server_pid()
    assert pid is not None
    # On a busy machine the work that came before may take a while to end.
    wait_until(lambda: used_within(pid, 3) < 0.1, timeout=60, what="three seconds almost without CPU time")
    assert resident_mib(pid) < 120


def used_within(pid: int, seconds: float) -> float:
    """CPU time that a process uses during so many seconds."""
    before, end = cpu_seconds(pid), time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end, timeout=seconds + 30, what="the time")
    return cpu_seconds(pid) - before


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def test_a_changed_configuration_is_noticed(client: Client, home: Home) -> None:
    """A backend that is added to the file shows up without a restart, with the pip line if its package is missing."""
    client.runs.list()
    with speak(home) as api:
        assert "nocloud" not in api.get(LIST).text
        config = home.path / "server" / "config.yml"
        config.write_text("projects:\n- name: main\n  backends:\n  - type: nocloud\n")
        status = {one["name"]: one for one in api.get(LIST).json()}
        assert status["nocloud"]["state"] == "not_installed"
        assert "pip install dstack-nocloud" in status["nocloud"]["reason"]
        assert status["local"]["state"] == "configured"


def test_a_malformed_configuration_is_told_to_the_client(home: Home) -> None:
    """The program that would have started the server says file, line and cure."""
    (home.path / "server").mkdir(parents=True, mode=0o700)
    (home.path / "server" / "config.yml").write_text("projects:\n- name: main\n  backend: []\n")
    done = home.run("from dstack.api import Client; Client.from_config().runs.list()")
    assert done.returncode != 0
    said = done.stderr.decode()
    assert "server/config.yml, line 3" in said
    assert "Did you mean 'backends'?" in said
    assert "Traceback (most recent call last)" not in (home.path / "server" / "server.log").read_text()


def test_secrets_stay_out_of_the_log(client: Client, home: Home) -> None:
    """Neither a run that works nor one that is refused puts its environment into the server's log."""
    ended(client.runs.submit(configuration=Task(commands=["exit 3"], env={"KEY": "hush-hush"})))
    with speak(home) as api:
        spec = {"configuration": {"type": "task", "commands": [], "env": {"KEY": ["hush-hush"]}}, "profile": {}}
        refused = api.post("/api/project/main/runs/get_plan", json={"run_spec": spec})
    assert refused.status_code == 400
    assert "hush-hush" not in refused.text
    assert "hush-hush" not in home.log()


@pytest.fixture
def shared(home: Home) -> Iterator[str]:
    """`dstack server` in the foreground, on a port of its own; yields where."""
    home.env["DSTACK_SERVER_TOKEN"] = TOKEN
    command = [sys.executable, "-P", "-m", "dstack_core._server", "--port", "0"]
    process = subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+:\d+", process.stdout.readline())
    assert found
    yield found.group()
    process.terminate()
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()


def test_a_run_on_a_shared_server(shared: str, home: Home) -> None:
    """Over TCP with a token everything is as it is on the own computer."""
    client = Client.from_config(project_name="main", server_url=shared, user_token=TOKEN)
    run = client.runs.submit(configuration=Task(commands=["echo from afar"]))
    assert b"".join(run.logs()) == b"from afar\n"
    assert ended(run).status is RunStatus.DONE


def test_the_local_client_uses_the_shared_server_of_its_home(shared: str, home: Home) -> None:
    """Who runs `dstack server` on this computer needs no token for it, and starts no second one."""
    program = "from dstack.api import Client; print(Client.from_config().client.get_server_info().pid)"
    done = home.run(program)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == httpx.get(f"{shared}/api/server/info", timeout=60).json()["pid"]


@pytest.mark.postgres
def test_a_server_on_postgresql(home: Home, postgres_url: str) -> None:
    """`DSTACK_DATABASE_URL` chooses the database; nothing else changes."""
    home.env["DSTACK_DATABASE_URL"] = postgres_url
    program = (
        "from dstack.api import Client, Task; c = Client.from_config();"
        "r = c.runs.submit(configuration=Task(commands=['echo kept elsewhere']));"
        "print(b''.join(r.logs()).decode(), end='')"
    )
    done = home.run(program)
    assert done.stdout == b"kept elsewhere\n", done.stderr.decode()
    assert not (home.path / "server" / "server.db").exists()
