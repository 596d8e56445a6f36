"""Start: `agent serve [SECONDS [INSTANCE]]`, run in the instance's own directory. It starts `agent unpack` itself."""

from __future__ import annotations

import fcntl
import os
import sys

from . import tree
from .lean import quiet, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

EXIT_TAKEN = 75
EXIT_STARTED_BEFORE = 76
EXIT_USAGE = 64
FIRST_LEASE = 600.0
_POLITE = (signal.SIGTERM, signal.SIGINT)


def main() -> NoReturn:
    """Becomes the watchdog, with the agent as its child; or unpacks an archive."""
    if sys.argv[1:2] == ["unpack"] and len(sys.argv) == 5:
        from .unpack import run

        sys.exit(run(sys.argv[2:]))
    if sys.argv[1:2] != ["serve"] or not _seconds(sys.argv[2:]):
        sys.stderr.write(
            "usage: agent serve [SECONDS of the first lease [ID of the instance]] (in the directory of the instance)\n"
        )
        sys.exit(EXIT_USAGE)
    _claim()
    _detach()
    watchdog = os.getpid()
    # Each of the two lets them through once it knows what to do.
    signal.pthread_sigmask(signal.SIG_BLOCK, _POLITE)
    child = os.fork()
    if child == 0:
        _serve(watchdog)
        os._exit(0)
    _watch(child)
    os._exit(0)


def _seconds(given: list[str]) -> float:
    """The first lease: whoever starts an agent and dies is not to leave a machine behind. 0 if it cannot be read."""
    try:
        return max(0.0, float(given[0])) * (len(given) <= 2) if given else FIRST_LEASE
    except ValueError:
        return 0.0


def _claim() -> None:
    """Takes the lock for as long as this process or its child lives, and leaves the mark that it was here."""
    lock = os.open("agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.stderr.write("an agent is already running in this directory\n")
        sys.exit(EXIT_TAKEN)
    try:
        os.close(os.open("agent.started", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        sys.stderr.write("an agent has already run in this directory; an instance starts only once\n")
        sys.exit(EXIT_STARTED_BEFORE)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2 and int(name) != lock:
            with quiet:
                os.close(int(name))


def _detach() -> None:
    """Own session, own log, no input: nothing of who started us is left."""
    if os.getsid(0) != os.getpid():
        _leave_session()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log = os.open("agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in enumerate((null, log, log)):
        os.dup2(source, number)
    os.close(log)
    os.close(null)


def _leave_session() -> None:
    """Whoever has a session already, as a service of systemd, is not to disappear from its sight."""
    try:
        os.setsid()
    except OSError:
        # The leader of a process group cannot; its child can.
        if os.fork():
            os._exit(0)
        os.setsid()


def _serve(watchdog: int) -> None:
    """The agent proper."""
    from .api import Agent
    from .loop import Loop
    from .server import Server

    loop = Loop()
    instance = sys.argv[3] if len(sys.argv) > 3 else None
    agent = Agent(loop, os.getcwd(), watchdog, _seconds(sys.argv[2:]), instance)
    for number in _POLITE:
        loop.on_signal(number, agent.leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _POLITE)
    server = Server(loop, "agent.sock", agent.handle)
    tree.adopt_orphans()
    loop.run()
    server.close()


def _watch(child: int) -> None:
    """Waits for the agent's end, and sees to it that nothing outlives it."""
    for number in _POLITE:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _POLITE)
    tree.adopt_orphans()
    while os.waitpid(-1, 0)[0] != child:
        pass
    tree.kill_all_below_me()
    if os.path.exists("git"):
        from .clone import forget

        forget(os.getcwd())
    if os.path.exists("agent.container"):
        from .container import remove_leftovers

        remove_leftovers(os.getcwd())


if __name__ == "__main__":
    main()
