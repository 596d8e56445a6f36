"""Instances from creation to end, with real processes: exactly one agent each, and nothing left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from dstack_local import LocalConfig, _backend, _processes
from dstack_local._backend import LocalBackend
from dstack_local._processes import processes_of

from dstack_core.plugin import (
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Range,
    Requirements,
    StateReason,
)
from dstack_core.testing import wait_until
from tests.support.local import AGENT, OWNER, Requests, gone, ready, state


def starts(home: Path, instance: Instance) -> list[str]:
    """The agents that ever ran for an instance."""
    file = home / "local" / instance.ref.id / "starts"
    return file.read_text().split() if file.exists() else []


def test_an_instance_lives_from_create_to_terminate(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """Pending or running at once, running soon, gone after terminate, and terminated for ever after."""
    request = requests()
    instance = backend.dstack_create_instance(request)
    assert (instance.intent, instance.owner) == (request.intent, OWNER)
    ready(home, instance)
    known = backend.dstack_get_instance(instance.ref)
    assert known is not None
    assert known.state is InstanceState.RUNNING
    assert known.endpoint is not None
    assert known.endpoint.unix_socket == home / "local" / request.name / "agent.sock"
    assert [one.ref for one in backend.dstack_list_instances(OWNER)] == [instance.ref]
    assert backend.dstack_list_instances(uuid4()) == []
    assert [(one.ref, one.owner) for one in backend.dstack_list_all_instances()] == [(instance.ref, OWNER)]
    wait_until(lambda: gone(backend, instance))
    assert not (home / "local" / request.name).exists()
    assert backend.dstack_list_instances(OWNER) == []
    assert backend.dstack_create_instance(request).state is InstanceState.TERMINATED
    assert starts(home, instance) == []


def test_only_the_owner_of_the_home_can_look_in(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """What runs here may print and store anything."""
    instance = backend.dstack_create_instance(requests())
    directory = home / "local" / instance.ref.id
    assert stat.S_IMODE((home / "local").stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "instance.json").stat().st_mode) == 0o600


def test_creating_again_returns_the_first_instance(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """From this process or another, before and after the agent is up."""
    request = requests()
    first = backend.dstack_create_instance(request)
    for _ in range(3):
        assert backend.dstack_create_instance(request).ref == first.ref
    ready(home, first)
    assert LocalBackend(LocalConfig()).dstack_create_instance(request).state is InstanceState.RUNNING
    assert len(starts(home, first)) == 1


def test_ten_at_once_are_one_agent(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """Ten processes' worth of backends, one intent."""
    request = requests()
    together = threading.Barrier(10)

    def create(_: int) -> Instance:
        together.wait()
        return LocalBackend(LocalConfig()).dstack_create_instance(request)

    with ThreadPoolExecutor(10) as pool:
        created = list(pool.map(create, range(10)))
    assert len({instance.ref.id for instance in created}) == 1
    ready(home, created[0])
    wait_until(lambda: len(processes_of(request.name)) == 1, what="the agents that came too late to end")
    assert len(starts(home, created[0])) == 1


def test_another_body_for_the_same_intent_is_refused(backend: LocalBackend, requests: Requests) -> None:
    """A replay is byte for byte; anything else is a mistake of the caller."""
    request = requests()
    backend.dstack_create_instance(request)
    with pytest.raises(InvalidRequestError, match="another request of the same intent"):
        backend.dstack_create_instance(request.model_copy(update={"tags": {"run": "other"}}))


def test_never_more_than_there_is(backend: LocalBackend, requests: Requests) -> None:
    """However many ask at once, only as many get an instance as fit; then one more fits for each that ended."""
    whole = int(backend.dstack_list_offers(Requirements())[0].resources.cpus)
    wanted = [requests(cpus=Range(min=whole)) for _ in range(6)]

    def create(request: InstanceRequest) -> Instance | None:
        try:
            return backend.dstack_create_instance(request)
        except NoCapacityError:
            return None

    with ThreadPoolExecutor(6) as pool:
        (only,) = filter(None, pool.map(create, wanted))
    (offer,) = backend.dstack_list_offers(Requirements(cpus=Range(min=1)))
    assert not offer.availability.worth_trying
    assert "This computer is in use: 1 CPUs asked for, 0 free" in str(offer.reason)
    wait_until(lambda: gone(backend, only))
    assert create(requests(cpus=Range(min=whole))) is not None
    with pytest.raises(NoCapacityError, match="CPUs asked for, 0 free"):
        backend.dstack_create_instance(wanted[0].model_copy(update={"intent": uuid4(), "name": "one-too-many"}))


