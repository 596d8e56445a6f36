"""Jobs with an image: one container, by docker or podman, whichever works."""

from __future__ import annotations

import os
import sys
import time

from . import lean, tree
from .activity import waits
from .code import job_folder, working_dir
from .lean import quiet, signal
from .ports import VARIABLE
from .process import ON_TERMINAL, spawn
from .spec import Failed, Spec
from .steps import Command, Work, which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from .loop import Loop
    from .process import Terminal
    from .steps import Codes, Flags, Looks, Steps

NOTE = "agent.container"
"""File that names engine and label of what must not outlive the agent."""

CODE = "/workflow"
"""Where a container has the code of its job."""

_PULL_LIMIT = 6 * 3600.0
_COPY_LIMIT = 6 * 3600.0
_TERMINAL = "/dev/dstack-terminal"

# The container writes to our terminal, so that its programs see one that changes no byte; where that cannot be opened
# (a user without the right to), to the pipe that the engine gave it.
_TO_TERMINAL = "if ( : >%s ) 2>/dev/null; then exec >%s 2>&1; fi\n" % (_TERMINAL, _TERMINAL)
_EXEC = _TO_TERMINAL + 'exec "$@"'
# Process 1 of a container gets no signal that it has no handler for, and a shell passes none on. The signal ends the
# first wait, with a code of its own; the second one has the program's, or 127 if the first had it already.
_SHELL = _TO_TERMINAL + (
    'trap \'trap "" TERM; told=1; kill -TERM -1\' TERM\n"$@" &\nwait $!; code=$?\n'
    'if [ "$told" ]; then wait $!; last=$?; [ $last = 127 ] || code=$last; fi\nexit $code'
)

_LET_GO = "The container engine let go of the running container. Look at the engine's own log."
_IN_OUTPUT = "it did not start; the engine's words are in the output."
_NO_SHELL = "The image %s has no /bin/sh to run the commands with. Use one that has, or set `entrypoint`."

