"""Jobs with an image: the same byte-exact terminal, the same ends, and no container is left."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from dstack_core.testing import wait_until
from tests.support.docker import Docker
from tests.support.real_agents import LONG, RealAgent, StartAgent

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def image(docker_engine: Docker) -> str:
    """Busybox, with a shell."""
    return docker_engine.image()


@pytest.fixture
def agent(docker: Docker, start_agent: StartAgent) -> RealAgent:
    """An agent that finds the container engine."""
    return start_agent()


@pytest.fixture(autouse=True)
def nothing_is_left(agent: RealAgent, docker: Docker) -> Any:
    """Every container of the agent is gone after the test."""
    yield
    agent.end()
    assert docker.containers(f"dstack.instance={agent.directory.name}") == []


def test_shell_script(agent: RealAgent, image: str) -> None:
    """Runs in the image, with its exit code; status, times and container are as they should be."""
    agent.run("echo out; echo err >&2; test -e /bin/busybox && exit 9", image=image)
    state = agent.wait()
    assert (state["exit_code"], state["reason"], state["message"]) == (9, "exited", None)
    assert state["running_at"]
    assert agent.output() == b"out\nerr\n"


def test_every_byte_arrives_untouched(agent: RealAgent, docker: Docker) -> None:
    """Through the container's terminal, too."""
    script = '#!/bin/sh\nfor i in $(seq 0 255); do printf "\\\\$(printf %03o $i)"; done\n'
    agent.run("/bin/bytes", image=docker.image({"/bin/bytes": script}))
    assert agent.output() == bytes(range(256))


@pytest.mark.parametrize("user", [None, "someone", "4321"])
def test_programs_see_a_terminal(agent: RealAgent, image: str, user: str | None) -> None:
    """Output is a terminal, also for users other than root; it arrives line by line."""
    agent.run("test -t 1 && test -t 2 && echo terminal; id -u; sleep 600", image=image, user=user)
    agent.wait_for_output(b"terminal\n")
    agent.wait_for_output({None: b"0", "someone": b"1234", "4321": b"4321"}[user] + b"\n")
    assert agent.wait("running")["status"] == "running"


def test_the_images_own_entrypoint(agent: RealAgent, docker: Docker) -> None:
    """With its arguments, as process 1, on a terminal."""
    image = docker.image(
        {"/bin/serve": '#!/bin/sh\ntest -t 1 && echo terminal\necho $$ "$@"\n'},
        changes=['ENTRYPOINT ["/bin/serve", "a b"]', 'CMD ["c"]'],
    )
    agent.run(None, image=image)
    assert agent.output() == b"terminal\n1 a b c\n"


def test_arguments_instead_of_the_images_command(agent: RealAgent, docker: Docker) -> None:
    """They follow the entrypoint."""
    image = docker.image({}, changes=['ENTRYPOINT ["/bin/echo", "own"]', 'CMD ["c"]'])
    agent.run(argv=["x y", "$HOME"], image=image)
    assert agent.output() == b"own x y $HOME\n"


def test_entrypoint_of_the_job(agent: RealAgent, docker: Docker) -> None:
    """Replaces the image's; with a script it is the shell."""
    image = docker.image({}, changes=['ENTRYPOINT ["/bin/false"]'])
    agent.run(argv=["-c", "echo $0 $1", "zero", "one"], entrypoint=["/bin/sh"], image=image)
    assert agent.output() == b"zero one\n"


def test_an_image_without_a_shell(agent: RealAgent, docker: Docker) -> None:
    """Its own program runs, through a pipe."""
    image = docker.image({}, shell=False, changes=['ENTRYPOINT ["/bin/busybox", "echo"]', 'CMD ["hello"]'])
    agent.run(None, image=image)
    assert agent.output() == b"hello\n"
    assert agent.wait()["exit_code"] == 0


def test_a_script_for_an_image_without_a_shell(agent: RealAgent, docker: Docker) -> None:
    """Is refused with the reason."""
    agent.run("echo x", image=docker.image({}, shell=False))
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert "/bin/sh" in state["message"]


@pytest.mark.parametrize("shell", [True, False])
def test_stop_is_polite_first(agent: RealAgent, image: str, shell: bool) -> None:
    """The program, though its parent is a shell as process 1, gets SIGTERM and may finish."""
    script = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    if shell:
        agent.run(script, image=image)
    else:
        agent.run(argv=["/bin/sh", "-c", script], entrypoint=[], image=image)
    agent.wait_for_output(b"ready\n")
    agent.stop(LONG)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", 7)
    assert agent.output().endswith(b"bye\n")