def test_an_agent_that_cannot_be_started_holds_nothing(backend: LocalBackend, requests: Requests) -> None:
    """The request is refused for certain, its part of the computer is free again, and a replay changes nothing."""
    whole = int(backend.dstack_list_offers(Requirements())[0].resources.cpus)
    request = requests(cpus=Range(min=whole)).model_copy(update={"agent_command": ("/no/such/program",)})
    with pytest.raises(InvalidRequestError, match="/no/such/program"):
        backend.dstack_create_instance(request)
    assert backend.dstack_create_instance(request).state is InstanceState.TERMINATED
    assert backend.dstack_list_offers(Requirements(cpus=Range(min=whole)))[0].availability.worth_trying


def test_an_agent_that_ends_before_it_took_its_place_is_noticed(
    backend: LocalBackend, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as pending for a while, then as failed."""
    broken = requests().model_copy(update={"agent_command": (sys.executable, "-c", "raise SystemExit('broken')")})
    instance = backend.dstack_create_instance(broken)
    assert instance.state is InstanceState.PENDING
    monkeypatch.setattr(_backend, "_START_LIMIT", 0.0)
    wait_until(lambda: state(backend, instance) is InstanceState.TERMINATED)
    known = backend.dstack_get_instance(instance.ref)
    assert known is not None
    assert known.reason is StateReason.FAILURE


def test_an_agent_that_was_killed_is_terminated_and_never_started_again(
    home: Path, backend: LocalBackend, requests: Requests
) -> None:
    """Its lock is free: that is the whole truth. What it reserved is free again, too."""
    whole = int(backend.dstack_list_offers(Requirements())[0].resources.cpus)
    request = requests(cpus=Range(min=whole))
    instance = backend.dstack_create_instance(request)
    ready(home, instance)
    for pid in processes_of(request.name):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state(backend, instance) is InstanceState.TERMINATED)
    assert backend.dstack_create_instance(request).state is InstanceState.TERMINATED
    assert len(starts(home, instance)) == 1
    assert backend.dstack_list_offers(Requirements(cpus=Range(min=whole)))[0].availability.worth_trying


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for shed in (False, True):
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 64)
        os.chdir("/")
        if shed:
            os.execve("/bin/sleep", ["sleep", "600"], {})
        while True:
            signal.pause()
"""


def test_terminate_ends_those_that_do_not_want_to(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """Daemons, those that ignore SIGTERM, and those that shed their environment."""
    instance = backend.dstack_create_instance(requests(STUBBORN))
    ready(home, instance)
    wait_until(lambda: len(processes_of(instance.ref.id)) == 2, what="the children to have started")
    agent = int(starts(home, instance)[0])
    children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    assert len(children) == 2
    wait_until(lambda: gone(backend, instance))
    assert [pid for pid in (agent, *children) if is_running(pid)] == []


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_an_agent_left_when_it_died_is_stopping_until_it_is_ended(
    home: Path, backend: LocalBackend, requests: Requests
) -> None:
    """The lock is free but a process of the instance lives on: not gone yet."""
    instance = backend.dstack_create_instance(requests(STUBBORN.replace("(False, True)", "(False,)")))
    ready(home, instance)
    wait_until(lambda: len(processes_of(instance.ref.id)) == 2)
    os.kill(int(starts(home, instance)[0]), signal.SIGKILL)
    # The child inherited no descriptor: the lock is free as soon as the agent is gone.
    wait_until(lambda: state(backend, instance) is InstanceState.STOPPING)
    wait_until(lambda: gone(backend, instance))


def test_an_agent_that_forks_during_the_look_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no list of processes then, but it holds the lock, so it is still to be ended."""
    started: list[subprocess.Popen[bytes]] = []
    looks = iter(range(100))
    real = _processes.processes_of

    def missing_it_once(name: str) -> set[int]:
        if (number := next(looks)) == 1:
            environment = {**os.environ, _processes.MARKER: name}
            command = (sys.executable, "-I", "-S", "-c", AGENT, "")
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True))
            wait_until((tmp_path / "ready").exists, what="the agent to hold the lock")
        return real(name) if number > 1 else set()

    monkeypatch.setattr(_processes, "processes_of", missing_it_once)
    ended = _processes.end(tmp_path, f"t-{uuid4().hex[:8]}", 4.0)
    (agent,) = started
    try:
        assert ended
        assert agent.wait(10) == -signal.SIGKILL
    finally:
        agent.kill()
        agent.wait(10)


def test_terminate_is_done_with_what_is_unknown_or_gone(backend: LocalBackend, requests: Requests) -> None:
    """Success, however often, and no path out of the folder."""
    instance = backend.dstack_create_instance(requests())
    for _ in range(3):
        wait_until(lambda: gone(backend, instance))
    for name in ("never-seen", "../home", "..", "", ".ended"):
        ref = InstanceRef(backend="local", id=name, region="local")
        backend.dstack_terminate_instance(ref)
        assert backend.dstack_get_instance(ref) is None


def test_the_agent_gets_no_secret_of_the_server(
    home: Path, backend: LocalBackend, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment has what programs need to run, and its mark; no descriptor of the server is open in it."""
    for name in ("DSTACK_TOKEN", "DSTACK_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example")
    secret = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(secret, True)
    does = "open('fds', 'w').write(' '.join(sorted(os.listdir('/proc/self/fd'))))"
    instance = backend.dstack_create_instance(requests(does))
    os.close(secret)
    environment = ready(home, instance)
    assert "s3cret" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["PIP_INDEX_URL"] == "https://mirror.example"
    assert environment["DSTACK_INSTANCE"] == instance.ref.id
    # Standard input, output and error, the lock, the file and the listing itself.
    assert len((home / "local" / instance.ref.id / "fds").read_text().split()) <= 6


def test_agents_that_ended_by_themselves_are_swept_up(
    home: Path, backend: LocalBackend, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while their directories go; the record that they were there stays."""
    request = requests()
    instance = backend.dstack_create_instance(request)
    ready(home, instance)
    for pid in processes_of(request.name):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state(backend, instance) is InstanceState.TERMINATED)
    (home / "local" / "cut-short").mkdir()
    monkeypatch.setattr(_backend, "_KEPT_DEAD", 0.0)
    monkeypatch.setattr(backend, "_sweep_again", 0.0)
    backend.dstack_create_instance(requests())
    assert not (home / "local" / request.name).exists()
    assert not (home / "local" / "cut-short").exists()
    assert backend.dstack_create_instance(request).state is InstanceState.TERMINATED


# -- killed at each step ---------------------------------------------------------------------------------------------


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Runs an action in a process of its own, killed before its n-th system interaction. True if it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child neither takes locks nor returns
        child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event.split(".", maxsplit=1)[0] in ("open", "os", "fcntl", "subprocess", "shutil"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_server_killed_at_any_step_of_create_leaves_one_agent_or_none(
    home: Path, backend: LocalBackend, requests: Requests
) -> None:
    """And the replay makes it exactly one, whichever step it was."""
    step, killed = 0, True
    while killed:
        step += 1
        request = requests()
        killed = killed_at(step, partial(LocalBackend(LocalConfig()).dstack_create_instance, request))
        instance = backend.dstack_create_instance(request)
        ready(home, instance)
        assert state(backend, instance) is InstanceState.RUNNING
        assert len(starts(home, instance)) == 1
        wait_until(partial(gone, backend, instance))
    assert step > 10
    assert list((home / "local").glob("t-*")) == []


def test_a_server_killed_at_any_step_of_terminate_is_no_matter(
    home: Path, backend: LocalBackend, requests: Requests
) -> None:
    """Terminating again brings it to its end, and a replay of the creation never starts it anew."""
    step, killed = 0, True
    while killed:
        step += 3
        request = requests()
        instance = backend.dstack_create_instance(request)
        ready(home, instance)
        other = LocalBackend(LocalConfig())
        killed = killed_at(step, partial(other.dstack_terminate_instance, instance.ref))
        wait_until(partial(gone, backend, instance))
        assert backend.dstack_create_instance(request).state is InstanceState.TERMINATED
        assert not (home / "local" / request.name).exists()
        assert not processes_of(request.name)
    assert step > 9


def test_the_agent_survives_who_started_it(home: Path, backend: LocalBackend, requests: Requests) -> None:
    """Even when that one is killed together with its whole process group, as a terminal does."""
    request = requests()
    program = (
        "import sys; from dstack_core.plugin import InstanceRequest; from dstack_local import LocalConfig;"
        "from dstack_local._backend import LocalBackend;"
        "LocalBackend(LocalConfig()).dstack_create_instance(InstanceRequest.model_validate_json(sys.stdin.read()));"
        "print('created', flush=True); import signal; signal.pause()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(request.model_dump_json().encode())
        server.stdin.close()
        assert server.stdout.readline() == b"created\n"
        os.killpg(server.pid, signal.SIGKILL)
    instance = backend.dstack_create_instance(request)
    ready(home, instance)
    assert state(backend, instance) is InstanceState.RUNNING
    assert len(starts(home, instance)) == 1
