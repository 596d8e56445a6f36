"""Every transition of an instance and of a job attempt: two tables and two pure functions.

No I/O, no clock, no chance. `step_*(view, observation)` answers with the next view and the actions that
belong to it; the reconciler writes both in one transaction, if its lease still holds. What the tables do not list
cannot
happen: an observation without an entry leaves the object as it is (it came too late, or twice). The diagrams in
the docs are drawn from the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from uuid import UUID

from dstack_core._models.instances import Endpoint, InstanceRef
from dstack_core._models.runs import Reason, RunStatus

# ---------------------------------------------------------------------------------------------------------------------
# Instances
# ---------------------------------------------------------------------------------------------------------------------


class InstanceStatus(str, Enum):
    """Where an intent and its instance stand.

    INTENT      written down; the cloud is about to be asked, or was told to wait
    UNKNOWN     the cloud was asked, and what came of it is not known
    STARTING    the cloud has accepted; the agent was not reached yet
    RUNNING     the agent was reached
    TERMINATING nobody needs it any more; it may still cost money
    TERMINATED  the cloud confirmed that it is gone
    FAILED      it certainly never existed
    """

    INTENT = "intent"
    UNKNOWN = "unknown"
    STARTING = "starting"
    RUNNING = "running"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """True when it costs nothing and never will."""
        return self in (InstanceStatus.TERMINATED, InstanceStatus.FAILED)


class InstanceEvent(str, Enum):
    """What can be observed about an instance."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    POSTPONED = "postponed"
    UNCLEAR = "unclear"
    NOT_SEEN = "not_seen"
    ABSENT = "absent"
    REACHED = "reached"
    SILENT = "silent"
    LEAVING = "leaving"
    GONE = "gone"
    TIMED_OUT = "timed_out"
    BROKEN = "broken"
    UNWANTED = "unwanted"
    WITHDRAWN = "withdrawn"
    STILL_THERE = "still_there"


_I, _E = InstanceStatus, InstanceEvent

INSTANCE_TRANSITIONS: dict[tuple[InstanceStatus, InstanceEvent], InstanceStatus] = {
    (_I.INTENT, _E.ACCEPTED): _I.STARTING,
    (_I.INTENT, _E.REFUSED): _I.FAILED,
    (_I.INTENT, _E.POSTPONED): _I.INTENT,
    (_I.INTENT, _E.UNCLEAR): _I.UNKNOWN,
    # Nobody wants it any more, and the cloud was never asked.
    (_I.INTENT, _E.WITHDRAWN): _I.FAILED,
    # The token was used up by an instance that has come and gone.
    (_I.INTENT, _E.GONE): _I.TERMINATED,
    (_I.UNKNOWN, _E.ACCEPTED): _I.STARTING,
    (_I.UNKNOWN, _E.UNCLEAR): _I.UNKNOWN,
    (_I.UNKNOWN, _E.POSTPONED): _I.UNKNOWN,
    (_I.UNKNOWN, _E.NOT_SEEN): _I.UNKNOWN,
    (_I.UNKNOWN, _E.GONE): _I.TERMINATED,
    # Looked for long enough: the call certainly came to nothing, so it may be made again.
    (_I.UNKNOWN, _E.ABSENT): _I.INTENT,
    (_I.UNKNOWN, _E.WITHDRAWN): _I.FAILED,
    (_I.STARTING, _E.REACHED): _I.RUNNING,
    (_I.STARTING, _E.SILENT): _I.STARTING,
    (_I.STARTING, _E.GONE): _I.TERMINATED,
    (_I.STARTING, _E.TIMED_OUT): _I.TERMINATING,
    # It has booted, and will never run a job.
    (_I.STARTING, _E.BROKEN): _I.TERMINATING,
    # On its way out, or merely stopped: it may still cost money, so the end is asked for.
    (_I.STARTING, _E.LEAVING): _I.TERMINATING,
    (_I.RUNNING, _E.LEAVING): _I.TERMINATING,
    (_I.STARTING, _E.UNWANTED): _I.TERMINATING,
    (_I.RUNNING, _E.REACHED): _I.RUNNING,
    (_I.RUNNING, _E.SILENT): _I.RUNNING,
    (_I.RUNNING, _E.GONE): _I.TERMINATED,
    (_I.RUNNING, _E.UNWANTED): _I.TERMINATING,
    (_I.TERMINATING, _E.STILL_THERE): _I.TERMINATING,
    (_I.TERMINATING, _E.GONE): _I.TERMINATED,
}