# Variables that would mean something to the engine's own command.
_TAKEN = ("DOCKER_", "CONTAINER", "PODMAN_", "REGISTRY_", "XDG_", "LD_", "DYLD_", "SSL_", "SSH_", "GO")
_TAKEN_EXACTLY = ("PATH", "HOME", "USER", "TMPDIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


class InContainer:
    """Runs a `Spec` as a container; see `Runner`."""

    oom = False

    def __init__(self, spec: Spec, directory: str, loop: Loop, pulling: Any) -> None:
        self._spec, self._directory, self._loop, self._pulling = spec, directory, loop, pulling
        self._instance = os.path.basename(directory)
        self._name = "dstack-" + "".join(c if c.isalnum() else "-" for c in self._instance)[-50:]
        self._engine = ""
        self._created = False
        self._init = 0
        self._workdir = spec.working_dir
        self.pid = 0
        self.ports: dict[int, int] = {}

    # ------------------------------------------------------------------------------------------------- starting --

    def start(self, terminal: Terminal) -> Steps:
        """Pulls the image if it is not there, creates the container with the code in it, and starts it."""
        if self._spec.has_code and not os.path.isabs(self._workdir or ""):
            self._workdir = _inside(working_dir(self._spec, self._directory), job_folder(self._directory))
        self._engine = yield from _find_engine()
        image = yield from self._image()
        handle = os.open(os.path.join(self._directory, NOTE), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as note:
            note.write("%s\n%s" % (self._engine, self._label()))
        try:
            yield from self._create(image, terminal)
            if self._spec.has_code:
                yield from self._copy_code()
        except Failed:
            self._created = True
            yield from self._leave_nothing()
            raise
        self.pid = spawn([self._engine, "start", "--attach", self._name], os.environ, "/", terminal.slave)

    def begun(self) -> Flags:
        """Waits until the container runs, and learns its ports; false if it has ended already or never will."""
        while True:
            state = yield from self._inspect()
            if state is None or state["State"]["Status"] not in {"created", "initialized", "configured"}:
                break
        if state is None or not state["State"]["Running"]:
            return False
        self._init = int(state["State"]["Pid"])
        self.ports = _published(state)
        return True

    def _image(self) -> Generator[Command, tuple[int, str], dict[str, Any]]:
        """The image's own configuration."""
        image = str(self._spec.image)
        look = Command([self._engine, "image", "inspect", "--format", "{{json .Config}}", image])
        code, output = yield look
        if code:
            self._pulling()
            yield from self._pull(image)
            code, output = yield look
        if code:
            raise Failed("pull_failed", "The image %s cannot be used: %s" % (image, output))
        return dict(lean.from_json(output) or {})

    def _pull(self, image: str) -> Steps:
        folder = os.path.join(self._directory, "registry")
        env = dict(os.environ)
        argv = [self._engine, "pull", image]
        if self._spec.registry:
            _write_login(folder, image, self._spec.registry)
            # docker reads the folder, podman the file.
            env.update(DOCKER_CONFIG=folder, REGISTRY_AUTH_FILE=os.path.join(folder, "config.json"))
        try:
            code, output = yield Command(argv, env, _PULL_LIMIT)
        finally:
            _remove_login(folder)
        if code:
            raise Failed("pull_failed", _cannot_pull(image, output, self._spec.registry is not None))

    def _create(self, image: dict[str, Any], terminal: Terminal) -> Steps:
        """With our terminal where that can be had; without a shell around it if the image has none."""
        command = self._command(image)
        wrapped = ["/bin/sh", "-c", _EXEC if self._spec.shell is None else _SHELL, "sh", *command]
        try:
            yield from self._create_once(wrapped, image, terminal)
        except Failed as failure:
            # The engine may be on another machine, or may not be allowed to hand the device on.
            if "mount" not in str(failure):
                raise
            yield from self._create_once(wrapped, image, None)
        if (yield Command([self._engine, "cp", self._name + ":/bin/sh", "-"]))[0] == 0:
            return
        if self._spec.shell is not None:
            raise Failed("start_failed", _NO_SHELL % self._spec.image)
        yield self._remove()
        yield from self._create_once(command, image, None)

    def _copy_code(self) -> Steps:
        """Copied, not mounted: the engine may be on another machine, and what the job writes must not stay on this one.

        Whichever user the container has may write there.
        """
        # As a whole folder, so that its own mode comes along: the engine may have made one for the working directory.
        folder = self._directory + CODE
        os.rename(job_folder(self._directory), folder)
        for argv in (["chmod", "-R", "a+rwX", folder], [self._engine, "cp", folder, self._name + ":/"]):
            code, output = yield Command(argv, limit=_COPY_LIMIT)
            if code:
                raise Failed("code_failed", "The code could not be copied into the container: %s" % output)
        yield Command(["rm", "-rf", folder], limit=_COPY_LIMIT)

    def _command(self, image: dict[str, Any]) -> list[str]:
        entrypoint = self._spec.entrypoint
        if self._spec.shell is not None:
            return [*(entrypoint or ["/bin/sh"]), "-c", self._spec.shell]
        if entrypoint is not None:
            return [*entrypoint, *self._spec.argv]
        command = [*(image.get("Entrypoint") or []), *(self._spec.argv or image.get("Cmd") or [])]
        if not command:
            raise Failed("start_failed", "The image %s says no program to run. Set `commands`." % self._spec.image)
        return command

    def _create_once(self, command: list[str], image: dict[str, Any], terminal: Terminal | None) -> Steps:
        env_file = os.path.join(self._directory, "env")
        argv, env = self._options(terminal), dict(os.environ)
        argv += _pass_environment(self._variables(), env, env_file)
        if terminal is not None and (self._spec.user or image.get("User") or "root") not in {"root", "0", "0:0"}:
            os.fchmod(terminal.slave, 0o622)
        try:
            code, output = yield Command(
                [self._engine, "create", *argv, "--entrypoint", command[0], str(self._spec.image), *command[1:]], env
            )
        finally:
            with quiet:
                os.unlink(env_file)
        if code:
            raise self._failure(output)
        self._created = True

    def _variables(self) -> dict[str, str]:
        """Those of the job, and what a user may set himself."""
        ours = dict(ON_TERMINAL)
        if self._spec.service_port is not None:
            ours[VARIABLE] = str(self._spec.service_port)
        return dict(dict(ours, **self._spec.env), **self._way_in())

    def _options(self, terminal: Terminal | None) -> list[str]:
        spec = self._spec
        options = ["--name", self._name, "--label", self._label(), "--log-driver", "none"]
        for port in spec.ports:
            options += ["--publish", "127.0.0.1::%d" % port]
        if terminal is not None:
            options += ["--mount", "type=bind,src=%s,dst=%s" % (terminal.path, _TERMINAL)]
        for option, value in (("--user", spec.user), ("--workdir", self._workdir), ("--cpus", spec.cpus)):
            options += [option, str(value)] if value else []
        for option, mib in (("--shm-size", spec.shm_mib), ("--memory", spec.memory_mib)):
            options += [option, "%dm" % mib] if mib else []
        if spec.privileged:
            options.append("--privileged")
        if spec.inactivity:
            # Its probes would look like somebody at work.
            options.append("--no-healthcheck")
        return options + self._gpu_options()

    def _gpu_options(self) -> list[str]:
        gpus = self._spec.gpus
        if gpus is None or gpus == []:
            return []
        # What the instance was given is not always all that the machine has.
        granted = os.environ.get("DSTACK_GPUS", "").split(",") if gpus == "all" else [str(gpu) for gpu in gpus]
        names = [name for name in granted if name] or ["all"]
        if os.path.basename(self._engine) == "podman":
            return [word for name in names for word in ("--device", "nvidia.com/gpu=" + name)]
        return ["--gpus", "all" if names == ["all"] else '"device=%s"' % ",".join(names)]

    def _way_in(self) -> dict[str, str]:
        """Variables of the job that say how people on this machine get into it; only we know its name.

        The authority is what editors of the family of VS Code call a running container.
        """
        container = '{"containerName":"/%s"}' % self._name
        return {
            "DSTACK_CONTAINER": self._name,
            "DSTACK_CONTAINER_ENGINE": os.path.basename(self._engine),
            "DSTACK_CONTAINER_AUTHORITY": "attached-container+" + container.encode().hex(),
        }

    def _label(self) -> str:
        return "dstack.instance=" + self._instance

    # --------------------------------------------------------------------------------------------------- running --

    def signal(self, number: int) -> bool:
        """To the container's first process. Nobody of it can outlive that one."""
        if number == signal.SIGTERM:
            self._run_aside(Command([self._engine, "kill", "--signal", "TERM", self._name]))
        return False

    def kill(self) -> None:
        """The whole container, in whatever state it is."""
        self._run_aside(self._remove())

    def _run_aside(self, command: Command) -> None:
        def steps() -> Steps:
            yield command

        Work(self._loop, steps(), lambda _: None)

    def processes(self) -> list[tree.Process]:
        """Those of the container, where its engine runs on this machine."""
        return tree.with_root(self._init) if self._init else []

    def look(self) -> Looks:
        """Whether somebody has a session open in it."""
        now = time.monotonic()
        if not waits(process.pid for process in self.processes()):
            return now, now
        state = yield from self._inspect()
        return now if state and state.get("ExecIDs") else 0.0, now

    def finish(self, code: int) -> Codes:
        """Asks for the true exit code, then removes the container.

        Raises:
            Failed: it never ran.
        """
        if not self._engine:
            return code
        state = yield from self._inspect()
        yield from self._leave_nothing()
        if state is None:
            return code
        inner = state["State"]
        if inner.get("Error") or inner["Status"] in {"created", "initialized", "configured"}:
            raise self._failure(str(inner.get("Error") or _IN_OUTPUT))
        if inner["Running"]:
            raise Failed("agent_error", _LET_GO)
        self.oom = bool(inner.get("OOMKilled"))
        return int(inner["ExitCode"])

    def _remove(self) -> Command:
        return Command([self._engine, "rm", "--force", "--volumes", self._name])

    def _inspect(self) -> Generator[Command, tuple[int, str], dict[str, Any] | None]:
        code, output = yield Command([self._engine, "container", "inspect", "--format", "{{json .}}", self._name])
        if code:
            return None
        found = lean.from_json(output)
        # podman makes a list of it.
        return dict(found[0] if isinstance(found, list) else found)

    def _leave_nothing(self) -> Steps:
        yield self._remove()
        # If the engine was stopped while it created, something may still appear: the watchdog has another look.
        if self._created:
            with quiet:
                os.unlink(os.path.join(self._directory, NOTE))

    def _failure(self, output: str) -> Failed:
        message = "The container could not be started: %s" % output
        # podman's words are in the output of the job, not here.
        if "nvidia" in output.lower() or "gpu" in output.lower() or (output == _IN_OUTPUT and self._gpu_options()):
            message += " To use GPUs in containers, install the NVIDIA Container Toolkit."
        ports = "port" in output and ("allocated" in output or "in use" in output)
        return Failed("port_failed" if ports else "start_failed", message)


def _inside(place: str, folder: str) -> str:
    """Where a folder of this machine is in the container."""
    within = os.path.relpath(place, os.path.realpath(folder))
    return CODE if within == os.curdir else CODE + "/" + within


def _find_engine() -> Generator[Command, tuple[int, str], str]:
    words = []
    for name, field in (("docker", "{{.Server.Version}}"), ("podman", "{{.Client.Version}}")):
        path = which(name)
        if path:
            code, output = yield Command([path, "version", "--format", field])
            if code == 0:
                return path
            words.append("%s: %s" % (name, output))
    if words:
        raise Failed(
            "start_failed",
            "No container engine works here. %s. Start it, or give this user the right to use it." % "; ".join(words),
        )
    raise Failed(
        "start_failed",
        "The job has an image, and this machine has neither docker nor podman. Install one, or remove `image`.",
    )


def _pass_environment(wanted: dict[str, str], ours: dict[str, str], path: str) -> list[str]:
    """Options that set `wanted` in the container, with no value in a process list.

    A value goes through the environment of the engine's command, or through a file if its name means something there.
    """
    lines, options = [], []
    for name, value in wanted.items():
        if not name.upper().startswith(_TAKEN) and name.upper() not in _TAKEN_EXACTLY:
            ours[name] = value
            options += ["--env", name]
        elif "\n" in value:
            raise Failed("start_failed", "The variable %s must be one line in a container." % name)
        else:
            lines.append("%s=%s\n" % (name, value))
    if lines:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.writelines(lines)
        options += ["--env-file", path]
    return options


def _write_login(folder: str, image: str, login: dict[str, str]) -> None:
    from binascii import b2a_base64

    first = image.split("/", maxsplit=1)[0]
    hosts = [first] if "/" in image and ("." in first or ":" in first or first == "localhost") else []
    token = b2a_base64(("%s:%s" % (login.get("username") or "", login["password"])).encode(), newline=False).decode()
    auths = {host: {"auth": token} for host in hosts or ["https://index.docker.io/v1/", "docker.io"]}
    os.makedirs(folder, 0o700, exist_ok=True)
    path = os.path.join(folder, "config.json")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(lean.to_json({"auths": auths}))


def _remove_login(folder: str) -> None:
    with quiet:
        os.unlink(os.path.join(folder, "config.json"))
        os.rmdir(folder)


def _cannot_pull(image: str, output: str, with_login: bool) -> str:
    message = "The image %s could not be pulled: %s " % (image, output)
    lower = output.lower()
    if "denied" in lower or "unauthorized" in lower:
        return message + (
            "Check the registry's user name and password." if with_login else "If it is private, set `registry_auth`."
        )
    if "not found" in lower or "unknown" in lower:
        return message + "Check its name and tag."
    return message + "Check its name, and that this machine reaches the registry."


def _published(state: dict[str, Any]) -> dict[int, int]:
    ports = (state.get("NetworkSettings") or {}).get("Ports") or {}
    return {int(name.split("/")[0]): int(bound[0]["HostPort"]) for name, bound in ports.items() if bound}


def remove_leftovers(directory: str) -> None:
    """For the watchdog: removes what the note names. An engine that is busy creating it may need another look."""
    try:
        with open(os.path.join(directory, NOTE), encoding="utf-8") as note:
            engine, label = note.read().split("\n")
    except (OSError, ValueError):
        return
    import time

    misses = 0
    while misses < 2:
        found = _output([engine, "ps", "--all", "--quiet", "--filter", "label=" + label]).split()
        if found:
            _output([engine, "rm", "--force", "--volumes", *found])
        misses = 0 if found else misses + 1
        time.sleep(0.2)


def _output(argv: list[str]) -> str:
    reader, writer = os.pipe()
    try:
        pid = spawn(argv, os.environ, "/", writer)
    except OSError as error:
        sys.stderr.write("%s\n" % error)
        return ""
    finally:
        os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as output:
        text = output.read()
    os.waitpid(pid, 0)
    return text