def test_stop_kills_after_the_grace(agent: RealAgent, image: str) -> None:
    """A container that ignores SIGTERM is killed, with all that is in it."""
    agent.run("trap '' TERM; setsid sleep 600 & echo ready; while :; do sleep 0.1; done", image=image)
    agent.wait_for_output(b"ready\n")
    agent.stop(0.3)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", 137)


@pytest.mark.parametrize("status", ["preparing", "running"])
def test_stop_at_once(agent: RealAgent, image: str, status: str) -> None:
    """At any moment, also while the container is being created."""
    agent.run("echo ready; sleep 600", image=image)
    if status == "running":
        agent.wait("running")
    agent.stop(0)
    assert agent.wait()["reason"] == "stopped"


def test_max_duration(agent: RealAgent, image: str) -> None:
    """Counts from running on."""
    agent.run("sleep 600", image=image, max_duration=0.5, stop_grace=0.1)
    assert agent.wait()["reason"] == "max_duration"


def test_ports_are_published_on_free_ports_of_this_machine(agent: RealAgent, docker: Docker) -> None:
    """On the loopback address only, and the state says where."""
    page = docker.image({"/www/index.html": "hello from a container"})
    agent.run("exec httpd -f -p 80 -h /www", image=page, ports=[80, 8081])
    ports = agent.wait("running")["ports"]
    assert set(ports) == {"80", "8081"}
    assert docker("port", *docker.containers(f"dstack.instance={agent.directory.name}"), "80").startswith("127.0.0.1:")

    def fetch() -> bytes:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", ports["80"], timeout=5)
            connection.request("GET", "/index.html")
            return connection.getresponse().read()
        except OSError:
            return b""

    assert wait_until(fetch, timeout=LONG, what="the page") == b"hello from a container"


def test_environment(agent: RealAgent, docker: Docker) -> None:
    """On top of the image's; names that mean something to the engine, and values of several lines, included."""
    env = {
        "A": "one\ntwo",
        "B": " x ",
        "PATH": "/bin:/own",
        "HOME": "/tmp",
        "DOCKER_HOST": "tcp://nowhere",
        "U": "ü'\"$",
    }
    image = docker.image({}, changes=["ENV FROM_IMAGE=i"])
    agent.run('printf "%s|" "$A" "$B" "$PATH" "$HOME" "$DOCKER_HOST" "$U" "$FROM_IMAGE" "$TERM"', image=image, env=env)
    assert agent.output().decode() == "one\ntwo| x |/bin:/own|/tmp|tcp://nowhere|ü'\"$|i|dumb|"


def test_working_dir_and_shared_memory(agent: RealAgent, image: str) -> None:
    """Where to start, and how large /dev/shm is."""
    agent.run("pwd; grep /dev/shm /proc/mounts", image=image, working_dir="/tmp", shm_mib=128)
    output = agent.output().decode()
    assert output.startswith("/tmp\n")
    assert "size=131072k" in output


def test_limits(agent: RealAgent, docker: Docker, image: str) -> None:
    """CPU and memory limits reach the engine."""
    agent.run("sleep 600", image=image, cpus=0.5, memory_mib=64)
    agent.wait("running")
    (container,) = docker.containers(f"dstack.instance={agent.directory.name}")
    assert (
        docker("inspect", "--format", "{{.HostConfig.NanoCpus}} {{.HostConfig.Memory}}", container)
        == "500000000 67108864"
    )


def test_privileged_reaches_the_engine(agent: RealAgent, docker: Docker, image: str) -> None:
    """It starts so, or the engine's refusal is in the message."""
    agent.run("echo yes", image=image, privileged=True)
    state = agent.wait()
    assert agent.output() == b"yes\n" or "permitted" in state["message"]


def test_gpus(agent: RealAgent, docker: Docker, image: str) -> None:
    """Granted through the engine's GPU hook."""
    if not docker.has_gpu_hook():
        pytest.skip("the running docker daemon has no GPU hook")
    agent.run("echo with gpu", image=image, gpus="all")
    assert agent.output() == b"with gpu\n"
    assert agent.wait()["exit_code"] == 0


def test_gpus_that_the_engine_cannot_grant(agent: RealAgent, docker: Docker, image: str) -> None:
    """The engine's words, and what to install."""
    if docker.has_gpu_hook():
        pytest.skip("this daemon has a GPU hook")
    agent.run("true", image=image, gpus="all")
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert "NVIDIA Container Toolkit" in state["message"]


