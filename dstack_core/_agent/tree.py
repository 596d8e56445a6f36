"""Process trees: who belongs to one, what it uses, and how none of it is left."""

from __future__ import annotations

import os
import time

from .lean import prctl, quiet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .loop import Loop

_PR_SET_CHILD_SUBREAPER = 36
_SIGKILL = 9
_BREATH = 0.0005


class Process:
    """One line of the process table."""

    __slots__ = ("cpu", "dead", "parent", "pid", "rss")

    def __init__(self, pid: int, parent: int, dead: bool, cpu: float, rss: int) -> None:
        self.pid, self.parent, self.dead, self.cpu, self.rss = pid, parent, dead, cpu, rss


def adopt_orphans() -> None:
    """From now on, descendants whose parent dies become our children: a daemon cannot leave the tree."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int, spare: Iterable[int] = ()) -> list[Process]:
    """All live processes below `root`, without the trees that begin at `spare`.

    Not of one moment: a process that is started meanwhile may be missing.
    """
    below = _children if os.path.exists("/proc/self/task/%d/children" % os.getpid()) else _children_in_table()
    found, queue, seen = [], [root], set(spare)
    while queue:
        for process in below(queue.pop()):
            if process.pid not in seen:
                seen.add(process.pid)
                queue.append(process.pid)
                if not process.dead:
                    found.append(process)
    return found


def with_root(root: int) -> list[Process]:
    """The process `root` and all below it."""
    return [process for process in _table() if process.pid == root and not process.dead] + descendants(root)


def mine(loop: Loop, job: int) -> list[Process]:
    """All live processes below us, except commands of our own that are still at work."""
    return descendants(os.getpid(), [pid for pid in loop.children() if pid != job])


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to each; one that is gone already is fine."""
    for process in processes:
        with quiet:
            os.kill(process.pid, _SIGKILL)


def kill_all_below_me(patience: float = 10.0) -> None:
    """Kills and reaps until nothing is left, or only what the kernel will not let go of."""
    deadline = time.monotonic() + patience
    try:
        while time.monotonic() < deadline:
            kill(descendants(os.getpid()))
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(_BREATH)
    except ChildProcessError:
        # Orphans fall to us, so there is none either.
        return


def _children(parent: int) -> list[Process]:
    """As the kernel lists them for each thread: quick, however many processes the machine has."""
    names: list[str] = []
    with quiet:
        for thread in os.listdir("/proc/%d/task" % parent):
            with quiet, open("/proc/%d/task/%s/children" % (parent, thread), encoding="ascii") as children:
                names += children.read().split()
    return [process for name in names for process in _from_proc(name)]


def _children_in_table() -> Callable[[int], list[Process]]:
    """Where the kernel does not list them."""
    below: dict[int, list[Process]] = {}
    for process in _table():
        below.setdefault(process.parent, []).append(process)
    return lambda parent: below.get(parent, [])


def _table() -> list[Process]:
    if os.path.exists("/proc/self/stat"):
        return [process for name in os.listdir("/proc") if name.isdigit() for process in _from_proc(name)]
    return _from_ps()


_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _from_proc(name: str) -> list[Process]:
    try:
        fd = os.open("/proc/" + name + "/stat", os.O_RDONLY)
    except OSError:
        return []
    try:
        # The second field is the program's name, which may hold anything, spaces and brackets included.
        fields = os.read(fd, 4096).rpartition(b")")[2].split()
    except OSError:
        return []
    finally:
        os.close(fd)
    cpu = sum(map(int, fields[11:15])) / _TICK
    return [Process(int(name), int(fields[1]), fields[0] in b"ZX", cpu, int(fields[21]) * _PAGE)]


def _from_ps() -> list[Process]:
    """For systems without /proc."""
    with os.popen("ps -axo pid=,ppid=,stat=,time=,rss=") as listing:  # noqa: S605 - a fixed command
        lines = [line.split() for line in listing]
    return [
        Process(int(pid), int(parent), stat[0] == "Z", _seconds(spent), int(rss) * 1024)
        for pid, parent, stat, spent, rss in lines
    ]


def _seconds(spent: str) -> float:
    """`1-02:03:04`, `02:03:04` or `3:04.05` in seconds."""
    days, _, clock = spent.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total + 86400 * int(days or 0)
