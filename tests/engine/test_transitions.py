"""The transition tables and their pure steps."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._engine.transitions import (
    INSTANCE_TRANSITIONS,
    JOB_TRANSITIONS,
    EndRun,
    InstanceEvent,
    InstanceObservation,
    InstanceStatus,
    InstanceView,
    JobEvent,
    JobObservation,
    JobView,
    KeepAlive,
    NewAttempt,
    ReleaseInstance,
    RetryRule,
    ReviveReplicas,
    WakeJob,
    run_status,
    step_instance,
    step_job,
)
from dstack_core._models.instances import InstanceRef
from dstack_core._models.runs import Reason, RunStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REF = InstanceRef(backend="sim", id="i-1", region="here")
NO_RETRY = RetryRule()


def seen(event: InstanceEvent, **facts: object) -> InstanceObservation:
    """An observation of an instance, now."""
    return InstanceObservation(event, NOW, **facts)  # type: ignore[arg-type]  # fields by name


@given(st.lists(st.sampled_from(InstanceEvent)))
def test_an_instance_that_was_accepted_ends_only_by_the_clouds_word(events: list[InstanceEvent]) -> None:
    """From STARTING on, whatever is observed, the only way out is GONE: confirmed by the cloud."""
    view = InstanceView(InstanceStatus.STARTING, ref=REF)
    for event in events:
        before = view
        view, _ = step_instance(view, seen(event))
        assert view.status is not InstanceStatus.FAILED
        if view.status is InstanceStatus.TERMINATED and before.status is not InstanceStatus.TERMINATED:
            assert event is InstanceEvent.GONE


@given(st.sampled_from([s for s in InstanceStatus if s.is_final]), st.lists(st.sampled_from(InstanceEvent)))
def test_final_instances_never_change(status: InstanceStatus, events: list[InstanceEvent]) -> None:
    """TERMINATED and FAILED stay what they are, with all their columns."""
    first = view = InstanceView(status)
    for event in events:
        view, actions = step_instance(view, seen(event))
        assert actions == ()
    assert view == first


@given(st.sampled_from([s for s in RunStatus if s.is_finished]), st.sampled_from(JobEvent))
def test_final_attempts_never_change(status: RunStatus, event: JobEvent) -> None:
    """A finished attempt stays as it ended."""
    view = JobView(status)
    assert step_job(view, JobObservation(event, NOW), NO_RETRY) == (view, ())


def test_the_tables_name_no_way_out_of_a_final_status() -> None:
    """What the tables do not list cannot happen; nothing is listed for final statuses."""
    assert not [key for key in INSTANCE_TRANSITIONS if key[0].is_final]
    assert not [key for key in JOB_TRANSITIONS if key[0].is_finished]


def test_every_status_can_be_reached_and_every_unfinished_one_left() -> None:
    """No dead ends and no islands in either table."""
    for table, first in ((INSTANCE_TRANSITIONS, InstanceStatus.INTENT), (JOB_TRANSITIONS, RunStatus.PENDING)):
        reached = {first} | set(table.values())
        assert reached == set(type(first))
        finals = {s for s in reached if getattr(s, "is_final", False) or getattr(s, "is_finished", False)}
        left = {status for (status, _), target in table.items() if target is not status}
        assert left == reached - finals


@pytest.mark.parametrize("event", [e for e in InstanceEvent if e is not InstanceEvent.ACCEPTED])
def test_an_unknown_outcome_is_settled_only_by_certainty(event: InstanceEvent) -> None:
    """UNKNOWN is left by finding the instance, or by being certain that there is none."""
    view, _ = step_instance(InstanceView(InstanceStatus.UNKNOWN), seen(event))
    certain = {
        InstanceEvent.GONE: InstanceStatus.TERMINATED,
        InstanceEvent.ABSENT: InstanceStatus.INTENT,
        InstanceEvent.WITHDRAWN: InstanceStatus.FAILED,
    }
    assert view.status is certain.get(event, InstanceStatus.UNKNOWN)


def test_failures_count_up_and_progress_clears_them() -> None:
    """The length of the pause follows the failures in a row."""
    view = InstanceView(InstanceStatus.TERMINATING, ref=REF)
    for expected in (1, 2, 3):
        view, actions = step_instance(view, seen(InstanceEvent.STILL_THERE, message="still running"))
        assert (view.failures, actions) == (expected, ())
    view, actions = step_instance(view, seen(InstanceEvent.GONE))
    assert (view.failures, view.terminated_at, actions) == (0, NOW, (WakeJob(),))


def test_a_refused_offer_is_remembered_and_placed_around() -> None:
    """OFFER_REFUSED sends the attempt back to be placed, without that offer."""
    key = ("sim", "small", "here", "", "")
    view = JobView(RunStatus.PROVISIONING, instance_id=UUID(int=1))
    view, actions = step_job(view, JobObservation(JobEvent.OFFER_REFUSED, NOW, offer=key), NO_RETRY)
    assert (view.status, view.tried, view.instance_id, actions) == (RunStatus.SUBMITTED, (key,), None, ())


@pytest.mark.parametrize("status", [s for s in RunStatus if not s.is_finished])
@pytest.mark.parametrize(
    ("event", "end"), [(JobEvent.STOPPED, RunStatus.TERMINATED), (JobEvent.ABORTED, RunStatus.ABORTED)]
)
def test_a_user_can_end_an_attempt_at_any_time(status: RunStatus, event: JobEvent, end: RunStatus) -> None:
    """Stop and abort work in every unfinished status, and release the instance."""
    view, actions = step_job(JobView(status), JobObservation(event, NOW), NO_RETRY)
    assert (view.status, view.finished_at, actions) == (end, NOW, (ReleaseInstance(),))


def fail(view: JobView, reason: Reason, at: datetime, rule: RetryRule) -> tuple[object, ...]:
    """The actions after a failure."""
    return step_job(view, JobObservation(JobEvent.FAILED, at, reason=reason), rule)[1]


def test_retry_follows_the_policys_reasons_and_limit() -> None:
    """Another attempt comes for the reasons of the policy only, and only within its limit."""
    rule = RetryRule(reasons=frozenset({Reason.INTERRUPTED}), limit=600)
    view = JobView(RunStatus.PROVISIONING, attempt=2, retry_since=NOW)
    assert fail(view, Reason.INTERRUPTED, NOW + timedelta(seconds=599), rule)[1:] == (NewAttempt(3, NOW),)
    assert fail(view, Reason.INTERRUPTED, NOW + timedelta(seconds=600), rule)[1:] == ()
    assert fail(view, Reason.EXITED_WITH_ERROR, NOW, rule)[1:] == ()
    assert fail(view, Reason.INTERRUPTED, NOW, NO_RETRY)[1:] == ()


def test_an_attempt_that_ran_begins_a_new_row_of_failures() -> None:
    """The limit counts from the first failure in a row; running in between starts the count again."""
    rule = RetryRule(reasons=frozenset({Reason.INTERRUPTED}), limit=600)
    later = NOW + timedelta(hours=5)
    view = JobView(RunStatus.RUNNING, attempt=1, retry_since=NOW, running_at=NOW)
    assert fail(view, Reason.INTERRUPTED, later, rule)[1:] == (NewAttempt(2, later),)


def test_a_runs_status_is_that_of_its_latest_attempts() -> None:
    """The furthest unfinished one; when all are over, the worst ending."""
    s = RunStatus
    assert run_status([s.PENDING]) is s.PENDING
    assert run_status([s.DONE, s.RUNNING, s.PENDING]) is s.RUNNING
    assert run_status([s.DONE, s.FAILED, s.TERMINATED]) is s.FAILED
    assert run_status([s.DONE, s.DONE]) is s.DONE


# ---------------------------------------------------------------------------------------------------------------------
# Replicas of services
# ---------------------------------------------------------------------------------------------------------------------

UNPROVEN, PROVEN = KeepAlive(), KeepAlive(proven=True)


def next_of(actions: tuple[object, ...]) -> NewAttempt | None:
    """The attempt that follows, if one does."""
    return next((action for action in actions if isinstance(action, NewAttempt)), None)


def end(
    view: JobView, rule: KeepAlive, at: datetime = NOW, reason: Reason = Reason.EXITED_WITH_ERROR
) -> tuple[JobView, NewAttempt | None]:
    """How a replica ends, and what follows."""
    after, actions = step_job(view, JobObservation(JobEvent.FAILED, at, reason=reason, message="it broke"), rule)
    assert ReleaseInstance() in actions
    return after, next_of(actions)


def test_a_replica_that_was_ready_is_replaced_at_once() -> None:
    """The first end after a good life costs no pause, and no attempt counts against it."""
    view = JobView(RunStatus.RUNNING, attempt=4, running_at=NOW, ready_at=NOW, unready_failures=2, retry_since=NOW)
    later = NOW + timedelta(seconds=61)
    assert end(view, PROVEN, later)[1] == NewAttempt(5, later, pause=0.0, unready_failures=0)


def test_pauses_grow_while_a_replica_keeps_ending_soon() -> None:
    """None, one second, then as long as the row of failures has lasted, which doubles each time; at most a minute."""
    at, since, pauses = NOW, None, []
    for attempt in range(12):
        view = JobView(RunStatus.RUNNING, attempt=attempt, running_at=at, ready_at=at, retry_since=since)
        at += timedelta(seconds=1)
        again = end(view, PROVEN, at)[1]
        assert again is not None
        assert again.pause is not None
        pauses.append(again.pause)
        since = again.retry_since
        at += timedelta(seconds=again.pause)
    assert pauses[:4] == [0.0, 1.0, 3.0, 7.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0


def test_three_attempts_that_were_never_ready_fail_the_replica() -> None:
    """While no replica of the run was ever ready; the message has the number and the last words."""
    failures = 0
    for attempt in range(2):
        again = end(JobView(RunStatus.RUNNING, attempt=attempt, running_at=NOW, unready_failures=failures), UNPROVEN)[1]
        assert again is not None
        failures = again.unready_failures
    last = JobView(RunStatus.RUNNING, attempt=2, running_at=NOW, unready_failures=failures)
    after, again = end(last, UNPROVEN)
    assert (after.status, again) == (RunStatus.FAILED, None)
    assert after.message == ("given up: 3 attempts in a row ended before the service was ready; the last one: it broke")
    assert end(last, PROVEN)[1] is not None


@pytest.mark.parametrize("reason", [Reason.NO_CAPACITY, Reason.INTERRUPTED])
def test_what_is_not_a_replicas_fault_does_not_count(reason: Reason) -> None:
    """A shortage or a spot interruption says nothing about the program."""
    view = JobView(RunStatus.SUBMITTED, attempt=5, unready_failures=2, retry_since=NOW)
    again = end(view, UNPROVEN, reason=reason)[1]
    assert again is not None
    assert again.unready_failures == 2


def test_the_first_attempt_without_capacity_follows_the_retry_policy() -> None:
    """Without a policy it ends; with one it waits, as long as the policy says. A replacement always waits."""
    policy = KeepAlive(first=RetryRule(reasons=frozenset({Reason.NO_CAPACITY}), limit=600))
    first = JobView(RunStatus.SUBMITTED)
    assert end(first, UNPROVEN, reason=Reason.NO_CAPACITY)[1] is None
    assert end(first, policy, reason=Reason.NO_CAPACITY)[1] is not None
    waiting = JobView(RunStatus.SUBMITTED, attempt=3, retry_since=NOW)
    late = NOW + timedelta(seconds=600)
    assert end(waiting, policy, late, Reason.NO_CAPACITY)[1] is None
    assert end(waiting, UNPROVEN, late, Reason.NO_CAPACITY)[1] is not None
    assert end(waiting, replace(policy, proven=True), late, Reason.NO_CAPACITY)[1] is not None


def test_the_first_readiness_is_kept_and_proves_the_service() -> None:
    """`ready_at` is written once; the first replica of all has those revived that were given up."""
    view = JobView(RunStatus.RUNNING, running_at=NOW)
    after, actions = step_job(view, JobObservation(JobEvent.READY, NOW), UNPROVEN)
    assert (after.ready_at, actions) == (NOW, (ReviveReplicas(),))
    assert step_job(view, JobObservation(JobEvent.READY, NOW), PROVEN)[1] == ()
    later = JobObservation(JobEvent.READY, NOW + timedelta(seconds=5))
    assert step_job(after, later, UNPROVEN) == (after, ())


def test_when_the_time_is_over_the_whole_run_ends() -> None:
    """`max_duration` replaces nothing, and has the other replicas stopped."""
    seen = JobObservation(JobEvent.STOPPED, NOW, reason=Reason.MAX_DURATION_EXCEEDED)
    after, actions = step_job(JobView(RunStatus.RUNNING), seen, PROVEN)
    assert (after.status, actions) == (RunStatus.TERMINATED, (ReleaseInstance(), EndRun()))


@given(
    st.sampled_from([s for s in RunStatus if not s.is_finished]),
    st.sampled_from(JobEvent),
    st.sampled_from(Reason),
    st.booleans(),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_replica_is_replaced_or_there_is_a_reason_why_not(
    status: RunStatus, event: JobEvent, reason: Reason, proven: bool, failures: int, was_ready: bool
) -> None:
    """Of a service that works, only a stop or the end of its time ends a replica for good; never twice at once."""
    view = JobView(status, running_at=NOW, ready_at=NOW if was_ready else None, unready_failures=failures)
    after, actions = step_job(view, JobObservation(event, NOW, reason=reason), KeepAlive(proven=proven))
    again = [action for action in actions if isinstance(action, NewAttempt)]
    assert len(again) <= after.status.is_finished
    asked = event in (JobEvent.STOPPED, JobEvent.ABORTED) or reason is Reason.MAX_DURATION_EXCEEDED
    if after.status.is_finished and proven and not asked:
        assert again
    if asked:
        assert not again
