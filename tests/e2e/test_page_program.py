"""The program of the API page, word for word, on this computer: an image, a GPU, a forwarded port, Ctrl+C."""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path

import pytest

from dstack.api import Client, Run, RunStatus
from dstack_core.testing import wait_until
from tests.support.docker import Docker, docker, docker_engine, missing
from tests.support.homes import Home, ended, processes

__all__ = ["docker", "docker_engine"]
pytestmark = [pytest.mark.docker, pytest.mark.root]

PROGRAM = """\
import sys

from dstack.api import Task, GPU, Client, Resources

client = Client.from_config()

task = Task(
    image="ghcr.io/huggingface/text-generation-inference:latest",
    env={"MODEL_ID": "TheBloke/Llama-2-13B-chat-GPTQ"},
    commands=[
        "text-generation-launcher --trust-remote-code --quantize gptq",
    ],
    ports=["80"],
)

run = client.runs.submit(
    run_name="my-awesome-run",  # (Optional) If not specified, 
    configuration=task,
    resources=Resources(gpu=GPU(memory="24GB")),
)

run.attach()

try:
    for log in run.logs():
        sys.stdout.buffer.write(log)
        sys.stdout.buffer.flush()
except KeyboardInterrupt:
    run.stop(abort=True)
finally:
    run.detach()
"""  # noqa: W291  # word for word

LAUNCHER = """\
#!/bin/sh
echo "launched with $* for $MODEL_ID"
mkdir -p /www
echo "$MODEL_ID is served" > /www/index.html
httpd -p 80 -h /www
echo Connected
exec sleep 100000
"""

# What the driver's tool prints for one card of 24 GB, in the form that is asked for.
NVIDIA_SMI = """\
#!/bin/sh
for argument; do case $argument in --query-gpu=*) fields=${argument#--query-gpu=};; esac; done
row=
for field in $(echo "$fields" | tr , ' '); do
    case $field in
        index) value=0;;
        uuid) value=GPU-5b1a6f0e-0000-4000-8000-000000000001;;
        name) value="NVIDIA GeForce RTX 4090";;
        memory.total) value=24564;;
        memory.used) value=1;;
        memory.free) value=24563;;
        compute_cap) value=8.9;;
        utilization.gpu) value=0;;
        *) value="[N/A]";;
    esac
    row="$row${row:+, }$value"
done
echo "$row"
"""


@pytest.fixture
def gpu(home: Home, tmp_path: Path) -> None:
    """One GPU of 24 GB, as far as anything here can tell."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    home.env["PATH"] = f"{tmp_path}:{home.env['PATH']}"


def page() -> bytes:
    """What the forwarded port serves."""
    with urllib.request.urlopen("http://127.0.0.1:80/", timeout=10) as answer:
        return answer.read()  # type: ignore[no-any-return]  # bytes


def test_the_program_of_the_page_runs_word_for_word(docker: Docker, gpu: None, home: Home) -> None:
    """Image, environment, GPU and port arrive in the container; Ctrl+C aborts it and leaves nothing."""
    if not docker.has_gpu_hook():
        missing("the docker daemon that runs here has no GPU hook")
    files = {"/usr/bin/text-generation-launcher": LAUNCHER}
    docker.image(files, name="ghcr.io/huggingface/text-generation-inference:latest")
    home.env |= docker.env | {"PATH": home.env["PATH"]}
    program = home.start(PROGRAM)
    assert program.stdout is not None
    first = program.stdout.readline()
    if not first:
        pytest.fail(program.communicate(timeout=5)[1].decode())
    expected = b"launched with --trust-remote-code --quantize gptq for TheBloke/Llama-2-13B-chat-GPTQ\n"
    assert first == expected
    assert program.stdout.readline() == b"Connected\n"
    assert page() == b"TheBloke/Llama-2-13B-chat-GPTQ is served\n"
    labels = [f"dstack.instance={path.parent.name}" for path in (home.path / "local").glob("*/agent.lock")]
    assert [len(docker.containers(label)) for label in labels] == [1]
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, b"", b"")
    run = found(home, "my-awesome-run")
    assert ended(run).status is RunStatus.ABORTED
    wait_until(lambda: not [p for p in processes(home.path) if "_server" not in p[1]], what="an empty tree")
    wait_until(lambda: not any(docker.containers(label) for label in labels), what="the end of the container")


def found(home: Home, name: str) -> Run:
    """The run, as a client in that home sees it."""
    before = os.environ.get("DSTACK_HOME")
    os.environ["DSTACK_HOME"] = str(home.path)
    try:
        run = Client.from_config().runs.get(name)
    finally:
        os.environ.pop("DSTACK_HOME")
        if before is not None:
            os.environ["DSTACK_HOME"] = before
    assert run is not None
    return run
