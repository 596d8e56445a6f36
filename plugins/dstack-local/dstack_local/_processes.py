"""Starting an agent, telling whether it lives, and ending it with everything it started."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

MARKER = "DSTACK_INSTANCE"
"""Environment variable that every process of an instance inherits."""

_KEPT_NAMES = """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR LD_LIBRARY_PATH DYLD_LIBRARY_PATH
    XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME DBUS_SESSION_BUS_ADDRESS
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy
    DOCKER_HOST DOCKER_CONTEXT DOCKER_CERT_PATH DOCKER_TLS_VERIFY CONTAINER_HOST
"""
_KEPT = frozenset(_KEPT_NAMES.split())
_KEPT_BEGINNINGS = ("LC_", "PIP_", "UV_")


_children: list[tuple[str, subprocess.Popen[bytes]]] = []
_children_lock = threading.Lock()


def start(command: tuple[str, ...], directory: Path, name: str, gpus: list[str]) -> None:
    """Starts an agent that outlives this process, with an environment that has no secret of this one.

    Raises:
        OSError: the program cannot be run.
    """
    log_file = directory / "agent.log"
    log_file.touch(mode=0o600)
    with log_file.open("ab") as log, _children_lock:
        child = subprocess.Popen(
            command,
            cwd=directory,
            env=_environment(name, gpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        _children.append((name, child))


def reap() -> None:
    """Takes note of agents that ended, so that they do not stay in the process table."""
    with _children_lock:
        _children[:] = [(name, child) for name, child in _children if child.poll() is None]


def _environment(name: str, gpus: list[str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in _KEPT or key.startswith(_KEPT_BEGINNINGS)}
    # A job gets the GPUs that it asked for, and no others.
    devices = ",".join(gpus)
    return {**kept, MARKER: name, "DSTACK_GPUS": devices, "CUDA_VISIBLE_DEVICES": devices}


def was_started(directory: Path) -> bool:
    """Whether an agent ever took this directory. It does so once."""
    return (directory / "agent.started").exists()


def is_alive(directory: Path) -> bool:
    """Whether the agent or its watchdog holds the lock. Asked only after `was_started`, so as not to get in its way."""
    try:
        lock = os.open(directory / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def end(directory: Path, name: str, patience: float) -> bool:
    """Ends every process of an instance: the agent is asked, and what is left is killed. True when nothing is left."""
    deadline = time.monotonic() + patience
    if not _end_child(name):
        for pid in _agents(directory, processes_of(name)):
            _signal(pid, signal.SIGTERM)
    # The lock is looked at often, and the list of all processes only when it is free.
    if _until(lambda: not is_alive(directory) and _none_is_left(directory, name), deadline - patience / 2):
        return True
    return _until(lambda: _kill(name) and not is_alive(directory), deadline)


def _none_is_left(directory: Path, name: str) -> bool:
    """Whether no process of an instance lives.

    An agent forks while it starts, so that one look at all processes can miss parent and child. It holds the lock then.
    """
    return not processes_of(name) and not is_alive(directory)


def _end_child(name: str) -> bool:
    """Asks an agent that this process started. False if there is none; it is then looked for among all processes."""
    with _children_lock:
        own = [child for owner, child in _children if owner == name and child.poll() is None]
        for child in own:
            child.terminate()
        return bool(own)


def _kill(name: str) -> bool:
    """Kills what carries the marker, and its children, which may have shed it."""
    marked = processes_of(name)
    for pid in _with_descendants(marked):
        _signal(pid, signal.SIGKILL)
    return not marked


def processes_of(name: str) -> set[int]:
    """The living processes whose environment carries the instance's marker."""
    if Path("/proc/self/environ").exists():
        return _marked.of(name)
    entry = f"{MARKER}={name}".encode()
    listed = subprocess.run(["ps", "-axwwE", "-o", "pid=,command="], capture_output=True, check=False).stdout
    lines = (line.split() for line in listed.splitlines())
    return {int(words[0]) for words in lines if entry in words}


class _Marked:
    """Who carries which marker. One look at all processes answers everybody who asked before it began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = 0.0
        self._found: dict[bytes, set[int]] = {}

    def of(self, name: str) -> set[int]:
        """The processes of an instance, as they are now."""
        asked = time.monotonic()
        with self._lock:
            if self._began <= asked:
                self._began = time.monotonic()
                self._found = _look()
            return set(self._found.get(name.encode(), ()))


_marked = _Marked()


def _look() -> dict[bytes, set[int]]:
    found: dict[bytes, set[int]] = {}
    begin = f"{MARKER}=".encode()
    for pid in _pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", buffering=0) as environment:  # noqa: PTH123  # faster
            for entry in environment.read().split(b"\0"):
                if entry.startswith(begin):
                    found.setdefault(entry.removeprefix(begin), set()).add(pid)
    return found


def _pids() -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  # names will do
    return []


def _agents(directory: Path, marked: set[int]) -> set[int]:
    """The agent and its watchdog: the marked processes that work in the instance's directory and lead its session."""
    found = set()
    for pid in marked:
        with contextlib.suppress(OSError):
            if os.getsid(pid) == pid and os.path.realpath(f"/proc/{pid}/cwd") == os.path.realpath(directory):
                found.add(pid)
    return found or marked


def _with_descendants(roots: set[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError):
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(pid)
    found, todo = set(), list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, ())
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    pause = 0.005
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return True
