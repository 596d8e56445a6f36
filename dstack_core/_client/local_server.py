"""The server of this computer: found, started if it is not there, replaced if it is too old.

Exactly one server serves a home folder: it holds the lock `server/server.lock` for its whole life. `server/start.lock`
keeps clients that come at once from starting several, of which all but one would give up.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dstack_core._client.connection import (
    Connection,
    Failures,
    check_version,
    is_older,
    new_client,
    read_info,
    reason_of,
)
from dstack_core._home import ensure_home, home, socket_address
from dstack_core.errors import ConfigurationError, ServerUnavailableError

if TYPE_CHECKING:
    import httpx

    from dstack_core._models.wire import ServerInfo

START_TIMEOUT = 120.0
"""Seconds that a start may take on a very slow machine."""
STOP_TIMEOUT = 30.0
MOST_STARTS = 5
"""So many servers in a row may die under one request before it is given up."""
TAIL = 2000
"""Bytes of the server's log that a message shows."""
EX_TEMPFAIL = 75
EX_CONFIG = 78


class LocalConnection(Connection):
    """The server of a home folder, over its unix socket."""

    on_this_computer = True

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise ConfigurationError(
                "On Windows there is no local server. Run `dstack server` elsewhere, and pass server_url and "
                "user_token, or put them into config.yml."
            )
        super().__init__()
        self._home = home()
        self._lock = self._home / "server" / "start.lock"
        self._ready_in = 0
        self.label = f"The local server of {self._home}"

    def _new_client(self) -> httpx.Client:
        return new_client("http://server", uds=self._address())

    def _address(self) -> str:
        return socket_address(self._home / "server.sock")

    def prepare(self) -> None:
        """Starts the server, or replaces it, unless it was there before."""
        if self._ready_in != os.getpid():
            self._make_ready()
            self._ready_in = os.getpid()

    def recover(self, error: Exception, failures: Failures) -> None:
        """Sees to it that there is a server before the next try."""
        import httpx

        if failures.count > MOST_STARTS or isinstance(error, httpx.ReadTimeout):
            raise ServerUnavailableError(self._silent(error)) from error
        self._ready_in = 0

    def _make_ready(self) -> None:
        import httpx

        self._make_folder()
        failures = Failures()
        while True:
            try:
                self._find_or_start()
                return
            except httpx.TransportError as error:
                # It went away between two steps: it was on its way out, or was killed.
                failures.add(error, sent=False)
                if failures.count > MOST_STARTS or isinstance(error, httpx.ReadTimeout):
                    raise ServerUnavailableError(self._silent(error)) from error
                time.sleep(failures.pause())

    def _make_folder(self) -> None:
        ensure_home()
        try:
            self._lock.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock.touch(mode=0o600)
        except OSError as error:
            raise ConfigurationError(
                f"{self._lock} cannot be written ({error.strerror}). Make the home folder {self._home} writable, "
                "or set the environment variable DSTACK_HOME to a folder that is."
            ) from error

    def _find_or_start(self) -> None:
        if not self._listens():
            with self._turn() as mine:
                if mine:
                    self._start()
        if self._is_outdated(self._info()):
            with self._turn(even_if_listening=True):
                self._replace()

    def _info(self) -> ServerInfo:
        return read_info(self.http().get("/api/server/info").content, self.label)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._address())
            except OSError:
                return False
            return True

    # -- starting ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, *, even_if_listening: bool = False) -> Iterator[bool]:
        """Waits for this client's turn to start a server. False: another client's server listens by now."""
        import fcntl

        deadline = time.monotonic() + START_TIMEOUT
        with self._lock.open("a") as lock:
            while True:
                if not even_if_listening and self._listens():
                    yield False
                    return
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Whoever has the lock may be suspended. It saves work, but `server.lock` is what counts.
                    if time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                yield even_if_listening or not self._listens()
                return

    def _start(self) -> None:
        """Starts a server, and returns when it is up or when another one is."""
        output, theirs = os.pipe()
        with open(output, "rb") as pipe:  # noqa: PTH123  # a descriptor
            try:
                child = self._spawn(theirs)
            finally:
                os.close(theirs)
            try:
                # Meanwhile: takes as long as a good part of the server's start.
                self.http()
                said = _read_all(child, pipe.fileno(), START_TIMEOUT)
                if not self._listens():
                    self._explain(_exit_code(child), said)
            finally:
                _reap(child)

    def _spawn(self, output: int) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise ConfigurationError(
                "The local server cannot be started from a program that is no Python interpreter (sys.executable is "
                "empty). Start it beforehand: python -m dstack_core._server --local"
            )
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "dstack_core._server", "--local"],
                cwd=self._home,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerUnavailableError(f"The local server cannot be started: {error}") from error

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "DSTACK_HOME": str(self._home)}
        if "PYTHONPATH" in environment:
            # The server runs in another folder, where relative entries would lead elsewhere.
            paths = (os.path.abspath(path) for path in environment["PYTHONPATH"].split(os.pathsep))  # noqa: PTH100  # text
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment

    def _explain(self, code: int | None, said: str) -> None:
        """Raises what the end of a server that had just been started means."""
        said = said.removeprefix("dstack server: ").strip()
        if code == EX_CONFIG:
            raise ConfigurationError(said)
        # Another server was faster, or this one was asked to stop.
        if code in (0, EX_TEMPFAIL):
            return
        how = "did not come up in time" if code is None else f"ended while it started ({_how_it_ended(code)})"
        raise ServerUnavailableError(f"The local server {how}.\n{said}\n{self._log()}".replace("\n\n", "\n"))

    # -- replacing ---------------------------------------------------------------------------------------------------

    def _is_outdated(self, info: ServerInfo) -> bool:
        from dstack_core._models.wire import API_VERSION

        if info.api < API_VERSION or (info.api == API_VERSION and is_older(info.version)):
            return info.local
        check_version(info)
        return False

    def _replace(self) -> None:
        """Asks an old server to end, and starts one of this version. Runs go on meanwhile."""
        if not self._is_outdated(self._info()):
            return
        self.http().post("/api/server/shutdown")
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._listens():
            if time.monotonic() > deadline:
                raise ServerUnavailableError(
                    f"{self.label} is of an older version and does not end. {self._kill()} Runs go on meanwhile."
                )
            time.sleep(0.02)
        self.close()
        self._start()
        check_version(self._info())

    # -- messages ----------------------------------------------------------------------------------------------------

    def _silent(self, error: Exception) -> str:
        return f"{self.label} does not answer: {reason_of(error)}. {self._kill()}\n{self._log()}"

    def _kill(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._home / "server" / "server.lock").read_text())
            return f"End it (kill -KILL {pid}); the next client starts it again."
        return "Try again."

    def _log(self) -> str:
        path = self._home / "server" / "server.log"
        try:
            with path.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - TAIL))
                tail = log.read().decode(errors="replace").strip()
        except OSError:
            return f"There is no log at {path}. To see more, start it yourself: dstack server"
        return f"The end of its log, {path}:\n{tail}\nTo see more, start it yourself: dstack server"


def _read_all(child: subprocess.Popen[bytes], output: int, timeout: float) -> str:
    """What the child said until it closed its output: it does when it is up, and when it dies."""
    import select

    deadline = time.monotonic() + timeout
    said = b""
    while time.monotonic() < deadline:
        # A grandchild may hold the pipe open after the child's death.
        ended = child.poll() is not None
        if select.select([output], [], [], 0 if ended else 0.25)[0]:
            piece = os.read(output, 65536)
            said += piece
            if not piece:
                break
        elif ended:
            break
    return said.decode(errors="replace")


def _exit_code(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(10)
    except subprocess.TimeoutExpired:
        return None


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Lets go of the child, which must not stay behind as a zombie when it ends before this program."""
    import threading

    if child.poll() is None:
        threading.Thread(target=child.wait, name="dstack-server-reaper", daemon=True).start()
