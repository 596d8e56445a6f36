"""Services through the public API, on this computer: whatever dies, the replicas come back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import urllib.request

import pytest

from dstack.api import Client, Run, RunNameTakenError, RunStatus, ServerClientError, Service, Task
from dstack_core.testing import wait_until
from tests.support.docker import Docker, docker, docker_engine
from tests.support.homes import Home, ended, processes

__all__ = ["docker", "docker_engine"]

# Answers with its process id and the variable WORD.
PROGRAM = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(("%d %s" % (os.getpid(), os.environ.get("WORD"))).encode())
    def log_message(self, *_):
        pass
print("serving", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def service(home: Home, **fields: object) -> Service:
    """A service of the program above."""
    home.path.mkdir(mode=0o700, exist_ok=True)
    (home.path / "serve.py").write_text(PROGRAM)
    command = f"exec {sys.executable} {home.path}/serve.py"
    defaults = {"port": f"{free_port()}:{free_port()}", "commands": [command], "stop_duration": 1}
    return Service(**{**defaults, **fields})  # type: ignore[arg-type]  # fields by name


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def replicas(home: Home) -> list[int]:
    """The process ids of all replicas in a home."""
    return sorted(pid for pid, command in processes(home.path) if "serve.py" in command and "-c" not in command.split())


def ready(run: Run, count: int = 1) -> int:
    """How many replicas of a run are ready, once that is `count` or time is over."""

    def enough() -> bool:
        run.refresh()
        return run_ready(run) == count

    wait_until(enough, timeout=60, what=f"{count} ready replicas of {run.name}")
    return count


def run_ready(run: Run) -> int:
    """How many are ready as the run was seen last."""
    info = run._model.service
    return info.ready if info else 0


def fetch(port: int) -> bytes:
    """The page at a local port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return bytes(answer.read())


def test_a_service_runs_until_it_is_stopped(client: Client, home: Home) -> None:
    """Submitted, ready, attached and asked, read, stopped: nothing of it is left."""
    run = client.runs.submit(service(home, replicas=2, env={"WORD": "hej"}), run_name="svc")
    assert run.wait_until_ready(timeout=60)
    ready(run, 2)
    assert len(replicas(home)) == 2
    assert run.attach()
    assert run.ports is not None
    (local,) = run.ports.values()
    assert fetch(local).endswith(b" hej")
    assert next(iter(run.logs(replica_num=1))) == b"serving\n"
    run.stop()
    assert ended(run).status is RunStatus.TERMINATED
    assert (run.url, run.service_model) == (None, None)
    wait_until(lambda: not replicas(home), what="the end of all replicas")


@pytest.mark.parametrize("victim", ["process", "agent"])
def test_a_killed_replica_is_replaced(client: Client, home: Home, victim: str) -> None:
    """SIGKILL of its process, or of its agent: another one is ready again, the other replica goes on."""
    run = client.runs.submit(service(home, replicas=2))
    ready(run, 2)
    before = replicas(home)
    if victim == "process":
        os.kill(before[0], signal.SIGKILL)
    else:
        os.kill(home.agents()[0]["pid"], signal.SIGKILL)
    wait_until(lambda: len(set(replicas(home)) - set(before)) == 1, timeout=60, what="a replacement")
    ready(run, 2)
    now = replicas(home)
    assert len(now) == 2
    assert len(set(now) & set(before)) == 1
    assert run.status is RunStatus.RUNNING


def test_a_killed_server_finds_its_replicas(client: Client, home: Home) -> None:
    """SIGKILL of the server: the same processes are ready again, and what died meanwhile is replaced."""
    run = client.runs.submit(service(home, replicas=2))
    ready(run, 2)
    before = replicas(home)
    home.kill_server()
    assert replicas(home) == before
    ready(run, 2)
    assert replicas(home) == before
    home.kill_server()
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: len(refreshed_replicas(run, home) - set(before)) == 1, timeout=60, what="a replacement")
    ready(run, 2)
    run.stop(abort=True)
    assert ended(run).status is RunStatus.ABORTED


def refreshed_replicas(run: Run, home: Home) -> set[int]:
    """The replicas, having seen to it that there is a server."""
    run.refresh()
    return set(replicas(home))