@dataclass(frozen=True, slots=True)
class InstanceView:
    """What a step needs to know of an instance; every field is a column of `instances`."""

    status: InstanceStatus
    wanted: bool = True
    ref: InstanceRef | None = None
    endpoint: Endpoint | None = None
    host_key: str | None = None
    error: str | None = None
    error_scope: str | None = None
    message: str | None = None
    misses: int = 0
    failures: int = 0
    accepted_at: datetime | None = None
    running_at: datetime | None = None
    terminating_at: datetime | None = None
    terminated_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class InstanceObservation:
    """One observation, made at `at`. Only the fields that belong to the event are set."""

    event: InstanceEvent
    at: datetime
    ref: InstanceRef | None = None
    endpoint: Endpoint | None = None
    error: str | None = None
    error_scope: str | None = None
    message: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class WakeJob:
    """The job of this instance has something to look at."""


InstanceAction = WakeJob

_FAILING = frozenset({_E.POSTPONED, _E.UNCLEAR, _E.NOT_SEEN, _E.SILENT, _E.STILL_THERE})


def step_instance(view: InstanceView, seen: InstanceObservation) -> tuple[InstanceView, tuple[InstanceAction, ...]]:
    """The next view of an instance after an observation, and whether its job has to look."""
    target = INSTANCE_TRANSITIONS.get((view.status, seen.event))
    if target is None:
        return view, ()
    after = replace(
        view,
        status=target,
        ref=seen.ref or view.ref,
        endpoint=seen.endpoint or view.endpoint,
        error=seen.error or view.error,
        error_scope=seen.error_scope or view.error_scope,
        message=seen.message or view.message,
        misses=view.misses + 1 if seen.event is _E.NOT_SEEN else 0,
        failures=view.failures + 1 if seen.event in _FAILING else 0,
    )
    if target is view.status:
        return after, ()
    return _stamped(after, seen.at), (WakeJob(),)


def _stamped(view: InstanceView, at: datetime) -> InstanceView:
    """The view with the time at which its status was entered."""
    if view.status is _I.STARTING:
        return replace(view, accepted_at=at)
    if view.status is _I.RUNNING:
        return replace(view, running_at=at)
    if view.status is _I.TERMINATING:
        return replace(view, terminating_at=at)
    return replace(view, terminated_at=at) if view.status.is_final else view


# ---------------------------------------------------------------------------------------------------------------------
# Job attempts
# ---------------------------------------------------------------------------------------------------------------------


class JobEvent(str, Enum):
    """What can be observed about a job attempt."""

    DUE = "due"
    PLACED = "placed"
    UNPLACEABLE = "unplaceable"
    OFFER_REFUSED = "offer_refused"
    PULLING = "pulling"
    RUNNING = "running"
    READY = "ready"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ABORTED = "aborted"


_S, _J = RunStatus, JobEvent

JOB_TRANSITIONS: dict[tuple[RunStatus, JobEvent], RunStatus] = {
    (_S.PENDING, _J.DUE): _S.SUBMITTED,
    (_S.SUBMITTED, _J.PLACED): _S.PROVISIONING,
    (_S.SUBMITTED, _J.UNPLACEABLE): _S.FAILED,
    # The cloud would not sell this offer: place again, without it.
    (_S.PROVISIONING, _J.OFFER_REFUSED): _S.SUBMITTED,
    **{(status, _J.PULLING): _S.PULLING for status in (_S.PROVISIONING, _S.PULLING)},
    **{(status, _J.RUNNING): _S.RUNNING for status in (_S.PROVISIONING, _S.PULLING, _S.RUNNING)},
    # Of a service's replica: it answers as its probes want it.
    (_S.RUNNING, _J.READY): _S.RUNNING,
    **{(status, _J.STOPPING): _S.TERMINATING for status in (_S.PROVISIONING, _S.PULLING, _S.RUNNING, _S.TERMINATING)},
    **{(status, _J.SUCCEEDED): _S.DONE for status in (_S.PROVISIONING, _S.PULLING, _S.RUNNING)},
    **{(status, _J.FAILED): _S.FAILED for status in (_S.SUBMITTED, _S.PROVISIONING, _S.PULLING, _S.RUNNING)},
    **{(status, _J.STOPPED): _S.TERMINATED for status in _S if not status.is_finished},
    **{(status, _J.ABORTED): _S.ABORTED for status in _S if not status.is_finished},
}


