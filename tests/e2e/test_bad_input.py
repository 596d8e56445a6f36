"""What a person is told who made a mistake, or whose computer is in the way: through the public API, for real."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack.api import (
    GPU,
    Client,
    ConfigurationError,
    NoOffersError,
    PortUsedError,
    Resources,
    Run,
    RunStatus,
    ServerClientError,
    Task,
)
from dstack_core._client.output import LogsDroppedWarning
from dstack_core.testing import wait_until
from tests.support.homes import Home, ended

SECRET = "hush-hush-4711-and-long"
LONG = "a-name-that-makes-the-path-too-long-for-a-socket-" * 4


@pytest.fixture
def connect(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Client]:
    """A client of this process, for a home that a test prepares before its server starts."""
    monkeypatch.setenv("DSTACK_HOME", str(home.path))
    monkeypatch.setenv("HOME", str(home.path.parent))
    home.path.mkdir(mode=0o700)
    (home.path / "server").mkdir(mode=0o700)
    return Client.from_config


def configure(home: Home, *lines: str) -> None:
    """Writes the server's configuration: `lines` is what stands under `backends:` of its project."""
    text = "\n".join(("projects:", "- name: main", "  backends:", *lines, ""))
    (home.path / "server" / "config.yml").write_text(text)


def mount(folder: Path, request: pytest.FixtureRequest) -> None:
    """Makes a folder a file system of one megabyte, until the test is over."""
    folder.mkdir(mode=0o700, parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", folder], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", folder], check=True))


# ---------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (
            Task,
            {"commands": ["true"], "comands": []},
            "Task: unknown field 'comands' (did you mean 'commands'?); allowed:",
        ),
        (Task, {"commands": "true"}, "Task: commands: this is a list of commands"),
        (Task, {"commands": ["true"], "ports": ["abc"]}, "Task: ports[0]: 'abc' is not a port: write 8080"),
        (Resources, {"mem": "8GB"}, "Resources: unknown field 'mem' (did you mean 'memory'?); allowed: cpu, disk"),
        (Resources, {"memory": 24}, "Resources: memory: 24 is ambiguous: write '24GB' or '24MB'"),
        (GPU, {"memory": 24}, "GPU: memory: 24 is ambiguous: write '24GB' or '24MB'"),
        (Resources, {"gpu": "A100:x"}, "gives the name of the GPU twice, 'A100' and 'x': write"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    kind: Callable[..., object], fields: dict[str, object], says: str
) -> None:
    """Which field, which value, and how to write it."""
    with pytest.raises(ConfigurationError) as raised:
        kind(**fields)
    assert says in str(raised.value)


def test_a_wrong_argument_of_submit_is_named_and_nothing_runs(client: Client) -> None:
    """The same for what is passed beside the configuration."""
    task = Task(commands=["true"])
    for wrong, says in (
        ({"max_duration": "1h30m"}, "max_duration: '1h30m' is not a duration"),
        ({"spot_policy": "cheap"}, "spot_policy: input should be 'spot', 'on-demand' or 'auto', not 'cheap'"),
        ({"backends": "local"}, r"backends: 'local' is not a list: write ['local']"),
        ({"resources": {"memory": 24}}, "resources.memory: 24 is ambiguous: write '24GB' or '24MB'"),
        ({"working_dir": "../x"}, "Use a path without '..'"),
        ({"configuration": {"commands": ["true"]}}, "configuration is a dict; pass a Task"),
    ):
        with pytest.raises(ConfigurationError) as raised:
            client.runs.submit(**{"configuration": task, **wrong})  # type: ignore[arg-type]  # wrong on purpose
        assert says in str(raised.value)
    assert client.runs.list(all=True) == []


