"""The server as a process: one per home folder, there at once, gone in time, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dstack_core.testing import wait_until

MAIN = "/api/project/main"


def mode(path: Path) -> int:
    """Permission bits."""
    return path.stat().st_mode & 0o777


def test_private(server: Any, client: httpx.Client) -> None:
    """Socket, log, lock and folders are for their owner alone."""
    client.get("/api/server/info")
    assert mode(server.home) == 0o700
    assert mode(server.socket) == 0o600
    assert mode(server.home / "server") == 0o700
    assert mode(server.home / "server" / "server.log") == 0o600
    assert mode(server.home / "server" / "server.lock") == 0o600


def test_silent(server: Any, client: httpx.Client) -> None:
    """A local server writes nothing and lets go of its terminal as soon as it answers."""
    client.get("/api/server/info")
    assert server.process.stdout.read() == ""
    assert server.process.stderr.read() == ""
    assert server.process.poll() is None


def test_second_one(start: Any, server: Any, client: httpx.Client) -> None:
    """A second server for the same home says who is there, and changes nothing."""
    client.get("/api/server/info")
    second = start()
    assert second.ended() == 75
    assert f"pid {server.process.pid}" in second.process.stderr.read()
    assert client.get("/api/server/info").json()["pid"] == server.process.pid


def test_ten_at_once(start: Any) -> None:
    """Of ten servers started at once for one home, one stays."""
    servers = [start() for _ in range(10)]
    wait_until(
        lambda: sum(server.process.poll() is None for server in servers) == 1, timeout=120, what="one to be left"
    )
    assert sorted(server.process.poll() or 0 for server in servers) == [0] + [75] * 9
    (left,) = (server for server in servers if server.process.poll() is None)
    with left.wait_up().client() as client:
        assert client.get("/api/server/info").json()["pid"] == left.process.pid


def test_killed_and_started_again(start: Any, server: Any) -> None:
    """After SIGKILL the socket is still there; the next server replaces it."""
    server.process.kill()
    server.ended()
    assert server.socket.exists()
    again = start()
    wait_until(lambda: again.listens() and answers(again.socket), what="the next server to listen")
    with again.client() as client:
        assert client.get("/api/server/info").json()["pid"] == again.process.pid


def answers(path: Path) -> bool:
    """Whether somebody accepts there."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_is_polite_and_waits_for_nobody(server: Any, client: httpx.Client, number: signal.Signals) -> None:
    """A stop ends streams and waits properly, and whoever does not read is cut off."""
    client.post(f"{MAIN}/runs/submit", json={"run_spec": SPEC, "submit_key": "0" * 32}).raise_for_status()
    answers: list[httpx.Response] = []

    def poll() -> None:
        with server.client() as other:
            body = {"run_name": "train", "after_version": 9, "wait": 60}
            answers.append(other.post(f"{MAIN}/runs/get", json=body))

    thread = threading.Thread(target=poll)
    thread.start()
    with client.stream("GET", f"{LOGS}?offset=1") as live, client.stream("GET", LOGS) as unread:
        pieces = live.iter_raw()
        assert next(pieces) == b"hello\n"
        wait_until(lambda: "polling" in server.events(), what="the wait to begin")
        server.process.send_signal(number)
        assert list(pieces) == []
        # The wait would have gone on for a minute, and who does not read for ever.
        assert server.ended(timeout=30) == 0
        assert unread.status_code == 200
    thread.join(60)
    assert answers[0].json()["run_name"] == "train"
    assert not server.socket.exists()
    assert server.events()[-1] == "engine stopped"


SPEC = {"run_name": "train", "configuration": {"type": "task", "commands": ["true"]}, "profile": {}}
LOGS = f"{MAIN}/runs/00000000-0000-0000-0000-000000000001/logs"


def test_stop_by_request(server: Any, client: httpx.Client) -> None:
    """A client on this computer can stop the server."""
    assert client.post("/api/server/shutdown").json() == {}
    assert server.ended() == 0
    assert not server.socket.exists()


def test_next_one_waits_for_the_last(start: Any, server: Any, client: httpx.Client) -> None:
    """A server that is started while the last one is on its way out takes over."""
    client.post("/api/server/shutdown")
    again = start()
    assert server.ended() == 0
    wait_until(lambda: again.listens() and answers(again.socket), what="the next server to listen")
    with again.client() as other:
        assert other.get("/api/server/info").json()["pid"] == again.process.pid


def test_idle_exit(start: Any) -> None:
    """With nothing to do the server exits by itself, and removes its socket."""
    server = start("--local", env={"DSTACK_SERVER_IDLE_SECONDS": "0.5"})
    assert server.ended() == 0
    assert not server.socket.exists()
    assert "nothing to do for 0.5 s" in server.log()


def test_no_idle_exit_while_busy(start: Any, tmp_path: Path) -> None:
    """A server stays while the engine has something to do or somebody listens to it, however long that takes."""
    (tmp_path / "home").mkdir()
    busy = tmp_path / "home" / "busy"
    busy.touch()
    server = start("--local", "--idle-exit", "0.5").wait_up()
    with server.client() as client, client.stream("GET", f"{LOGS}?offset=1") as live:
        pieces = live.iter_raw()
        assert next(pieces) == b"hello\n"
        busy.unlink()
        with pytest.raises(subprocess.TimeoutExpired):
            server.ended(timeout=3)
    assert server.ended() == 0


def test_home_taken_away(start: Any) -> None:
    """A server whose home folder is gone can serve nobody, and ends."""
    server = start("--local", "--idle-exit", "1").wait_up()
    with server.client() as client:
        client.get("/api/server/info")
    shutil.rmtree(server.home)
    assert server.ended() == 0