@dataclass(frozen=True, slots=True)
class JobView:
    """What a step needs to know of an attempt; every field is a column of `jobs`."""

    status: RunStatus
    attempt: int = 0
    reason: Reason | None = None
    message: str | None = None
    exit_code: int | None = None
    tried: tuple[tuple[str, ...], ...] = ()
    instance_id: UUID | None = None
    ports: tuple[tuple[int, int], ...] = ()
    log_bytes: int = 0
    log_lost_bytes: int = 0
    running_at: datetime | None = None
    finished_at: datetime | None = None
    retry_since: datetime | None = None
    ready_at: datetime | None = None
    unready_failures: int = 0


@dataclass(frozen=True, slots=True)
class JobObservation:
    """One observation, made at `at`. Only the fields that belong to the event are set."""

    event: JobEvent
    at: datetime
    reason: Reason | None = None
    message: str | None = None
    exit_code: int | None = None
    offer: tuple[str, ...] | None = None
    instance_id: UUID | None = None
    ports: tuple[tuple[int, int], ...] = ()
    log_bytes: int = 0
    log_lost_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RetryRule:
    """The retry policy of a job: which reasons are worth another attempt, for how many seconds (`None`: for ever)."""

    reasons: frozenset[Reason] = frozenset()
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """The rule of a service's replica: whatever ends is replaced, until the run is stopped.

    Attributes:
        proven: a replica of the run has been ready once, so that what it runs is known to work.
        first: the retry policy, which decides about the very first attempt when there is no capacity for it.
    """

    proven: bool = False
    first: RetryRule = RetryRule()


Rule = RetryRule | KeepAlive

ATTEMPTS_TO_GET_READY = 3
"""So many attempts in a row may end without having been ready, while no replica of the run ever was."""
LIVED_WELL = 60.0
"""Seconds after which a ready replica's end begins a new row of failures; and the longest pause in such a row."""
SHORTEST_PAUSE = 1.0
_NOT_ITS_FAULT = frozenset({Reason.NO_CAPACITY, Reason.INTERRUPTED})


@dataclass(frozen=True, slots=True)
class ReleaseInstance:
    """The attempt needs its instance no longer."""


@dataclass(frozen=True, slots=True)
class NewAttempt:
    """Try again: after `pause` seconds, or (`None`) after a pause that grows with `attempt`."""

    attempt: int
    retry_since: datetime
    pause: float | None = None
    unready_failures: int = 0


@dataclass(frozen=True, slots=True)
class ReviveReplicas:
    """The service is known to work now: replicas that were given up before get another attempt."""


@dataclass(frozen=True, slots=True)
class EndRun:
    """The run has had its time: its other replicas end as well."""


JobAction = ReleaseInstance | NewAttempt | ReviveReplicas | EndRun


def step_job(view: JobView, seen: JobObservation, rule: Rule) -> tuple[JobView, tuple[JobAction, ...]]:
    """The next view of an attempt after an observation, and what follows from it."""
    target = JOB_TRANSITIONS.get((view.status, seen.event))
    if target is None:
        return view, ()
    after = replace(
        view,
        status=target,
        reason=seen.reason or view.reason,
        message=seen.message or view.message,
        exit_code=view.exit_code if seen.exit_code is None else seen.exit_code,
        ports=seen.ports or view.ports,
        log_bytes=max(view.log_bytes, seen.log_bytes),
        log_lost_bytes=max(view.log_lost_bytes, seen.log_lost_bytes),
    )
    if seen.event is _J.PLACED:
        return replace(after, instance_id=seen.instance_id, reason=None, message=None), ()
    if seen.event is _J.OFFER_REFUSED:
        tried = (*view.tried, seen.offer) if seen.offer else view.tried
        return replace(after, tried=tried, instance_id=None), ()
    if seen.event is _J.READY:
        return _ready(after, seen, rule)
    if target.is_finished:
        return _replace(after, seen, rule) if isinstance(rule, KeepAlive) else _finish(after, seen, rule)
    begins = target is _S.RUNNING and view.running_at is None
    return replace(after, running_at=seen.at) if begins else after, ()


