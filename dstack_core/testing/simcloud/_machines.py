"""What runs on a simulated instance: an agent, and its job. All of it is a function of time; nothing runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from dstack_core.testing.simcloud._clock import SimClock

JobStatus = Literal["preparing", "running", "exited"]

_LINE = 33
"""Bytes of a line of output."""


class SimRefused(Exception):
    """The agent will not do this.

    Args:
        status: the HTTP status that a real agent answers with.
        message: its words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Script:
    """What a job does.

    Attributes:
        seconds: how long it runs, unless it is stopped.
        exit_code: how it ends then.
        lines: how many lines it prints in that time, evenly.
        prepares: seconds before it runs.
        lingers: seconds that it takes to end when it is asked to stop.
    """

    seconds: float = 60.0
    exit_code: int = 0
    lines: int = 10
    prepares: float = 0.5
    lingers: float = 0.5


@dataclass(frozen=True, slots=True)
class SimJobState:
    """Where a job stands, in the terms of the agent's protocol. Times are seconds on the cloud's clock.

    Attributes:
        seq: grows with each change.
        status: whether its main process runs.
        exit_code: of its main process; `None` while it runs, and if it never did.
        reason: why it ended: `exited`, `stopped` or `max_duration`.
        started_at: when the agent was given it.
        running_at: when its main process started.
        finished_at: when it ended.
        log_bytes: how much it has printed.
    """

    seq: int
    status: JobStatus
    exit_code: int | None
    reason: str | None
    started_at: float
    running_at: float | None
    finished_at: float | None
    log_bytes: int


