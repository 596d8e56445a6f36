"""The one job of this agent: what it is doing, and why it ended."""

from __future__ import annotations

import os
import sys
import time

from . import tree
from .activity import Idle
from .code import lay_out
from .lean import iso, quiet, signal
from .machine import OnMachine
from .process import Terminal
from .server import Waiters
from .spec import Failed, Spec
from .spool import Spool
from .steps import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from .loop import Loop, Timer
    from .steps import Codes, Flags, Looks, Steps

    class Runner(Protocol):
        """How a job is run: as a process tree of this machine, or as a container."""

        pid: int
        ports: dict[int, int]
        oom: bool

        def start(self, terminal: Terminal) -> Steps:
            """Prepares, starts, and sets `pid` to the process whose end is the job's end."""

        def begun(self) -> Flags:
            """Waits until it runs; false if it has ended already or never will."""

        def signal(self, number: int) -> bool:
            """To all that a polite stop is for; whether anyone is there who may still be finishing."""

        def kill(self) -> None:
            """Nothing of it may go on."""

        def finish(self, code: int) -> Codes:
            """After its end, or instead of its start: cleans up and says the true exit code."""

        def processes(self) -> list[tree.Process]:
            """All that belong to it."""

        def look(self) -> Looks:
            """When somebody was last seen at work with it, and until when nobody can have been overlooked."""