def _ready(view: JobView, seen: JobObservation, rule: Rule) -> tuple[JobView, tuple[JobAction, ...]]:
    """Writes down when a replica was ready first. The first one of all proves that the service works."""
    if view.ready_at is not None:
        return view, ()
    first = isinstance(rule, KeepAlive) and not rule.proven
    return replace(view, ready_at=seen.at), (ReviveReplicas(),) if first else ()


def _finish(view: JobView, seen: JobObservation, rule: RetryRule) -> tuple[JobView, tuple[JobAction, ...]]:
    """Ends an attempt, and follows it with another one where the retry rule says so."""
    after = replace(view, finished_at=seen.at)
    since = view.retry_since or seen.at
    if view.running_at is not None:
        # It did run: a new row of failures begins here.
        since = seen.at
    worth_it = view.status is _S.FAILED and view.reason in rule.reasons
    in_time = rule.limit is None or (seen.at - since).total_seconds() < rule.limit
    if worth_it and in_time:
        return after, (ReleaseInstance(), NewAttempt(attempt=view.attempt + 1, retry_since=since))
    return after, (ReleaseInstance(),)


def _replace(view: JobView, seen: JobObservation, rule: KeepAlive) -> tuple[JobView, tuple[JobAction, ...]]:
    """Ends a replica, and replaces it: at once the first time, with growing pauses when that keeps happening.

    The pause is as long as the row of failures has lasted, which doubles it each time.
    """
    after = replace(view, finished_at=seen.at)
    if view.reason is Reason.MAX_DURATION_EXCEEDED:
        return after, (ReleaseInstance(), EndRun())
    if view.status in (_S.TERMINATED, _S.ABORTED):
        return after, (ReleaseInstance(),)
    failures = 0 if view.ready_at else view.unready_failures + (view.reason not in _NOT_ITS_FAULT)
    since = None if _lived_well(view, seen.at) else view.retry_since
    lasted = (seen.at - (since or seen.at)).total_seconds()
    if not rule.proven and failures >= ATTEMPTS_TO_GET_READY:
        return _given_up(after, failures), (ReleaseInstance(),)
    if not rule.proven and view.reason is Reason.NO_CAPACITY and not _may_wait(view, rule.first, lasted):
        return after, (ReleaseInstance(),)
    pause = 0.0 if since is None else min(LIVED_WELL, max(SHORTEST_PAUSE, lasted))
    again = NewAttempt(view.attempt + 1, retry_since=since or seen.at, pause=pause, unready_failures=failures)
    return after, (ReleaseInstance(), again)


def _lived_well(view: JobView, at: datetime) -> bool:
    return view.ready_at is not None and (at - view.ready_at).total_seconds() >= LIVED_WELL


def _may_wait(view: JobView, first: RetryRule, lasted: float) -> bool:
    """Whether to wait for capacity: always in place of a replica that was, else as the retry policy says."""
    if view.attempt == 0:
        return Reason.NO_CAPACITY in first.reasons
    return first.limit is None or lasted < first.limit


def _given_up(view: JobView, failures: int) -> JobView:
    # An end with exit code 0 is a failure as well, of what is to run until it is stopped.
    said = f"given up: {failures} attempts in a row ended before the service was ready; the last one: {view.message}"
    return replace(view, status=_S.FAILED, message=said)


_ORDER = (_S.TERMINATING, _S.RUNNING, _S.PULLING, _S.PROVISIONING, _S.SUBMITTED, _S.PENDING)
_FINAL_ORDER = (_S.FAILED, _S.ABORTED, _S.TERMINATED, _S.DONE)


def run_status(latest: list[RunStatus]) -> RunStatus:
    """The status of a run, given that of the latest attempt of each of its jobs.

    While any job is unfinished: the furthest status among them. Then the worst ending.
    """
    order = _ORDER if any(not status.is_finished for status in latest) else _FINAL_ORDER
    return next(status for status in order if status in latest)