def test_a_variable_that_is_taken_from_the_environment_must_be_there(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`env=["NAME"]` brings the caller's value along, and says how to give one if there is none."""
    task = Task(commands=["echo $DSTACK_TEST_TOKEN"], env=["DSTACK_TEST_TOKEN"])
    with pytest.raises(ConfigurationError, match=r"DSTACK_TEST_TOKEN\. Set it \(export DSTACK_TEST_TOKEN=\.\.\.\)"):
        client.runs.submit(configuration=task)
    monkeypatch.setenv("DSTACK_TEST_TOKEN", "from-here")
    assert b"".join(client.runs.submit(configuration=task).logs()) == b"from-here\n"


def test_a_port_that_is_taken_names_its_holder_and_nothing_runs(client: Client) -> None:
    """Before anything is submitted: the port, who has it, and the ways out."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PortUsedError) as raised:
            client.runs.submit(configuration=Task(commands=["true"], ports=[f"{port}:80"]))
    said = str(raised.value)
    assert f"Local port {port} is already in use" in said
    assert f"(pid {os.getpid()})" in said
    assert "ports=['*:80']" in said
    assert client.runs.list(all=True) == []


# ------------------------------------------------------------------------------------------------------ nothing fits


def test_nothing_fits_is_said_for_each_backend(home: Home, connect: Callable[[], Client]) -> None:
    """Also for one that is configured and not installed; amounts are written as people write them."""
    configure(home, "  - type: nocloud")
    client = connect()
    with pytest.raises(NoOffersError) as raised:
        client.runs.submit(configuration=Task(commands=["true"]), resources=Resources(memory="900TB", gpu="A100:8"))
    nocloud, local = sorted(str(raised.value).splitlines()[1:], reverse=True)
    assert nocloud == "  nocloud: Backend 'nocloud' is not installed. Install it with: pip install dstack-nocloud"
    assert local.startswith("  local: asks for 900TB memory, the largest machine has ")
    assert "asks for 8 x A100" in local
    assert "; nearest: local in local (" in local
    assert client.runs.list(all=True) == []


def test_an_image_without_a_container_engine_is_refused_at_once(
    home: Home, connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With neither docker nor podman in the PATH, plan and submit say so, and no run exists."""
    empty = home.path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    client = connect()
    task = Task(image="alpine", commands=["true"])
    with pytest.raises(NoOffersError, match="needs a container, and neither docker nor podman is installed"):
        client.runs.submit(configuration=task)
    (note,) = client.runs.get_plan(configuration=task).job_plans[0].notes
    assert note.startswith("local: The job needs a container")
    assert "leave out `image`" in note
    assert client.runs.list(all=True) == []


def test_a_backend_that_is_not_installed_comes_with_its_pip_line(home: Home, connect: Callable[[], Client]) -> None:
    """In a plan, at submit, and among the backends; what else there is works all the same."""
    configure(home, "  - type: nocloud", "    regions: [eu]")
    client = connect()
    line = "Backend 'nocloud' is not installed. Install it with: pip install dstack-nocloud"
    states = {backend.name: (backend.state, backend.reason) for backend in client.backends.installed()}
    assert states["nocloud"] == ("not_installed", line)
    assert [backend.name for backend in client.backends.list()] == ["local"]
    task = Task(commands=["echo here"])
    assert client.runs.get_plan(configuration=task).job_plans[0].notes == (f"nocloud: {line}",)
    with pytest.raises(NoOffersError) as raised:
        client.runs.submit(configuration=task, backends=["nocloud"])
    assert line in str(raised.value)
    assert b"".join(client.runs.submit(configuration=task).logs()) == b"here\n"


# ----------------------------------------------------------------------------------------------- configuration files


def test_a_malformed_client_configuration_names_file_line_and_cure(home: Home, connect: Callable[[], Client]) -> None:
    """Before any server is started."""
    (home.path / "config.yml").write_text("projects:\n- name: main\n  url: http://x\n  tokn: 3\n")
    with pytest.raises(ConfigurationError) as raised:
        connect()
    assert f"{home.path}/config.yml, line 4: unknown key 'tokn'; allowed: name, url, token, default" in str(
        raised.value
    )
    assert home.server_pid() is None


def test_a_configuration_that_breaks_while_the_server_runs(client: Client, home: Home) -> None:
    """What runs goes on; new work is refused with file, line and cure, until the file is repaired."""
    task = Task(commands=["while [ ! -e $GO ]; do sleep 0.05; done; echo on"], env={"GO": str(home.path / "go")})
    run = client.runs.submit(configuration=task)
    configure(home, "  - type: local", "    regions: [eu")
    for asked in (
        lambda: client.runs.submit(configuration=Task(commands=["true"])),
        lambda: client.runs.get_plan(configuration=Task(commands=["true"])),
        client.backends.installed,
    ):
        with pytest.raises(ServerClientError) as raised:
            asked()
        assert f"{home.path}/server/config.yml, line 6" in str(raised.value)
        assert "that begins in line 5" in str(raised.value)
    (home.path / "go").touch()
    assert b"".join(run.logs()) == b"on\n"
    configure(home, "  - type: local", "    cpus: 3")
    with pytest.raises(NoOffersError) as refused:
        client.runs.submit(configuration=Task(commands=["true"]))
    assert "config.yml, line 5, projects[0].backends[0].cpus: unknown key 'cpus'" in str(refused.value)
    configure(home, "  - type: local")
    assert ended(client.runs.submit(configuration=Task(commands=["true"]))).status is RunStatus.DONE


# ------------------------------------------------------------------------------------------------------- home folder


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_home_that_belongs_to_somebody_else(home: Home, mode: int) -> None:
    """Another user gets the path and the way out, be it that the home can be looked into or not."""
    home.path.mkdir()
    home.path.chmod(mode)
    home.path.parent.chmod(0o755)
    # Loaded while it still may: the interpreter may lie where nobody else can read.
    program = """
        import encodings.idna, importlib, os, pkgutil
        import dstack_core._client
        for module in pkgutil.iter_modules(dstack_core._client.__path__, "dstack_core._client."):
            importlib.import_module(module.name)
        from dstack.api import Client, DstackError
        try:
            import httpx, yaml
        except ImportError:
            pass
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            Client.from_config().runs.list()
        except DstackError as error:
            print(type(error).__name__, error)
    """
    done = home.run(textwrap.dedent(program))
    said = done.stdout.decode()
    assert said.startswith("ConfigurationError"), said + done.stderr.decode()
    assert str(home.path) in said
    assert "DSTACK_HOME" in said
    assert list(home.path.iterdir()) == []


def test_a_home_whose_path_is_too_long_for_a_socket_does_everything(home: Home) -> None:
    """Submit, attach, a page through the forwarded port, logs, stop: by a program of its own."""
    home.path = home.path.parent / LONG[:180] / "home"
    home.env["DSTACK_HOME"] = str(home.path)
    home.path.parent.mkdir()
    program = """
        import socket, sys, urllib.request
        from dstack.api import Client, Task

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve = f"{sys.executable} -u -m http.server --bind 127.0.0.1 {port}"
        client = Client.from_config()
        run = client.runs.submit(configuration=Task(commands=["echo up", serve], ports=[f"*:{port}"], stop_duration=1))
        assert run.attach()
        logs = iter(run.logs())
        seen = b""
        while b"Serving HTTP" not in seen:
            seen += next(logs)
        with urllib.request.urlopen(f"http://127.0.0.1:{run.ports[port]}/") as page:
            assert page.status == 200
        run.detach()
        run.stop(abort=True)
        seen += b"".join(logs)
        assert seen.startswith(b"up\\n"), seen
        print("all of it")
    """
    try:
        done = home.run(textwrap.dedent(program))
        assert done.stdout == b"all of it\n", done.stderr.decode()
    finally:
        top, home.path = home.path.parent.parent, home.path
        home.close()
        subprocess.run(["rm", "-rf", top], check=True)


def test_nothing_in_the_home_is_open_to_others_and_no_secret_is_about(client: Client, home: Home) -> None:
    """A secret of a job is in its environment, and in the database that only its owner can read; nowhere else."""
    task = Task(commands=["echo up; while [ ! -e $GO ]; do sleep 0.05; done; exit 3"], env={"KEY": SECRET})
    task.env["GO"] = str(home.path / "go")
    run = client.runs.submit(configuration=task)
    assert next(iter(run.logs())) == b"up\n"
    (home.path / "go").touch(mode=0o600)
    check_privacy(home)
    assert ended(run).status is RunStatus.FAILED
    check_privacy(home)
    account = b"".join(run.logs(diagnose=True)).decode()
    assert SECRET not in account + str(run.message) + repr(run) + home.log()


def check_privacy(home: Home) -> None:
    """Looks at every file in the home, and at every command line of this computer."""
    for path in (home.path, *home.path.rglob("*")):
        try:
            mode = path.lstat().st_mode & 0o777
            holds = path.is_file() and SECRET.encode() in path.read_bytes()
        except OSError:
            # Gone meanwhile, as an instance whose job has ended, or a socket.
            continue
        # What the job itself makes, it makes as it likes: nobody else gets to its folder.
        assert path.is_symlink() or "job" in path.parent.parts or mode & 0o077 == 0, f"{path} has mode {mode:o}"
        assert not holds or path.name.startswith("server.db"), f"{path} holds a secret"
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert SECRET.encode() not in line.read_bytes()
        except OSError:
            continue


# ------------------------------------------------------------------------------------------- answers that do not come


class Proxy:
    """Passes connections on to a server, and drops the answer to the first submit, once the server has given it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.submits: list[bool] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            answers = threading.Thread(target=self._answer, args=(near, far), daemon=True)
            near.settimeout(60)
            self._pending = False
            answers.start()
            while data := _received(near):
                if b"/runs/submit " in data:
                    self.submits.append(not self.submits)
                    self._pending = self.submits[-1]
                far.sendall(data)
            _shut(far)
            answers.join(60)

    def _answer(self, near: socket.socket, far: socket.socket) -> None:
        while data := _received(far):
            if self._pending:
                self._pending = False
                _shut(near)
                return
            near.sendall(data)

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except OSError:
        return b""


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


@pytest.fixture
def shared(home: Home) -> Iterator[int]:
    """`dstack server` on a port of its own; yields the port."""
    home.env["DSTACK_SERVER_TOKEN"] = SECRET
    command = [sys.executable, "-P", "-m", "dstack_core._server", "--port", "0"]
    process = subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+:(\d+)", process.stdout.readline())
        assert found
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate()


def test_a_submit_whose_answer_got_lost_is_repeated_and_runs_once(shared: int, home: Home) -> None:
    """The server took it, the connection broke before the answer: the client asks again, and it is the same run."""
    proxy = Proxy(shared)
    try:
        client = Client.from_config(project_name="main", server_url=f"http://127.0.0.1:{proxy.port}", user_token=SECRET)
        mark = home.path / "mark"
        run = client.runs.submit(configuration=Task(commands=[f"echo ran >> {mark}"]))
        assert proxy.submits == [True, False]
        assert ended(run).status is RunStatus.DONE
        assert mark.read_text() == "ran\n"
        assert [one.id for one in client.runs.list(all=True)] == [run.id]
    finally:
        proxy.close()


def test_a_submit_that_cannot_be_repeated_says_what_is_known(client: Client, home: Home) -> None:
    """Server killed with the request in its hands, and no new one can start: the client does not pretend to know."""
    client.runs.list()
    pid = home.kill_server(signal.SIGSTOP)
    raised: list[BaseException] = []

    def submit() -> None:
        try:
            client.runs.submit(configuration=Task(commands=["true"]), run_name="in-doubt")
        except Exception as error:  # noqa: BLE001  # looked at below
            raised.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_until(unread, what="the request to reach the server")
    configure(home, "  - type: [")
    os.kill(pid, signal.SIGKILL)
    thread.join(120)
    (error,) = raised
    said = "\n".join((str(error), *getattr(error, "__notes__", ())))
    assert "server/config.yml, line 5" in said
    assert "It is not known whether the run 'in-doubt' was submitted" in said
    configure(home, "  - type: local")
    assert len(client.runs.list(all=True)) <= 1


def unread() -> bool:
    """Whether something that this process sent to a unix socket has not been read yet."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                waiting = fcntl.ioctl(int(entry.name), termios.TIOCOUTQ, bytes(4))
                if int.from_bytes(waiting, sys.byteorder) > 0:
                    return True
    return False


# ---------------------------------------------------------------------------------------------------- no room on disk


def read_with_warnings(run: Run) -> tuple[bytes, list[str]]:
    """All output of a run, and what was warned of meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LogsDroppedWarning)
        data = b"".join(run.logs())
    return data, [str(one.message) for one in caught if one.category is LogsDroppedWarning]


@pytest.mark.root
def test_a_full_disk_of_the_server_does_not_disturb_the_job(
    home: Home, connect: Callable[[], Client], request: pytest.FixtureRequest
) -> None:
    """The job ends well; reader, run and account say how much of the output is missing, and why."""
    mount(home.path / "server" / "logs", request)
    run = connect().runs.submit(configuration=Task(commands=["seq -w 400000", f"touch {home.path}/finished"]))
    data, warned = read_with_warnings(run)
    assert (home.path / "finished").exists()
    whole = b"".join(b"%06d\n" % n for n in range(1, 400_001))
    assert whole.startswith(data)
    assert 0 < len(data) < 1 << 20
    assert warned == [f"{len(whole) - len(data)} bytes of the output, from byte {len(data)} on, could not be kept."]
    assert ended(run).status is RunStatus.DONE
    assert f"the last {len(whole) - len(data)} bytes of output could not be kept" in (run.message or "")
    assert "Free some space there" in (run.message or "")


@pytest.mark.root
def test_output_waits_for_room_while_the_job_runs(
    home: Home, connect: Callable[[], Client], request: pytest.FixtureRequest
) -> None:
    """Room that is made in time saves all of the output."""
    logs = home.path / "server" / "logs"
    mount(logs, request)
    hog = logs / "hog"
    hog.write_bytes(b"x" * 1_000_000)
    script = "seq -w 50000; while [ ! -e $GO ]; do sleep 0.05; done; echo end"
    run = connect().runs.submit(configuration=Task(commands=[script], env={"GO": str(home.path / "go")}))
    wait_until(lambda: "No room for the log" in home.log(), timeout=60, what="the disk to be full")
    hog.unlink()
    wait_until(lambda: stored(logs) == 300_000, timeout=60, what="the output to be stored")
    (home.path / "go").touch()
    data, warned = read_with_warnings(run)
    assert data == b"".join(b"%05d\n" % n for n in range(1, 50_001)) + b"end\n"
    assert warned == []
    assert (ended(run).status, run.message) == (RunStatus.DONE, None)


def stored(logs: Path) -> int:
    """How many bytes of output are stored."""
    return sum(path.stat().st_size for path in logs.glob("*.log"))


@pytest.mark.root
def test_a_full_disk_of_the_instance_does_not_disturb_the_job(
    home: Home, connect: Callable[[], Client], request: pytest.FixtureRequest
) -> None:
    """The server is away and the agent has no room: the job ends well all the same, and the loss is told."""
    mount(home.path / "local", request)
    client = connect()
    script = "while [ ! -e $GO ]; do sleep 0.05; done; seq -w 400000; touch $END"
    env = {"GO": str(home.path / "go"), "END": str(home.path / "finished")}
    run = client.runs.submit(configuration=Task(commands=[script], env=env))
    wait_until(lambda: refreshed(run) is RunStatus.RUNNING, timeout=60, what="the job to run")
    pid = home.kill_server(signal.SIGSTOP)
    (home.path / "go").touch()
    wait_until((home.path / "finished").exists, timeout=60, what="the end of the job")
    os.kill(pid, signal.SIGCONT)
    data, warned = read_with_warnings(run)
    assert ended(run).status is RunStatus.DONE
    lost = 2_800_000 - len(data)
    assert lost > 1_000_000
    assert sum(int(text.split()[0]) for text in warned) == lost
    assert f"{lost} bytes of output were dropped where it ran" in (run.message or "")


def refreshed(run: Run) -> RunStatus:
    """The run's status now."""
    run.refresh()
    return run.status
