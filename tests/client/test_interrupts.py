"""Ctrl+C, anywhere: the program ends as programs do, the run is in a known state, and no thread is left."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from dstack.api import Client, RunStatus
from dstack.api.server import APIClient
from dstack_core._models.runs import Run
from dstack_core.testing import wait_until
from tests.client.scripted import TOKEN, ScriptedServer, json_of, located, log_piece, run_model
from tests.support.homes import Home, ended

PROGRAM = """
import sys, threading
from dstack.api import Client, Task

client = Client.from_config("main", sys.argv[1], sys.argv[2])
try:
    {body}
except KeyboardInterrupt as interrupt:
    print("interrupted", *getattr(interrupt, "__notes__", []), flush=True)
    wait = [t for t in threading.enumerate() if t is not threading.main_thread()]
    for thread in wait:
        thread.join(20)
    print("threads", [t.name for t in threading.enumerate()], flush=True)
"""


class Held:
    """An answer that waits for its time. Set `go` to let it through."""

    def __init__(self, model: object) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()
        self._model = model

    def __call__(self, _: object) -> object:
        self.asked.set()
        self.go.wait(60)
        return json_of(self._model)


def program(home: Home, server: ScriptedServer, body: str) -> subprocess.Popen[bytes]:
    """A program that talks to the scripted server."""
    home.path.mkdir(exist_ok=True)
    return home.start(PROGRAM.format(body=body), server.url, TOKEN)


SUBMIT = "client.runs.submit(Task(commands=['true']), run_name='a-run')"


def test_ctrl_c_in_submit_that_was_carried_out(home: Home, server: ScriptedServer) -> None:
    """The answer is waited for, and the interrupt says that the run exists and how to stop it."""
    held = Held(run_model())
    server.on("runs/submit", held)  # type: ignore[arg-type]  # an object that can be called
    submitting = program(home, server, SUBMIT)
    assert held.asked.wait(60)
    submitting.send_signal(signal.SIGINT)
    held.go.set()
    out, err = submitting.communicate(timeout=60)
    assert out.splitlines() == [
        b"interrupted The run 'a-run' was submitted before that, and goes on. To stop it: dstack stop a-run",
        b"threads ['MainThread']",
    ], err


def test_ctrl_c_twice_in_submit(home: Home, server: ScriptedServer) -> None:
    """The second one ends the waiting: then it is said that it is not known."""
    held = Held(run_model())
    server.on("runs/submit", held)  # type: ignore[arg-type]  # an object that can be called
    submitting = program(home, server, f"{SUBMIT}")
    assert held.asked.wait(60)
    assert submitting.stdout is not None
    while submitting.poll() is None and not readable(submitting):
        submitting.send_signal(signal.SIGINT)
    assert b"It is not known whether the run was submitted" in submitting.stdout.readline()
    held.go.set()
    submitting.communicate(timeout=60)


def readable(process: subprocess.Popen[bytes]) -> bool:
    """Whether the program has said something, after a moment."""
    import select

    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.2)[0])


def test_ctrl_c_in_submit_that_fails(home: Home, server: ScriptedServer) -> None:
    """The server refuses meanwhile: the interrupt says that there is no run."""
    held = Held(run_model())
    server.on("runs/submit", lambda asked: (held(asked), missing(asked))[1])
    submitting = program(home, server, SUBMIT)
    assert held.asked.wait(60)
    submitting.send_signal(signal.SIGINT)
    held.go.set()
    out, _ = submitting.communicate(timeout=60)
    assert b"interrupted The run was not submitted: no such project" in out


def missing(_: object):  # type: ignore[no-untyped-def]  # noqa: ANN201  # a Starlette response
    """A refusal."""
    from tests.client.scripted import refusal

    return refusal(404, "not_found", "no such project")


def test_ctrl_c_while_attach_waits(home: Home, server: ScriptedServer) -> None:
    """The wait ends at once; a second attach works."""
    held = Held(run_model(at=located()))
    server.on("runs/get", lambda _: json_of(run_model(RunStatus.SUBMITTED)), held)  # type: ignore[arg-type]  # as above
    attaching = program(home, server, "client.runs.get('a-run').attach()")
    try:
        wait_until(lambda: held.asked.is_set() or server.asked("runs/get"), timeout=60, what="the wait")
        assert held.asked.wait(60)
        attaching.send_signal(signal.SIGINT)
        out, err = attaching.communicate(timeout=60)
    finally:
        held.go.set()
    assert out.splitlines() == [b"interrupted", b"threads ['MainThread']"], err


def test_ctrl_c_while_attached_and_reading(home: Home, server: ScriptedServer) -> None:
    """Forwarding ends with detach, which leaves no thread."""
    model = run_model(ports=[(80, None)], at=located(ports={80: 9}))
    server.on("runs/get", lambda _: json_of(model)).on("logs", lambda _: log_piece(0, b"a line\n"), Held(model))  # type: ignore[arg-type]  # as above
    body = """run = client.runs.get('a-run')
    try:
        run.attach()
        for log in run.logs():
            print(log.decode(), end='', flush=True)
    finally:
        run.detach()"""
    reading = program(home, server, body)
    assert reading.stdout is not None
    assert reading.stdout.readline() == b"a line\n"
    reading.send_signal(signal.SIGINT)
    out, err = reading.communicate(timeout=60)
    assert out.splitlines() == [b"interrupted", b"threads ['MainThread']"], err
    server._scripts["logs"][0].go.set()  # type: ignore[attr-defined]  # the answer that is held


@pytest.fixture
def started(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is about to start the local server."""
    code = (
        "print('go', flush=True)\nfrom dstack.api import Client\nClient.from_config()\nprint('up', flush=True)\ninput()"
    )
    process = home.start(code, stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n", timeout=60)


def test_ctrl_c_while_the_server_starts(home: Home, started: subprocess.Popen[bytes]) -> None:
    """The server is not hit by it, and serves the next program."""
    assert started.stdout is not None
    assert started.stdout.readline() == b"go\n"
    wait_until(lambda: home.server_pid() is not None, timeout=60, what="the server's process")
    pid = home.server_pid()
    started.send_signal(signal.SIGINT)
    asked = home.run("from dstack.api import Client; print(Client.from_config().client.get_server_info().pid)")
    assert int(asked.stdout) == pid, asked.stderr.decode()


def test_ctrl_c_in_a_real_submit_leaves_a_run_that_is_known(client: Client, home: Home) -> None:
    """At many moments: whatever the note says is what the server knows."""
    code = """
import os, signal, sys, threading
from dstack.api import Client, Task
client = Client.from_config()
client.runs.list()
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    client.runs.submit(Task(commands=["true"]), run_name=sys.argv[2])
    print("submitted")
    threading.Event().wait(5)
except KeyboardInterrupt as interrupt:
    print(*getattr(interrupt, "__notes__", ["outside"]))
except BaseException as error:
    # pydantic, while it makes a validator, may turn Ctrl+C into an error of its own.
    print("outside", repr(error))
"""
    for number in range(8):
        name = f"at-{number}"
        done = home.run(code, str(number * 0.005), name)
        said = done.stdout.decode()
        run = client.runs.get(name)
        if "was submitted" in said or "submitted\n" in said:
            assert run is not None, said
            ended(run)
        else:
            assert run is None, said + done.stderr.decode()


def test_a_submit_in_another_thread_is_not_interrupted(server: ScriptedServer, api: APIClient) -> None:
    """Only the main thread gets Ctrl+C; elsewhere the request is made directly."""
    from dstack_core._client.submitting import submitted

    names: list[str] = []
    model = run_model()

    def send(_: object) -> Run:
        names.append(threading.current_thread().name)
        return model

    thread = threading.Thread(target=lambda: submitted(lambda: model.run_spec, send), name="mine")
    thread.start()
    thread.join(20)
    assert names == ["mine"]