_LAST_LOOK = 0.25
"""Seconds that what the main process left behind may still write."""
_ROUND = 0.005
_PATIENCE = 15.0
"""Seconds after which we give up on what the kernel or the engine will not let go of."""
_SIGNALS = {getattr(signal, name): name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"}


class Job:
    """From preparing to exited.

    Attributes:
        changed: who waits for a change of state.
        written: who waits for output.
    """

    def __init__(self, loop: Loop, job_id: str, spec: Spec, directory: str) -> None:
        self.id, self.spec, self._loop, self._directory = job_id, spec, loop, directory
        self.spool = Spool(os.path.join(directory, "log"), spec.log_limit)
        self.changed, self.written = Waiters(loop), Waiters(loop)
        self.seq = 0
        self.status = "preparing"
        self._exit_code: int | None = None
        self._reason: str | None = None
        self._message: str | None = None
        self._started_at, self._running_at, self._finished_at = time.time(), 0.0, 0.0
        self._terminal = Terminal(loop, self._output)
        self._runner = self._choose_runner(directory)
        self._work: Work | None = None
        self._cause: str | None = None
        self._kill_at: Timer | None = None
        self._idle: Idle | None = None
        self._killing = False
        self._oom = False
        self._oom_kills = _oom_kills()
        self._cpu_before = loop.reaped_cpu

    # --------------------------------------------------------------------------------------------- for the API --

    @property
    def ended(self) -> bool:
        """Nothing of it is left but its output."""
        return self.status == "exited"

    def describe(self) -> dict[str, Any]:
        """`AgentJobState`."""
        return {
            "id": self.id,
            "seq": self.seq,
            "status": self.status,
            "exit_code": self._exit_code,
            "reason": self._reason,
            "message": self._message,
            "started_at": iso(self._started_at),
            "running_at": iso(self._running_at) if self._running_at else None,
            "finished_at": iso(self._finished_at) if self._finished_at else None,
            "log_bytes": self.spool.end,
            "log_lost_bytes": self.spool.lost,
            "ports": self._runner.ports,
            "oom": self._oom,
        }

    def usage(self) -> dict[str, Any]:
        """What it uses now, its whole tree together; without the GPUs."""
        processes = self._runner.processes()
        before = self._loop.reaped_cpu - self._cpu_before
        return {
            "at": iso(time.time()),
            "cpu_seconds": round(before + sum(process.cpu for process in processes), 3),
            "memory_mib": round(sum(process.rss for process in processes) / (1 << 20), 3),
            "processes": len(processes),
        }

    def start(self) -> None:
        """Begins. Whatever goes wrong is in the state."""
        self._work = Work(self._loop, self._start(), self._failed)

    def stop(self, grace: float, cause: str = "stopped") -> None:
        """SIGTERM now (once), SIGKILL after `grace` seconds. A later call with less grace wins."""
        if self.ended:
            return
        first, self._cause = self._cause is None, self._cause or cause
        if not self._runner.pid:
            self._give_up()
            return
        if first and grace > 0:
            self._runner.signal(signal.SIGTERM)
            self._runner.signal(signal.SIGCONT)
        self._kill_within(grace)

    def note_activity(self) -> None:
        """Somebody is at work with it."""
        if self._idle:
            self._idle.note()

    # --------------------------------------------------------------------------------------------------- start --

    def _choose_runner(self, directory: str) -> Runner:
        if self.spec.image is None:
            return OnMachine(self.spec, directory, self._loop)
        from .container import InContainer

        return InContainer(self.spec, directory, self._loop, self._pulling)

    def _start(self) -> Steps:
        if self.spec.has_code:
            yield from lay_out(self.spec, self._directory)
        yield from self._runner.start(self._terminal)
        self._loop.on_exit(self._runner.pid, self._main_ended)
        if (yield from self._runner.begun()) and self._exit_code is None and not self.ended:
            self._running()

    def _pulling(self) -> None:
        self.status = "pulling"
        self._change()

    def _running(self) -> None:
        self.status = "running"
        self._running_at = time.time()
        if self.spec.max_duration:
            self._loop.later(self.spec.max_duration, self._too_long)
        if self.spec.inactivity:
            self._idle = Idle(self._loop, self.spec.inactivity, self._runner.look, self._stops, self._unused)
        self._change()

    def _too_long(self) -> None:
        self.stop(self.spec.stop_grace, "max_duration")

    def _stops(self) -> bool:
        return self._cause is not None or self._exit_code is not None or self.ended

    def _unused(self) -> None:
        self.stop(self.spec.stop_grace, "inactive")

    def _give_up(self) -> None:
        """Stopped before it ran."""
        if self._work:
            self._work.cancel()
            self._work = None
            Work(self._loop, self._clean_up(), self._failed)

    def _clean_up(self) -> Steps:
        try:
            yield from self._runner.finish(0)
        except Failed:
            # It was being started, and that it did not get far is what was wanted.
            self._exit_code = None
        self._bury()

    # ----------------------------------------------------------------------------------------------- meanwhile --

    def _change(self) -> None:
        self.seq += 1
        self.changed.wake()

    def _output(self, data: memoryview) -> None:
        self.spool.append(data)
        self.written.wake()

    # ------------------------------------------------------------------------------------------------- the end --

    def _kill_within(self, seconds: float) -> None:
        when = time.monotonic() + seconds
        if self._kill_at is not None:
            if self._kill_at.when <= when:
                return
            self._kill_at.cancel()
        self._kill_at = self._loop.later(seconds, self._kill)

    def _kill(self) -> None:
        if self._exit_code is None and not self.ended:
            self._loop.later(_PATIENCE, self._kill_main)
            self._runner.kill()
        self._killing = True

    def _kill_main(self) -> None:
        """The container engine does not react: at least its command ends."""
        if self._exit_code is None and not self.ended:
            with quiet:
                os.kill(self._runner.pid, signal.SIGKILL)

    def _main_ended(self, code: int) -> None:
        Work(self._loop, self._conclude(code), self._failed)

    def _conclude(self, code: int) -> Steps:
        self._exit_code = code
        self._exit_code = yield from self._runner.finish(code)
        self._running_at = self._running_at or time.time()
        if self._exit_code == 128 + signal.SIGKILL and not self._killing:
            self._oom = self._runner.oom or (self.spec.image is None and _oom_kills() > self._oom_kills)
        self._wait_for_group()

    def _wait_for_group(self) -> None:
        """A stopped job has its grace to the end, also when its shell was the first to go."""
        if self._cause and not self._killing and self._runner.signal(0):
            self._loop.later(2 * _ROUND, self._wait_for_group)
            return
        look = self._loop.later(0 if self._killing else _LAST_LOOK, self._bury)

        def closed() -> None:
            look.cancel()
            self._bury()

        self._terminal.release(closed)

    def _bury(self, deadline: float = 0.0) -> None:
        """Kills what is left, round after round, then reports the end."""
        if self.ended:
            return
        deadline = deadline or time.monotonic() + _PATIENCE
        if self._kill_rest() and time.monotonic() < deadline:
            self._loop.later(_ROUND, lambda: self._bury(deadline))
            return
        self._terminal.close()
        self._end()

    def _kill_rest(self) -> bool:
        """Whether there may be more. Several times at once: processes that start others must not get ahead of us."""
        enough = time.monotonic() + _ROUND
        while True:
            left = tree.mine(self._loop, self._runner.pid)
            tree.kill(left)
            more = self._loop.reap()
            if not more or time.monotonic() > enough:
                # With a command of our own at work there is always a child.
                return more and bool(left or not self._loop.children())

    def _failed(self, error: Exception) -> None:
        if isinstance(error, Failed):
            self._reason, self._message = error.reason, str(error)
        else:
            self._reason, self._message = "agent_error", "The agent failed: %s: %s" % (type(error).__name__, error)
            sys.excepthook(type(error), error, error.__traceback__)
        self._exit_code = None
        self._bury()

    def _end(self) -> None:
        killed = self._exit_code == 128 + signal.SIGKILL
        self._reason = self._cause or self._reason or ("killed" if killed else "exited")
        self._message = self._message or self._explain()
        self._finished_at = time.time()
        self.status = "exited"
        self._change()
        self.written.wake()

    def _explain(self) -> str | None:
        if self._oom:
            return "The kernel killed the job because memory ran out. Ask for more memory, or use less."
        if self._exit_code and self._exit_code - 128 in _SIGNALS:
            return "Ended by %s." % _SIGNALS[self._exit_code - 128]
        return None


def _oom_kills() -> int:
    """How many processes this machine's kernel has killed for want of memory."""
    with quiet, open("/proc/vmstat", encoding="ascii") as counters:
        for line in counters:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
