"""Finds a container engine, or starts one.

The engine is the one that `DOCKER_HOST` names or that listens at Docker's usual place, if it answers. Else root starts
`dockerd` (Debian: `docker.io`), once for all processes that use it: each holds a shared lock on the program file, and a
supervisor that waits for the exclusive lock ends the daemon and removes its files when the last one is gone, however it
went. Needs Linux.

The daemon that is started here has a GPU hook that does nothing, so that `--gpus` is accepted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dstack_core.testing._wait import wait_until
from dstack_core.testing.fleet._docker import Engine, EngineError

__all__ = ["Daemon", "FleetUnavailable", "find_or_start"]

_USUAL = "unix:///var/run/docker.sock"
_STARTS_WITHIN = 90

# Waits until no process holds the lock any more, and holds it itself while it clears up.
_SUPERVISE = """
trap "" HUP INT TERM
had_bridge=$(test -e /sys/class/net/docker0 && echo yes)
"$@" </dev/null >"$DIRECTORY/log" 2>&1 & daemon=$!
exec 9<"$LOCK"
flock -x 9
kill $daemon 2>/dev/null; wait $daemon
test "$had_bridge" || ip link delete docker0 2>/dev/null
grep -o " $DIRECTORY/[^ ]*" /proc/mounts | sort -r | xargs -r umount -l 2>/dev/null
rm -rf "$DIRECTORY"
"""


class FleetUnavailable(Exception):
    """There is no way to have machines here. The message says what is missing, and how to get it."""


class Daemon(NamedTuple):
    """A container engine that answers.

    Attributes:
        host: its address, as in `DOCKER_HOST`.
        holder: a file that keeps it alive while it is open, in any process; `None` if it does not depend on that.
    """

    host: str
    holder: int | None

    @property
    def engine(self) -> Engine:
        """The way to it."""
        return Engine(self.host.removeprefix("unix://"))


def find_or_start() -> Daemon:
    """The engine of this computer.

    Raises:
        FleetUnavailable: there is none.
    """
    if sys.platform != "linux":
        raise FleetUnavailable("machines are containers with loopback addresses of their own, which takes Linux")
    wanted = os.environ.get("DOCKER_HOST") or _USUAL
    if not wanted.startswith("unix://"):
        raise FleetUnavailable(f"DOCKER_HOST is {wanted}; only an engine on this computer will do (unix:///path)")
    if answers(wanted):
        return Daemon(wanted, None)
    program = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise FleetUnavailable(f"no container engine answers at {wanted}; install one (Debian: docker.io)")
    if os.geteuid() != 0:
        raise FleetUnavailable(f"no container engine answers at {wanted}, and only root can start one")
    return _start(Path(program))


def answers(host: str) -> bool:
    """Whether an engine answers there."""
    try:
        return bool(Engine(host.removeprefix("unix://")).version())
    except EngineError:
        return False


def _start(program: Path) -> Daemon:
    # The same for every process, whatever its `TMPDIR`.
    directory = Path(f"/tmp/dstack-docker-{os.getuid()}")  # noqa: S108  # of root's, and made anew by `_launch`
    host = f"unix://{directory}/docker.sock"
    # Waits while a supervisor clears up; after that, none will as long as we hold this.
    holder = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(holder, fcntl.LOCK_SH)
    try:
        with _turn():
            if not answers(host):
                _launch(program, directory, host)
                wait_until(lambda: answers(host), timeout=_STARTS_WITHIN, what="dockerd to answer")
    except TimeoutError:
        os.close(holder)
        raise FleetUnavailable(f"dockerd does not start here: {(directory / 'log').read_text()[-800:]}") from None
    return Daemon(host, holder)


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """One process at a time, of all checkouts and installations."""
    with Path("/run/dstack-docker.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _launch(program: Path, directory: Path, host: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    hooks = directory / "bin"
    hooks.mkdir(mode=0o700, parents=True)
    hook = hooks / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    # Docker's own default is more than may be had without the right to raise limits.
    argv = [str(program), "-H", host, "--default-ulimit", "nofile=1024:1024"]
    for option, name in (("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid")):
        argv += [option, str(directory / name)]
    path = f"{hooks}:{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run(
        ["setsid", "--fork", "/bin/sh", "-c", _SUPERVISE, "supervise", *argv],
        env={**os.environ, "DIRECTORY": str(directory), "LOCK": str(program), "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
