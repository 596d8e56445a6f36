"""Jobs without an image: a process tree on this machine, in a fresh folder, with a fresh Python if asked for."""

from __future__ import annotations

import os
import sys
import time

from . import tree
from .activity import Changes, somebody_in, waits
from .code import working_dir
from .process import ON_TERMINAL, spawn
from .spec import Failed, Spec
from .steps import Command, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from .loop import Loop
    from .process import Terminal
    from .steps import Codes, Flags, Looks, Steps

FOLDER = "agent.folder"
"""File that names the folder the job runs in: where people who log in to the machine land."""

_VENV_LIMIT = 900.0


class OnMachine:
    """Runs a `Spec` as a process; see `Runner`."""

    oom = False

    def __init__(self, spec: Spec, directory: str, loop: Loop) -> None:
        self._spec, self._directory, self._loop = spec, directory, loop
        self._changes = Changes(os.path.join(directory, "job"))
        self.pid = 0
        self.ports = {port: port for port in spec.ports}

    def start(self, terminal: Terminal) -> Steps:
        """Prepares the environment, then starts the process."""
        env = dict(os.environ, **ON_TERMINAL)
        env.update(self._spec.env)
        if self._spec.python:
            venv = os.path.join(self._directory, "venv")
            yield from _make_venv(self._spec.python, venv)
            env["VIRTUAL_ENV"] = venv
            env["PATH"] = os.path.join(venv, "bin") + os.pathsep + env.get("PATH", os.defpath)
        if self._spec.service_port is not None:
            yield from self._listen(env, self._spec.service_port)
        place = working_dir(self._spec, self._directory)
        handle = os.open(os.path.join(self._directory, FOLDER), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8", errors="surrogateescape") as note:
            note.write(place)
        try:
            self.pid = spawn(self._argv(), env, place, terminal.slave, give_way=True)
        except OSError as error:
            raise Failed("start_failed", _cannot_run(error)) from None

    def _listen(self, env: dict[str, str], port: int) -> Steps:
        """Tells the service where to listen."""
        from .ports import VARIABLE, port_of

        self.ports[port] = yield from port_of(self._spec)
        if VARIABLE not in self._spec.env:
            env[VARIABLE] = str(self.ports[port])

    def signal(self, number: int) -> bool:
        """To the main process's group; whether anyone was there to get it."""
        try:
            os.killpg(self.pid, number)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """The whole tree, daemons included."""
        tree.kill(self.processes())

    def begun(self) -> Flags:
        """It runs as soon as it is started."""
        yield from ()
        return True

    def finish(self, code: int) -> Codes:
        """The exit code is what it is."""
        yield from ()
        return code

    def processes(self) -> list[tree.Process]:
        """All of the tree, daemons included."""
        return tree.mine(self._loop, self.pid)

    def look(self) -> Looks:
        """At who is in its folder, and at what changes there."""
        yield from ()
        own = {process.pid for process in self.processes()}
        wanted = self._spec.working_dir or ""
        folders = [os.path.join(self._directory, "job"), *([wanted] if os.path.isabs(wanted) else [])]
        if not waits(own) or somebody_in(folders, own):
            return time.monotonic(), 0.0
        return self._changes.look()

    def _argv(self) -> list[str]:
        if self._spec.shell is None:
            return self._spec.argv
        return ["/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh", "-c", self._spec.shell]


def _cannot_run(error: OSError) -> str:
    name = str(error.filename)
    if os.path.isabs(name) and not os.path.exists(name):
        return "%s does not exist on this machine. Correct the command or working_dir." % name
    return "%s cannot be run (%s). Check the command's first word and the PATH." % (name, error.strerror)


def _make_venv(version: str, path: str) -> Steps:
    """With uv if it is there, which is fast; else with the module `venv` of an interpreter of that version."""
    interpreter = yield from _find_python(version)
    words = []
    for argv in _ways(interpreter, version, path):
        code, output = yield Command(argv, limit=_VENV_LIMIT)
        if code == 0:
            return
        words.append("%s: %s" % (os.path.basename(argv[0]), output))
    raise Failed("start_failed", (yield from _no_python(version, words)))


def _ways(interpreter: str | None, version: str, path: str) -> list[list[str]]:
    uv = which("uv")
    ways = []
    if uv:
        ways.append([uv, "venv", "--seed", "--no-project", "--clear", "--python", interpreter or version, path])
    if interpreter:
        ways.append([interpreter, "-m", "venv", "--clear", path])
    return ways


def _find_python(version: str) -> Generator[Command, tuple[int, str], str | None]:
    """An interpreter that works. What is on the PATH may be a version manager's stand-in that refuses to start."""
    for candidate in _candidates(version):
        code, output = yield Command([candidate, "-I", "-S", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        if code == 0 and output == version:
            return candidate
    return None


def _candidates(version: str) -> list[str]:
    found = [which("python" + version), os.path.realpath(sys.executable)]
    managed = os.path.expanduser("~/.pyenv/versions")
    if os.path.isdir(managed):
        names = [name for name in sorted(os.listdir(managed)) if name.startswith(version + ".")]
        found += [os.path.join(managed, name, "bin", "python" + version) for name in reversed(names)]
    return [path for path in found if path and os.path.exists(path)]


def _no_python(version: str, words: list[str]) -> Generator[Command, tuple[int, str], str]:
    there = ""
    for known in ["3.%d" % minor for minor in range(7, 20)]:
        if (yield from _find_python(known)) is not None:
            there += " " + known
    message = "No fresh environment of Python %s could be made on this machine." % version
    if words:
        message += " " + "; ".join(words) + "."
    message += " Installed here:%s. Ask for one of these" % (there or " none")
    return message + ", or install that version; uv fetches any by itself (https://docs.astral.sh/uv)."
