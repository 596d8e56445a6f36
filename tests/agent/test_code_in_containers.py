"""Containers find the job's code under /workflow, whichever engine and user they have."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import cast

import pytest

from dstack_core.testing import wait_until
from tests.support.archives import archive, entry, folder, link, run_with
from tests.support.docker import Docker
from tests.support.git_hosts import GitServer
from tests.support.real_agents import LONG, RealAgent, StartAgent

pytestmark = [pytest.mark.docker, pytest.mark.root]

CODE = archive(
    {"a.txt": b"text", "src/b.txt": b"inner"},
    entry("tool", b"#!/bin/sh\necho tool\n", mode=0o755),
    folder("void"),
    link("l", "src/b.txt"),
)


@pytest.fixture(params=["docker", "podman"])
def engine(request: pytest.FixtureRequest) -> Docker:
    """Both, one after the other."""
    return cast("Docker", request.getfixturevalue(request.param))


@pytest.fixture
def agent(engine: Docker, start_agent: StartAgent) -> Iterator[RealAgent]:
    """An agent that finds the engine; after the test no container of it is left, and no file of the job."""
    agent = start_agent()
    yield agent
    agent.end()
    assert engine.containers(f"dstack.instance={agent.directory.name}") == []
    assert not (agent.directory / "code").exists()


@pytest.mark.parametrize("user", [None, "someone", "4321"])
def test_the_container_has_the_files(agent: RealAgent, engine: Docker, user: str | None) -> None:
    """In its working directory, where any user may write; nothing of them stays on the machine."""
    script = (
        "pwd; cat a.txt l; ./tool; touch new src/new void/new && echo more >> a.txt && rm src/b.txt && mkdir made; "
        "ls -a; tail -n 1 a.txt; sleep 600"
    )
    run_with(agent, CODE, script, image=engine.image(), user=user)
    agent.wait_for_output(b"more\n")
    words = agent.log()[0].decode().split()
    assert words[:2] == ["/workflow", "textinnertool"]
    assert set(words[2:-1]) == {".", "..", "a.txt", "l", "made", "new", "src", "tool", "void"}
    assert not any((agent.directory / name).exists() for name in ("job", "workflow"))
    agent.stop(0)
    agent.wait()
    assert {path.owner() for path in agent.directory.rglob("*")} == {agent.directory.owner()}


def test_working_dir_of_a_container(agent: RealAgent, engine: Docker) -> None:
    """Below /workflow."""
    run_with(agent, CODE, "pwd; cat b.txt", image=engine.image(), working_dir="src")
    assert agent.output() == b"/workflow/src\ninner"


def test_an_absolute_working_dir_of_a_container(agent: RealAgent, engine: Docker) -> None:
    """Is the container's own; the code is under /workflow all the same."""
    run_with(agent, CODE, "pwd; cat /workflow/a.txt", image=engine.image(), working_dir="/tmp")
    assert agent.output() == b"/tmp\ntext"


@pytest.mark.parametrize("wanted", ["nowhere", "../tmp"])
def test_a_working_dir_that_cannot_be(agent: RealAgent, engine: Docker, wanted: str) -> None:
    """The job fails before a container is made."""
    run_with(agent, CODE, "true", image=engine.image(), working_dir=wanted)
    state = agent.wait()
    assert state["reason"] == "start_failed"
    assert repr(wanted) in state["message"]


def test_the_images_own_program_finds_them(agent: RealAgent, engine: Docker) -> None:
    """Also in an image without a shell."""
    changes = ['ENTRYPOINT ["/bin/busybox", "cat"]', 'CMD ["src/b.txt"]']
    run_with(agent, CODE, None, image=engine.image({}, shell=False, changes=changes), argv=["a.txt", "l"])
    assert agent.output() == b"textinner"


def test_a_clone_with_changes(agent: RealAgent, engine: Docker, git_server: GitServer) -> None:
    """Cloned on the machine, where git is, and seen by the container, where it may not be."""
    repository = git_server.repository("me/code")
    repository.commit({"a.txt": "committed", "b.txt": "committed"})
    repo = {"url": git_server.url_of("me/code")}
    script = "cat a.txt b.txt; cat .git/HEAD; echo x >> .git/config && echo written"
    run_with(agent, archive({"a.txt": b"changed,"}), script, image=engine.image(), user="someone", repo=repo)
    assert agent.output() == b"changed,committedref: refs/heads/main\nwritten\n"


def test_without_code_a_container_is_as_its_image_says(agent: RealAgent, engine: Docker) -> None:
    """Its own working directory, and no /workflow."""
    image = engine.image({}, changes=["WORKDIR /tmp"])
    agent.run("pwd; test -e /workflow || echo none", image=image)
    assert agent.output() == b"/tmp\nnone\n"


def test_an_image_with_a_file_in_the_way(agent: RealAgent, engine: Docker) -> None:
    """The job fails with the engine's words, and has not started."""
    run_with(agent, CODE, "echo ran", image=engine.image({"/workflow": "a file"}))
    state = agent.wait()
    assert state["reason"] in {"code_failed", "start_failed"}
    assert "/workflow" in state["message"]
    assert agent.output() == b""


def test_code_over_what_the_image_has(agent: RealAgent, engine: Docker) -> None:
    """What the image has under /workflow stays beside it."""
    run_with(agent, CODE, "cat own a.txt", image=engine.image({"/workflow/own": "own,"}))
    assert agent.output() == b"own,text"


@pytest.mark.parametrize("how", ["stop", "kill the agent"])
def test_an_end_while_the_code_is_copied(agent: RealAgent, engine: Docker, how: str) -> None:
    """No container is left, and none has started."""
    data = archive({f"{number}": b"x" * 4000 for number in range(5000)})
    run_with(agent, data, "echo ran", image=engine.image())
    label = f"dstack.instance={agent.directory.name}"
    wait_until(lambda: engine.containers(label), timeout=LONG, what="the container")
    if how == "stop":
        agent.stop(LONG)
        assert agent.wait()["reason"] == "stopped"
    else:
        os.kill(agent.pid, signal.SIGKILL)
        agent.process.wait(LONG)
    assert engine.containers(label) == []
    assert agent.job_processes() == set()