@dataclass(slots=True)
class SimJob:
    """A job that an agent was given.

    Attributes:
        id: its name.
        spec: what the agent was asked for, whatever it is.
        script: what it does.
        given_at: when the agent was given it, in seconds on the cloud's clock.
        max_duration: seconds after which the agent ends it; `None`: never.
        ends_at: when it ends, unless it is stopped before.
        reason: why it ends then.
    """

    id: str
    spec: Any
    script: Script
    given_at: float
    max_duration: float | None = None
    ends_at: float = field(init=False)
    reason: str = "exited"

    def __post_init__(self) -> None:
        self.ends_at = self.runs_at + self.script.seconds
        if self.max_duration is not None and self.max_duration < self.script.seconds:
            self.ends_at, self.reason = self.runs_at + self.max_duration, "max_duration"

    @property
    def runs_at(self) -> float:
        """When its main process starts, if it is not stopped before."""
        return self.given_at + self.script.prepares

    def stop(self, at: float, grace: float) -> None:
        """Asks it to end; the earliest end wins."""
        end = at + min(grace, self.script.lingers)
        if end < self.ends_at:
            self.ends_at, self.reason = end, "stopped"

    def state(self, at: float) -> SimJobState:
        """Where it stands."""
        ran = self.ends_at > self.runs_at
        ended, begun = at >= self.ends_at, at >= self.runs_at and ran
        code = {"exited": self.script.exit_code}.get(self.reason, 143)
        return SimJobState(
            seq=3 if ended else 2 if begun else 1,
            status="exited" if ended else "running" if begun else "preparing",
            exit_code=code if ended and ran else None,
            reason=self.reason if ended else None,
            started_at=self.given_at,
            running_at=self.runs_at if begun else None,
            finished_at=self.ends_at if ended else None,
            log_bytes=self.printed(at),
        )

    def printed(self, at: float) -> int:
        """How many bytes it has printed."""
        span = min(at, self.ends_at) - self.runs_at
        if span < 0 or not self.script.lines:
            return 0
        return min(self.script.lines, int(span / self._rhythm)) * _LINE

    @property
    def _rhythm(self) -> float:
        # A little less than what is exact, so that the last line is there when it ends.
        return max(self.script.seconds, 1e-3) / (self.script.lines + 1e-6) if self.script.lines else 1.0

    def output(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end` of what it prints."""
        first, last = begin // _LINE, (end + _LINE - 1) // _LINE
        text = "".join(f"{self.id[-8:]:>8} {number:06d} ................\n" for number in range(first, last))
        return text.encode()[begin - first * _LINE : end - first * _LINE]

    def printed_at(self, offset: int) -> float:
        """When the byte at an offset was printed."""
        return self.runs_at + (offset // _LINE + 1) * self._rhythm

    def next_change(self, at: float) -> float:
        """When its state or its output changes next; infinity when it has ended."""
        if at >= self.ends_at:
            return float("inf")
        if at < self.runs_at:
            return min(self.runs_at, self.ends_at)
        if self.printed(at) >= self.script.lines * _LINE:
            return self.ends_at
        # A hair later, so that rounding does not put it before the line.
        return max(at + 1e-6, min(self.ends_at, self.printed_at(self.printed(at)) + 1e-6))


class SimMachine:
    """A machine with an agent.

    Its lease works as a dead man's switch: when nobody has renewed it, and no job has run for `grace` seconds, the
    machine powers itself off.

    Args:
        clock: the cloud's.
        instance: the intent that it was made for.
        boots_at: when the agent begins to answer.
        grace: seconds without a server after which the machine goes; `None`: it stays for ever.
        script_of: says what a job does, from its id and what the agent was asked for.

    Attributes:
        job: the job that the agent was given; it takes one.
        starts: ids of the jobs that were begun here, in that order.
        crashed_at: when the machine stopped to react, while the cloud still says that it runs.
        offline_until: when the network comes back.
        listeners: called whenever a call has changed something here.
    """

    def __init__(
        self,
        clock: SimClock,
        instance: UUID,
        boots_at: float,
        grace: float | None,
        script_of: Callable[[str, Any], Script],
    ) -> None:
        self._clock = clock
        self.instance = instance
        self._grace = grace
        self._script_of = script_of
        self.boots_at = boots_at
        self.lease_until = boots_at + grace if grace is not None else float("inf")
        self.job: SimJob | None = None
        self.starts: list[str] = []
        self.crashed_at: float | None = None
        self.offline_until = 0.0
        self.listeners: list[Callable[[], None]] = []

    def answers(self) -> bool:
        """Whether the agent can be reached, as far as this machine and its network go."""
        now = self._clock.time()
        return self.crashed_at is None and now >= self.boots_at and now >= self.offline_until

    def powers_off_at(self) -> float:
        """When the dead man's switch acts, as things stand now."""
        if self._grace is None or self.crashed_at is not None:
            return float("inf")
        idle_from = self.job.ends_at + self._grace if self.job is not None else 0.0
        return max(self.lease_until, idle_from)

    def renew(self, seconds: float) -> None:
        """A server is there."""
        if self._grace is not None:
            self.lease_until = self._clock.time() + seconds

    def put_job(self, job_id: str, spec: Any, max_duration: float | None) -> SimJob:
        """Begins a job, once.

        Raises:
            SimRefused: it has another one.
        """
        if self.job is not None and self.job.id != job_id:
            raise SimRefused(409, f"this agent already has job {self.job.id}")
        if self.job is None:
            self.job = SimJob(job_id, spec, self._script_of(job_id, spec), self._clock.time(), max_duration)
            self.starts.append(job_id)
            self.tell()
        return self.job

    def find(self, job_id: str) -> SimJob:
        """The job of that id.

        Raises:
            SimRefused: it is not here.
        """
        if self.job is None or self.job.id != job_id:
            raise SimRefused(404, f"this agent has no job {job_id}")
        return self.job

    def stop_job(self, job_id: str, grace: float) -> SimJob:
        """Asks a job to end.

        Raises:
            SimRefused: it is not here.
        """
        job = self.find(job_id)
        job.stop(self._clock.time(), grace)
        self.tell()
        return job

    def tell(self) -> None:
        """Has everybody who waits for a change look again."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener()