def test_a_typo_fails_the_run_with_what_it_printed(client: Client, home: Home) -> None:
    """Three attempts, not for ever; the message has exit code and output."""
    run = client.runs.submit(service(home, commands=["no-such-program --serve"]))
    assert not run.wait_until_ready(timeout=60)
    assert run.status is RunStatus.FAILED
    for words in ("3 attempts in a row", "code 127", "no-such-program"):
        assert words in (run.message or "")


def test_a_service_that_is_not_ready_in_time(client: Client, home: Home) -> None:
    """`wait_until_ready` gives up after its time; the run goes on."""
    run = client.runs.submit(service(home, commands=["sleep 1000"]))
    assert not run.wait_until_ready(timeout=1)
    assert not run.status.is_finished


def test_a_task_is_ready_when_it_runs(client: Client) -> None:
    """And has no address."""
    run = client.runs.submit(Task(commands=["sleep 1000"], stop_duration=1))
    assert run.wait_until_ready(timeout=60)
    assert run.status is RunStatus.RUNNING
    assert (run.url, run.service_url, run.service_model) == (None, None, None)


def test_two_services_on_one_name(client: Client, home: Home) -> None:
    """The second is refused while the first is active."""
    client.runs.submit(service(home), run_name="same")
    with pytest.raises(RunNameTakenError, match="A run named 'same' is active"):
        client.runs.submit(service(home), run_name="same")


def test_what_a_service_may_not_ask_for_yet(client: Client, home: Home) -> None:
    """Scaling, for one: refused at submit and in a plan, with what to write instead."""
    scaled = service(home, replicas="1..3", scaling={"metric": "rps", "target": 5})
    for ask in (client.runs.submit, client.runs.get_plan):
        with pytest.raises(ServerClientError, match=r"'scaling' is not carried out by this version.*replicas=2"):
            ask(scaled)


def test_a_plan_has_a_job_for_each_replica(client: Client, home: Home) -> None:
    """With the offers for each."""
    plan = client.runs.get_plan(service(home, replicas=3), run_name="svc")
    assert [job.job_spec.job_name for job in plan.job_plans] == ["svc-0-0", "svc-1-0", "svc-2-0"]
    assert all(job.offers for job in plan.job_plans)


@pytest.mark.docker
def test_a_service_in_containers(docker: Docker, client: Client, home: Home) -> None:
    """Two replicas of an image on one computer, each published on a port of its own; a killed one is replaced."""
    image = docker.image()
    command = "mkdir -p /tmp/www; echo $PORT > /tmp/www/index.html; exec httpd -f -p $PORT -h /tmp/www"
    run = client.runs.submit(service(home, image=image, commands=[command], replicas=2))
    ready(run, 2)
    assert run.attach()
    assert run.ports is not None
    assert fetch(*run.ports.values()) == b"%d\n" % next(iter(run.ports))
    run.detach()
    before = run._model.jobs[0].job_submissions[-1].id
    label = "dstack.instance"
    docker("kill", docker.containers(label)[0])
    wait_until(lambda: newest(run) != before or len(all_attempts(run)) == 3, timeout=60, what="a replacement")
    ready(run, 2)
    run.stop(abort=True)
    ended(run)
    wait_until(lambda: not docker.containers(label), timeout=30, what="no container")


def all_attempts(run: Run) -> list[object]:
    """All attempts of all replicas, after another look."""
    run.refresh()
    return [attempt for job in run._model.jobs for attempt in job.job_submissions]


def newest(run: Run) -> object:
    """The id of the latest attempt of the first replica."""
    return run._model.jobs[0].job_submissions[-1].id


def test_submit_needs_no_right_to_the_port_of_the_web(client: Client, home: Home) -> None:
    """A bare port wishes for local port 80, and takes another one where that is in use."""
    port = free_port()
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):
            taken.enter_context(socket.create_server(("127.0.0.1", 80)))
        run = client.runs.submit(service(home, port=port))
        assert run.wait_until_ready(timeout=60)
        assert run.attach()
        assert run.ports is not None
        assert fetch(run.ports[port])
        assert run.ports[port] != 80