def test_suspended(server: Any, client: httpx.Client) -> None:
    """What is asked while the server is suspended is answered when it wakes up."""
    client.get("/api/server/info")
    server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(httpx.ReadTimeout):
        client.get("/api/server/info", timeout=1)
    server.process.send_signal(signal.SIGCONT)
    assert client.get("/api/server/info").status_code == 200


def test_suspended_past_its_idle_time(start: Any) -> None:
    """A request that came while the server was suspended is answered even if it was to exit by then."""
    server = start("--local", "--idle-exit", "3").wait_up()
    with server.client() as client:
        client.get("/api/server/info")
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(httpx.ReadTimeout):
            client.get("/api/server/info", timeout=4)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(server.socket))
        waiting.sendall(b"GET /api/server/info HTTP/1.1\r\nHost: x\r\n\r\n")
        server.process.send_signal(signal.SIGCONT)
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"


def test_socket_of_another_is_left_alone(server: Any, client: httpx.Client) -> None:
    """A server removes its own socket, never one that took its place."""
    client.get("/api/server/info")
    server.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.socket))
        server.process.terminate()
        assert server.ended() == 0
        assert server.socket.exists()


def test_file_in_the_way(start: Any, tmp_path: Path) -> None:
    """What is no socket is not removed: the person is told."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "server.sock").write_text("mine")
    server = start()
    assert server.ended() == 78
    assert "in the way" in server.process.stderr.read()
    assert (tmp_path / "home" / "server.sock").read_text() == "mine"


def test_bad_configuration(start: Any, tmp_path: Path) -> None:
    """What is wrong in a file is said on standard error, with a code of its own, and the socket is removed."""
    (tmp_path / "home" / "server").mkdir(parents=True)
    (tmp_path / "home" / "server" / "config.yml").write_text("?")
    server = start()
    assert server.ended() == 78
    assert "server/config.yml, line 1" in server.process.stderr.read()
    assert not server.socket.exists()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_bad_idle_seconds(start: Any, text: str) -> None:
    """A variable that is no number of seconds is named, with an example."""
    server = start("--local", env={"DSTACK_SERVER_IDLE_SECONDS": text})
    assert server.ended() == 78
    assert "DSTACK_SERVER_IDLE_SECONDS=300" in server.process.stderr.read()


def test_without_uvloop(start: Any) -> None:
    """Without uvloop the server does the same, on asyncio's loop."""
    server = start("--local", env={"FAKE_WITHOUT_UVLOOP": "1"}).wait_up()
    with server.client() as client:
        assert client.get("/api/server/info").json()["local"] is True
        with client.stream("GET", LOGS) as answer:
            assert sum(len(chunk) for chunk in answer.iter_raw()) == 256 << 20
    server.process.terminate()
    assert server.ended() == 0


def test_home_with_a_long_path(start: Any, tmp_path: Path) -> None:
    """A home folder whose path is too long for a socket address works."""
    home = tmp_path / ("long" * 30)
    server = start("--local", home=home).wait_up()
    from dstack_core._home import socket_address

    transport = httpx.HTTPTransport(uds=socket_address(server.socket))
    with httpx.Client(transport=transport, base_url="http://server", timeout=60) as client:
        assert client.get("/api/server/info").json()["home"] == str(home)
    server.process.terminate()
    assert server.ended() == 0
    assert not server.socket.exists()


def test_jobs_inherit_nothing(server: Any, client: httpx.Client) -> None:
    """Neither the umask nor ignored signals of the server are other than those of the program that started it."""
    client.get("/api/server/info")
    theirs = Path(f"/proc/{server.process.pid}/status").read_text()
    ours = Path("/proc/self/status").read_text()
    for name in ("Umask", "SigBlk"):
        line = next(line for line in theirs.splitlines() if line.startswith(name))
        assert line in ours
    ignored = next(line for line in theirs.splitlines() if line.startswith("SigIgn"))
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGHUP - 1)) == 0


def test_idle_is_idle(server: Any, client: httpx.Client) -> None:
    """A server without requests sleeps: a handful of wake-ups in two seconds, no CPU time to speak of."""
    client.get("/api/server/info")
    before = activity(server.process.pid)
    time.sleep(2)
    switches, ticks = (after - was for after, was in zip(activity(server.process.pid), before, strict=True))
    assert switches < 10
    assert ticks / os.sysconf("SC_CLK_TCK") < 0.1


def activity(pid: int) -> tuple[int, int]:
    """How often a process went to sleep, and its CPU time in ticks."""
    status = Path(f"/proc/{pid}/status").read_text()
    switches = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(switches.split()[1]), int(fields[11]) + int(fields[12])


@pytest.mark.root
@pytest.mark.parametrize("uvloop", [True, False])
def test_another_user_is_refused(start: Any, uvloop: bool) -> None:
    """Even where permissions would let another user in, the kernel's credentials do not."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    server = start(env=None if uvloop else {"FAKE_WITHOUT_UVLOOP": "1"}).wait_up()
    with server.client() as client:
        client.get("/api/server/info")
    for folder in [server.home, *server.home.parents][:-1]:
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    server.socket.chmod(0o777)
    command = [sys.executable, "-I", "-c", INTRUDER, str(server.socket)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "hung up\n"
    wait_until(lambda: "Refused a connection from user 65534" in server.log(), what="the line in the log")
    with server.client() as client:
        assert client.get("/api/server/info").status_code == 200


INTRUDER = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
try:
    connection.sendall(b"GET /api/server/info HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    print("answered" if connection.recv(1) else "hung up")
except (ConnectionResetError, BrokenPipeError):
    print("hung up")
"""