def test_an_image_that_does_not_exist(agent: RealAgent) -> None:
    """Reason `pull_failed`, the engine's words, and a cure."""
    agent.run("true", image="127.0.0.1:9/no/such:image")
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("pull_failed", None)
    assert "127.0.0.1:9/no/such:image" in state["message"]
    assert "Check" in state["message"]


def test_a_program_that_is_not_in_the_image(agent: RealAgent, image: str) -> None:
    """As in a shell: exit code 127 and a line of output, or a refusal that names it."""
    agent.run(argv=[], entrypoint=["/no/such/program"], image=image)
    state = agent.wait()
    assert state["exit_code"] == 127 or state["reason"] == "start_failed"
    assert "/no/such/program" in agent.output().decode() + (state["message"] or "")


def test_metrics(agent: RealAgent, image: str) -> None:
    """Of the processes in the container."""
    agent.run("echo ready; i=0; while :; do i=$((i+1)); done", image=image)
    agent.wait("running")
    wait_until(lambda: agent.get("/v1/jobs/1/metrics")["cpu_seconds"] > 0.2, timeout=LONG, what="CPU time")
    metrics = agent.get("/v1/jobs/1/metrics")
    assert metrics["processes"] >= 1
    assert metrics["memory_mib"] > 0


def test_killing_the_agent_removes_the_container(agent: RealAgent, docker: Docker, image: str) -> None:
    """The watchdog does it, then the lock is free."""
    agent.run("sleep 600", image=image)
    agent.wait("running")
    os.kill(agent.pid, signal.SIGKILL)
    agent.process.wait(LONG)
    assert docker.containers(f"dstack.instance={agent.directory.name}") == []


def test_secrets_are_in_no_command_line(agent: RealAgent, image: str) -> None:
    """Neither environment nor password is ever seen by `ps`, while all commands of a container's life run."""
    seen: list[bytes] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            for line in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    text = line.read_bytes()
                except OSError:
                    continue
                if b"hush-hush" in text:
                    seen.append(text)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        agent.run("echo ready", image=image, env={"TOKEN": "hush-hush", "DOCKER_X": "hush-hush"})
        agent.wait()
    finally:
        watching.set()
        watcher.join(60)
    assert seen == []
    left = [path for path in agent.directory.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]
    assert left == []


REGISTRY = """
import base64, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        given = self.headers.get("Authorization", "")
        print(self.path, given, file=sys.stderr, flush=True)
        good = given == "Basic " + base64.b64encode(b"me:hush-hush").decode()
        self.send_response(404 if good else 401)
        self.send_header("WWW-Authenticate", 'Basic realm="test"')
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_login_for_the_registry(agent: RealAgent, tmp_path: Path) -> None:
    """The registry gets user name and password; the file that held them is gone, and the message has neither."""
    with (tmp_path / "asked").open("wb") as asked:
        registry = subprocess.Popen(["python3", "-c", REGISTRY], stdout=subprocess.PIPE, stderr=asked)
    assert registry.stdout
    try:
        port = int(registry.stdout.readline())
        login = {"username": "me", "password": "hush-hush"}
        agent.run("true", image=f"127.0.0.1:{port}/private/image:1", registry=login)
        state = agent.wait()
    finally:
        registry.kill()
        registry.communicate()
    assert "Basic bWU6aHVzaC1odXNo" in (tmp_path / "asked").read_text()
    assert state["reason"] == "pull_failed"
    assert "hush" not in state["message"]
    assert not (agent.directory / "registry").exists()


def test_no_engine(start_agent: StartAgent, tmp_path: Path) -> None:
    """Without docker and podman on the PATH: what to do."""
    agent = start_agent(env={"PATH": str(tmp_path)})
    agent.run("true", image="x")
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert "neither docker nor podman" in state["message"]


def test_a_service_is_told_its_own_port(agent: RealAgent, image: str) -> None:
    """PORT is the one inside the container, unless the user set it; outside, it is where the engine published it."""
    agent.run("echo $PORT; exec httpd -f -p $PORT", image=image, ports=[8000], service_port=8000)
    agent.wait("running")
    agent.wait_for_output(b"8000\n")
    published = agent.state()["ports"]["8000"]
    assert published != 8000
    wait_until(lambda: _answers(published), timeout=LONG, what="the service to answer")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 404
    except OSError:
        return False
    finally:
        connection.close()


def test_a_service_in_a_container_with_the_users_own_port(agent: RealAgent, image: str) -> None:
    """What the user set stands."""
    agent.run("echo $PORT; sleep 600", image=image, ports=[8000], service_port=8000, env={"PORT": "9"})
    agent.wait_for_output(b"9\n")
