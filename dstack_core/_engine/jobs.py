"""How a job attempt is moved on: placed, given to its agent, followed, stopped, and ended with all of its output."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from dstack_core._backends import BackendHub
from dstack_core._engine import dev_environments, journal, placement
from dstack_core._engine.booting import way_to
from dstack_core._engine.code import CodeUnavailable, JobCode
from dstack_core._engine.instances import as_written as instance_as_written
from dstack_core._engine.instances import first_call
from dstack_core._engine.intents import ORPHAN_GRACE, IntentFor, NewIntent, render_intent
from dstack_core._engine.keeping import end_run, new_attempt, revive_replicas
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.leases import (
    FIRST_TOKEN,
    Kind,
    Lease,
    born_leased,
    held,
    lengthen,
    release,
    renew,
    wake,
)
from dstack_core._engine.output import last_lines
from dstack_core._engine.reconciler import LEASE
from dstack_core._engine.replicas import Directory
from dstack_core._engine.seams import Seams
from dstack_core._engine.served import where_of
from dstack_core._engine.session import JobSession
from dstack_core._engine.shortages import Shortages
from dstack_core._engine.specs import agent_job_spec, rule_of, stored_job
from dstack_core._engine.transitions import (
    EndRun,
    InstanceStatus,
    JobAction,
    JobEvent,
    JobObservation,
    JobView,
    NewAttempt,
    ReleaseInstance,
    ReviveReplicas,
    Rule,
    step_job,
)
from dstack_core._models.instances import Endpoint, InstanceRequest
from dstack_core._models.runs import JobSpec, Reason, RunStatus
from dstack_core._store import records
from dstack_core._store.logs import LogStore
from dstack_core._store.prepared import Prepared
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow, JobRow, ProjectRow, RunRow
from dstack_core._transport import AgentRefused, AgentState, AgentUnreachable, Transport

LISTING_TIMEOUT = 20.0
"""Seconds a placement waits for the offers of slow backends."""
SILENCE_LIMIT = 300.0
"""Seconds of silence after which the agent of an instance that is still there is given up."""
RESYNC = 60.0
ABORT = "abort"
OUT_OF_TIME = "max_duration"
_ENDING = (InstanceStatus.FAILED, InstanceStatus.TERMINATING, InstanceStatus.TERMINATED)
_Seen: TypeAlias = tuple[JobObservation, ...]
"""What a look showed, in the order in which it is to be written."""


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What a job needs to know of its instance. `reached`: its agent has answered, so it may have got the job."""

    status: InstanceStatus
    reached: bool
    endpoint: Endpoint | None
    request: str
    message: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One attempt at the beginning of a step. `whom` is for one to be placed, or placed again."""

    id: UUID
    run_id: UUID
    view: JobView
    stop: str | None
    spec: JobSpec
    instance: InstanceFacts | None
    whom: IntentFor | None
    given: bool = False

    @property
    def may_have_run(self) -> bool:
        """Its agent has answered, and nothing shows that it was not given the job."""
        reached = self.instance is not None and self.instance.reached
        return reached and (self.given or self.spec.code_hash is None)

    @property
    def is_replica(self) -> bool:
        """It is a replica of a service."""
        return self.spec.service_port is not None


class JobHandler:
    """Moves job attempts on. Holds a `JobSession` for each job that runs, from step to step."""

    def __init__(
        self,
        seams: Seams,
        store: Store,
        logs: LogStore,
        backends: BackendHub,
        transport: Transport,
        wakeups: journal.Wakeups,
        owner: UUID,
        agent_pyz: Path,
        directory: Directory,
        code: JobCode,
        shortages: Shortages,
        keyring: Keyring,
        orphan_grace: float = ORPHAN_GRACE,
    ) -> None:
        self._seams = seams
        self._keyring = keyring
        self._clock = seams.clock
        self._store = store
        self._logs = logs
        self._backends = backends
        self._transport = transport
        self._wakeups = wakeups
        self._owner = owner
        self._agent_pyz = agent_pyz
        self._directory = directory
        self._code = code
        self._shortages = shortages
        self._orphan_grace = orphan_grace
        self._sessions: dict[UUID, JobSession] = {}
        self._next: dict[UUID, tuple[Lease, Snapshot]] = {}

    async def advance(self, lease: Lease, woken: asyncio.Event) -> bool:
        """Makes one step of one attempt. See `Handler`."""
        it = await self._now(lease, woken)
        if it is None:
            return False
        seen, intent = await self._observe(lease, it, woken)
        if not seen and self._must_go_on(it, woken):
            return True
        woken.clear()
        written = await self._store.transact(lambda session: self._write(session, lease, it, seen, intent), quick=True)
        self._wakeups.changed(it.run_id)
        if it.is_replica:
            self._wakeups.service_changed(it.run_id)
        for kind, row_id in written.wake:
            self._wakeups.wake(kind, row_id)
        for other, known in written.adopt:
            self._wakeups.adopt(other, known)
        self._wakeups.due(written.due)
        if written.after is None:
            await self.forget(it.id)
            return False
        self._next[it.id] = (lease, written.after)
        return True

    async def _now(self, lease: Lease, woken: asyncio.Event) -> Snapshot | None:
        """The attempt as the last step left it, or as it is in the store."""
        known, it = self._next.pop(lease.id, (None, None))
        if known == lease:
            return it
        woken.clear()
        return await self._store.transact(lambda session: self._load(session, lease), quick=True)

    async def forget(self, row_id: UUID) -> None:
        """Closes the connection to the agent, if there is one. The job goes on."""
        self._next.pop(row_id, None)
        session = self._sessions.pop(row_id, None)
        if session is not None:
            await session.close()

    async def note_activity(self, job_id: UUID) -> None:
        """Tells a job's agent that somebody is at work; an agent that cannot be told now is told the next time."""
        with suppress(AgentUnreachable, AgentRefused):
            live = self._sessions.get(job_id)
            if live is not None:
                await live.note_activity()
                return
            # Another server of this database follows the job.
            endpoint = await self._store.read(lambda session: _endpoint_of(session, job_id))
            if endpoint is not None:
                agent = self._transport.connect(endpoint)
                try:
                    await agent.note_activity(str(job_id))
                finally:
                    await agent.aclose()

    def expect(self, lease: Lease, known: Snapshot) -> None:
        """The next step is that of an attempt which was just written."""
        self._next[lease.id] = (lease, known)

    def session_of(self, job_id: UUID) -> JobSession | None:
        """The session of a job that this server follows now."""
        return self._sessions.get(job_id)

    def _must_go_on(self, it: Snapshot, woken: asyncio.Event) -> bool:
        """Nothing to write: keep following what runs, look again at what was woken."""
        return it.id in self._sessions or woken.is_set()

    # -- reading -------------------------------------------------------------------------------------------------

    def _load(self, session: Session, lease: Lease) -> Snapshot | None:
        row = renew(session, lease, JobRow, self._clock.now(), LEASE)
        if RunStatus(row.status).is_finished:
            release(row, None)
            return None
        return look_at_job(session, row)

    # -- observing -----------------------------------------------------------------------------------------------

    async def _observe(self, lease: Lease, it: Snapshot, woken: asyncio.Event) -> tuple[_Seen, NewIntent | None]:
        """Looks at (or acts on) the world as the status asks for. Empty: nothing new yet."""
        if it.view.status is RunStatus.PENDING:
            return (self._stopped(it) if it.stop else self._saw(JobEvent.DUE),), None
        if it.view.status is RunStatus.SUBMITTED:
            placed, intent = await self._place(it)
            return (placed,), intent
        provisions = it.view.status is RunStatus.PROVISIONING
        seen = await self._provision(lease, it, woken) if provisions else await self._follow(it, woken)
        if seen is not None and seen.event is JobEvent.OFFER_REFUSED and it.whom is not None:
            return await self._place_again(it, seen)
        return (seen,) if seen is not None else (), None

    async def _place_again(self, it: Snapshot, refused: JobObservation) -> tuple[_Seen, NewIntent | None]:
        """After a refusal at once, so that both are one step."""
        view, _ = step_job(it.view, refused, rule_of(it.spec, proven=False))
        placed, intent = await self._place(replace(it, view=view, instance=None))
        return (refused, placed), intent

    def _saw(self, event: JobEvent, **facts: object) -> JobObservation:
        return JobObservation(event=event, at=self._clock.now(), **facts)  # type: ignore[arg-type]  # fields by name

    def _stopped(self, it: Snapshot, **facts: object) -> JobObservation:
        """The end that the user asked for, or that the run's time is over."""
        if it.stop == OUT_OF_TIME:
            return self._out_of_time(it, **facts)
        if it.stop == ABORT:
            return self._saw(JobEvent.ABORTED, reason=Reason.ABORTED_BY_USER, message="aborted by the user", **facts)
        return self._saw(JobEvent.STOPPED, reason=Reason.TERMINATED_BY_USER, message="stopped by the user", **facts)

    def _out_of_time(self, it: Snapshot, **facts: object) -> JobObservation:
        limit = f"it ran longer than max_duration ({it.spec.max_duration} s)"
        if it.is_replica:
            limit = "the run's max_duration is over"
        return self._saw(JobEvent.STOPPED, reason=Reason.MAX_DURATION_EXCEEDED, message=limit, **facts)

    async def _place(self, it: Snapshot) -> tuple[JobObservation, NewIntent | None]:
        """Finds the cheapest offer that was not refused yet, and makes the intent to buy it."""
        if it.stop:
            return self._stopped(it), None
        requirements = it.spec.requirements
        listings = await self._backends.list_offers(
            requirements, timeout=LISTING_TIMEOUT, only=it.spec.backends or None
        )
        memory = await self._shortages.now()
        offer = placement.choose(listings, requirements, it.view.tried, memory)
        if offer is None:
            ranked = placement.rank(listings, requirements, memory)
            return await self._unplaceable(it, ranked.notes), None
        if it.whom is None:
            raise RuntimeError(f"Job {it.id} is placed in status {it.view.status.value}")
        keyring = self._keyring if self._backends.info(offer.backend).boots_machines else None
        intent = render_intent(self._seams, self._owner, it.whom, offer, self._agent_pyz, self._orphan_grace, keyring)
        return self._saw(JobEvent.PLACED, instance_id=intent.id), intent

    async def _unplaceable(self, it: Snapshot, notes: Iterable[str]) -> JobObservation:
        """No offer is left: says what each one said."""
        refused = await self._store.read(lambda session: _refusals(session, it.id)) if it.view.tried else []
        said = "; ".join(dict.fromkeys((*refused, *notes))) or "no backend has an offer that fits"
        return self._saw(JobEvent.UNPLACEABLE, reason=Reason.NO_CAPACITY, message=f"no offer could be had: {said}")

    async def _provision(self, lease: Lease, it: Snapshot, woken: asyncio.Event) -> JobObservation | None:
        """Waits for the instance, and gives the job to its agent, its code first."""
        instance = it.instance
        if instance is None or _came_to_nothing(instance):
            if instance is not None and it.may_have_run:
                # Perhaps a server died before it wrote down that it did. It is not begun twice.
                return self._lost(it, instance.message or "the instance is gone")
            return self._stopped(it) if it.stop else self._refused(instance)
        if instance.status is not InstanceStatus.RUNNING or instance.endpoint is None:
            return self._stopped(it) if it.stop else None
        return await self._start(lease, it, instance.endpoint, woken)

    async def _start(
        self, lease: Lease, it: Snapshot, endpoint: Endpoint, woken: asyncio.Event
    ) -> JobObservation | None:
        """Gives the job to its agent, or tells it of a stop, and follows it."""
        session = self._session(it, endpoint)
        try:
            if it.stop:
                return await self._stop_before_running(it, session)
            if not await self._give(lease, it, endpoint, session, woken):
                return None
        except AgentUnreachable:
            return await self._silent(it, session)
        except (AgentRefused, CodeUnavailable) as refused:
            said = f"the agent refused the job: {refused}" if isinstance(refused, AgentRefused) else str(refused)
            return self._saw(JobEvent.FAILED, reason=Reason.START_FAILED, message=said)
        await session.begin()
        return await self._follow(it, woken)

    async def _give(
        self, lease: Lease, it: Snapshot, endpoint: Endpoint, session: JobSession, woken: asyncio.Event
    ) -> bool:
        """Sends the job's code and then the job, whatever of it was done before; False if it was woken meanwhile."""
        archive = await self._code.archive_of(it.spec)
        if archive is not None and not await session.send(self._code, archive, woken):
            return False
        if it.spec.code_hash is not None and not it.given:
            await self._store.transact(lambda session: self._note_given(session, lease), quick=True)
        repo = await self._code.repo_of(it.run_id, it.spec)
        told = replace(agent_job_spec(it.spec, archive, repo), instance=str(it.view.instance_id))
        await session.put(dev_environments.reached_by(endpoint, it.spec, told))
        return True

    def _note_given(self, session: Session, lease: Lease) -> None:
        """Without code the job is given as soon as its agent is reached, so that needs no note of its own."""
        held(session, lease, JobRow).given_at = self._clock.now()

    async def _stop_before_running(self, it: Snapshot, session: JobSession) -> JobObservation:
        """A stop that came before we knew whether the agent has the job: it is told, should it have it."""
        try:
            await session.stop(0 if it.stop == ABORT else it.spec.stop_duration)
        except AgentRefused:
            return self._stopped(it)
        await session.begin()
        return self._saw(JobEvent.STOPPING)

    def _refused(self, instance: InstanceFacts | None) -> JobObservation:
        """The instance came to nothing: remember which offer that was, and place again."""
        if instance is None:
            return self._saw(JobEvent.OFFER_REFUSED, message="the instance is gone")
        offer = InstanceRequest.model_validate_json(instance.request).offer
        return self._saw(JobEvent.OFFER_REFUSED, offer=placement.offer_key(offer), message=instance.message)

    def _session(self, it: Snapshot, endpoint: Endpoint) -> JobSession:
        session = self._sessions.get(it.id)
        if session is None:
            session = JobSession(self._seams, self._transport, self._logs, it.id, endpoint, self._orphan_grace)
            self._sessions[it.id] = session
        return session

    async def _follow(self, it: Snapshot, woken: asyncio.Event) -> JobObservation | None:
        """Follows a job that the agent has, until there is something to write down."""
        instance = it.instance
        if instance is None or instance.endpoint is None:
            return self._lost(it, "its instance is not known any more")
        session = self._session(it, instance.endpoint)
        await session.begin()
        if it.stop and it.view.status is not RunStatus.TERMINATING:
            return await self._begin_stop(it, session)
        if it.stop == ABORT:
            await self._tell_agent(session, 0)
        session.changed.clear()
        seen = await self._look(it, session)
        if seen is not None:
            return seen
        await self._wait(session, woken)
        return await self._look(it, session)

    async def _begin_stop(self, it: Snapshot, session: JobSession) -> JobObservation:
        await self._tell_agent(session, 0 if it.stop == ABORT else it.spec.stop_duration)
        return self._saw(JobEvent.STOPPING, message="stopping")

    async def _tell_agent(self, session: JobSession, grace: float) -> None:
        """Has the job stopped. An agent that cannot be told is found out by its silence."""
        try:
            await session.stop(grace)
        except (AgentUnreachable, AgentRefused):
            session.changed.set()

    async def _wait(self, session: JobSession, woken: asyncio.Event) -> None:
        """Waits for news of the agent, a wake-up, or the resync."""
        waits = [asyncio.ensure_future(session.changed.wait()), asyncio.ensure_future(woken.wait())]
        try:
            await self._clock.wait_for(asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED), RESYNC)
        except TimeoutError:
            return
        finally:
            for wait in waits:
                wait.cancel()

    async def _look(self, it: Snapshot, session: JobSession) -> JobObservation | None:
        """Turns what the session knows into an observation; `None` if the row says the same already."""
        if not it.is_replica:
            return await self._news(it, session)
        if session.in_trouble() and not session.doubted:
            self._directory.suspect(it.run_id, it.id)
        session.doubted = session.in_trouble()
        if it.view.status is RunStatus.RUNNING and it.view.ready_at is None and self._directory.was_ready(it.id):
            return self._saw(JobEvent.READY)
        seen = await self._news(it, session)
        return await self._with_last_lines(it, seen) if seen is not None else None

    async def _with_last_lines(self, it: Snapshot, seen: JobObservation) -> JobObservation:
        """Says of a replica that failed without having been ready what it had to say."""
        if seen.event is not JobEvent.FAILED or it.view.ready_at is not None:
            return seen
        port = dict(seen.ports or it.view.ports).get(it.spec.service_port or 0)
        place = f". It never answered on {where_of(it.spec, port)}" if port else ""
        said = await last_lines(self._logs, it.id)
        tail = f". It printed last:\n{said}" if said else ". It printed nothing"
        return replace(seen, message=f"{seen.message}{place}{tail}")

    async def _news(self, it: Snapshot, session: JobSession) -> JobObservation | None:
        if session.unknown:
            return self._lost(it, "the agent does not know this job")
        state = session.state
        if session.silent_since is not None and (state is None or state.status != "exited"):
            return await self._silent(it, session)
        if state is None:
            return None
        if state.status == "exited":
            return self._ended(it, session, state) if session.output_ended else None
        return self._progress(it, state)

    def _progress(self, it: Snapshot, state: AgentState) -> JobObservation | None:
        event = JobEvent.RUNNING if state.status == "running" else JobEvent.PULLING
        if it.view.status is RunStatus.TERMINATING:
            return None
        ports = tuple(sorted(state.ports.items()))
        target = RunStatus.RUNNING if event is JobEvent.RUNNING else RunStatus.PULLING
        if state.status == "preparing" and it.view.status is RunStatus.PROVISIONING:
            return None
        if it.view.status is target and it.view.ports == ports:
            return None
        return self._saw(event, ports=ports)

    async def _silent(self, it: Snapshot, session: JobSession) -> JobObservation | None:
        """The agent does not answer: has the instance looked at; gives up when it is gone or silent for too long."""
        now = self._clock.now().timestamp()
        if session.silent_since is None:
            session.silent_since = now
        instance = it.instance
        if instance is not None and instance.status in _ENDING:
            return self._lost(it, instance.message or "the instance is gone")
        if now - session.silent_since > SILENCE_LIMIT:
            return self._lost(it, f"the agent did not answer for {SILENCE_LIMIT:g} s")
        if it.view.instance_id is not None:
            instance_id = it.view.instance_id
            await self._store.transact(lambda s: wake(s, "instance", instance_id, self._clock.now()), quick=True)
            self._wakeups.wake("instance", instance_id)
        await self._clock.sleep(0.1)
        return None

    def _lost(self, it: Snapshot, why: str) -> JobObservation:
        """The job is gone together with its agent or its instance."""
        if it.stop:
            return self._stopped(it)
        spot = "spot interruption" in why
        reason = Reason.INTERRUPTED if spot else Reason.AGENT_LOST
        cure = (
            ""
            if spot
            else "; it may have been killed, or the machine lost. Submit the run again, or give it a retry policy"
        )
        return self._saw(JobEvent.FAILED, reason=reason, message=f"lost the agent that ran the job: {why}{cure}")

    def _ended(self, it: Snapshot, session: JobSession, state: AgentState) -> JobObservation:
        """The job is over and its output stored: says how it ended, and what of the output is missing."""
        seen = self._outcome(it, session, state)
        said = [seen.message] if seen.message else []
        if state.log_lost_bytes:
            said.append(f"{state.log_lost_bytes} bytes of output were dropped where it ran: over the limit, or no room")
        lost, why = session.lost
        if lost:
            said.append(f"the last {lost} bytes of output could not be kept: {why}")
        return replace(seen, message="; ".join(said) or None)

    def _outcome(self, it: Snapshot, session: JobSession, state: AgentState) -> JobObservation:
        facts: dict[str, object] = {
            "exit_code": state.exit_code,
            "log_bytes": state.log_bytes,
            "log_lost_bytes": state.log_lost_bytes + session.lost[0],
            "ports": tuple(sorted(state.ports.items())),
        }
        if it.stop:
            return self._stopped(it, **facts)
        if state.reason == "max_duration":
            return self._out_of_time(it, **facts)
        if state.reason == "inactive":
            unused = dev_environments.unused(it.spec.inactivity_duration)
            return self._saw(JobEvent.STOPPED, reason=Reason.INACTIVE, message=unused, **facts)
        if state.reason == "exited" and state.exit_code == 0:
            if it.is_replica:
                return self._saw(JobEvent.FAILED, reason=Reason.EXITED_WITH_ERROR, message=_NO_END, **facts)
            return self._saw(JobEvent.SUCCEEDED, **facts)
        reason = _AGENT_REASONS.get(state.reason or "", Reason.START_FAILED)
        return self._saw(JobEvent.FAILED, reason=reason, message=_failure_message(state), **facts)

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, session: Session, lease: Lease, it: Snapshot, seen: _Seen, intent: NewIntent | None) -> _Written:
        """Writes what was seen and all that follows from it, in one transaction."""
        row = held(session, lease, JobRow)
        now = self._clock.now()
        if not seen:
            release(row, now + timedelta(seconds=RESYNC))
            return _Written(due=row.due_at)
        version = (row.status, row.ready_at)
        actions = [action for one in seen for action in self._step(session, it, row, one)]
        moved = len(seen) > 1 or version != (row.status, row.ready_at)
        after, written, goes_on = view_of(row), _Written(), False
        if after.status.is_finished:
            release(row, None)
        elif intent is not None and after.instance_id == intent.id:
            written.adopt.append(self._write_intent(session, intent, now))
            release(row, now + timedelta(seconds=RESYNC))
            written.due = row.due_at
        else:
            lengthen(row, now + LEASE)
            goes_on = True
        for action in actions:
            self._act(session, row, action, written)
        if moved:
            self._settle(session, it, row, actions, seen[-1].at)
        # Last, so that everything that was written goes to the database together.
        if goes_on:
            written.after = _snapshot(session, row, after)
        return written

    def _step(self, session: Session, it: Snapshot, row: JobRow, seen: JobObservation) -> tuple[JobAction, ...]:
        """Applies an observation to a row, and accounts for it."""
        before = view_of(row)
        after, actions = step_job(before, seen, _rule(session, it, seen))
        apply_view(row, after)
        if after.status is not before.status or after.ready_at is not before.ready_at:
            self._account(session, it, row, before.status, seen)
        return actions

    def _settle(self, session: Session, it: Snapshot, row: JobRow, actions: Iterable[JobAction], at: datetime) -> None:
        """Has the run follow its job."""
        # Every kind of run but a service has one job; this attempt is its latest until there is another.
        if it.is_replica or any(isinstance(action, NewAttempt) for action in actions):
            journal.settle_run(session, row.run_id, at)
        else:
            journal.settle_with(session, row, at)

    def _write_intent(self, session: Session, intent: NewIntent, now: datetime) -> tuple[Lease, object]:
        """The intent, with the call that follows noted, under a lease of this server, which makes the call at once."""
        leased = born_leased(self._wakeups.server, now + LEASE)
        records.add(session, InstanceRow, {**intent.values(now), **first_call(now), **leased})
        return Lease("instance", intent.id, FIRST_TOKEN), instance_as_written(intent, now)

    def _act(self, session: Session, row: JobRow, action: object, written: _Written) -> None:
        now = self._clock.now()
        if isinstance(action, ReleaseInstance) and row.instance_id is not None:
            instance = records.get(session, InstanceRow, row.instance_id)
            if instance is not None:
                instance.wanted = False
            if wake(session, "instance", row.instance_id, now):
                written.wake.append(("instance", row.instance_id))
        if isinstance(action, NewAttempt):
            again = new_attempt(session, self._seams, row, action)
            session.add(again)
            written.due = again.due_at
        if isinstance(action, ReviveReplicas):
            revive_replicas(session, self._seams, row)
            written.due = now
        if isinstance(action, EndRun):
            written.wake += [("job", job) for job in end_run(session, row, OUT_OF_TIME, now)]

    def _account(self, session: Session, it: Snapshot, row: JobRow, before: RunStatus, seen: JobObservation) -> None:
        said = f": {row.message.splitlines()[0]}" if row.message else ""
        if seen.event is JobEvent.READY:
            said = ": ready"
        code = f" (exit code {row.exit_code})" if row.exit_code is not None else ""
        text = f"job {it.spec.job_name}, attempt {row.attempt}: {before.value} -> {row.status}{code}{said}"
        journal.note(session, row.run_id, row.id, seen.at, text)


@dataclass(slots=True)
class _Written:
    """What follows from a written step.

    Attributes:
        after: the attempt to go on with at once, if any.
        due: when there is something to look at again: until when the row was given back, or another attempt.
        wake: who is to be woken.
        adopt: rows that were written leased, each with what its first step needs.
    """

    after: Snapshot | None = None
    due: datetime | None = None
    wake: list[tuple[Kind, UUID]] = field(default_factory=list)
    adopt: list[tuple[Lease, object]] = field(default_factory=list)


_NO_END = "the job exited with code 0, but a service runs until it is stopped"
_AGENT_REASONS = {
    "exited": Reason.EXITED_WITH_ERROR,
    "killed": Reason.EXITED_WITH_ERROR,
    "stopped": Reason.EXITED_WITH_ERROR,
    "code_failed": Reason.START_FAILED,
    "port_failed": Reason.PORTS_BINDING_FAILED,
    "agent_error": Reason.AGENT_LOST,
}


def _failure_message(state: AgentState) -> str:
    """For people: how the job failed."""
    if state.message:
        return state.message
    code = state.exit_code
    if code is not None and code > 128:
        return f"the job was ended by signal {code - 128}" + (" (out of memory)" if state.oom else "")
    return f"the job exited with code {code}"


# What ends or proves a replica may depend on how the others of its run did.
_TELLING = frozenset({JobEvent.READY, JobEvent.FAILED, JobEvent.UNPLACEABLE})


def _rule(session: Session, it: Snapshot, seen: JobObservation) -> Rule:
    return rule_of(it.spec, proven=it.is_replica and seen.event in _TELLING and journal.is_proven(session, it.run_id))


_NAMES = Prepared(
    select(RunRow.name, ProjectRow.name)
    .join(ProjectRow, ProjectRow.id == RunRow.project_id)
    .where(RunRow.id == bindparam("run_id"))
)
_SAID = Prepared(
    select(InstanceRow.request, InstanceRow.message)
    .where(InstanceRow.job_id == bindparam("job_id"))
    .order_by(InstanceRow.created_at)
)


def as_written(row_id: UUID, whom: IntentFor, spec: JobSpec) -> Snapshot:
    """An attempt whose row was just written, as the first step needs it."""
    view = JobView(status=RunStatus.SUBMITTED)
    return Snapshot(id=row_id, run_id=whom.run_id, view=view, stop=None, spec=spec, instance=None, whom=whom)


def look_at_job(session: Session, row: JobRow) -> Snapshot:
    """An attempt as it is in the store, as the next step needs it."""
    return _snapshot(session, row, view_of(row))


def _snapshot(session: Session, row: JobRow, view: JobView) -> Snapshot:
    """An attempt as the next step needs it."""
    spec = stored_job(row.spec)
    instance = _instance_facts(session, view.instance_id)
    whom = None
    if view.status is RunStatus.SUBMITTED or (view.status is RunStatus.PROVISIONING and _came_to_nothing(instance)):
        (run_name, project_name), *_ = _NAMES.rows(session, {"run_id": row.run_id})
        whom = IntentFor.of(row.id, row.run_id, run_name, project_name, spec)
    return Snapshot(
        id=row.id,
        run_id=row.run_id,
        view=view,
        stop=row.stop,
        spec=spec,
        instance=instance,
        whom=whom,
        given=row.given_at is not None,
    )


def _came_to_nothing(instance: InstanceFacts | None) -> bool:
    return instance is None or instance.status in _ENDING


def _instance_facts(session: Session, instance_id: UUID | None) -> InstanceFacts | None:
    row = records.get(session, InstanceRow, instance_id) if instance_id is not None else None
    if row is None:
        return None
    return InstanceFacts(
        status=InstanceStatus(row.status),
        reached=row.running_at is not None,
        endpoint=way_to(Endpoint.model_validate_json(row.endpoint), row.host_key) if row.endpoint else None,
        request=row.request,
        message=row.message,
    )


def _endpoint_of(session: Session, job_id: UUID) -> Endpoint | None:
    """Where the agent of a job is, if it runs."""
    job = session.get(JobRow, job_id)
    if job is None or job.status != RunStatus.RUNNING.value:
        return None
    facts = _instance_facts(session, job.instance_id)
    return facts.endpoint if facts else None


def _refusals(session: Session, job_id: UUID) -> list[str]:
    """What this attempt was to buy, and what the clouds said to that. The same may be said of several zones."""
    rows = _SAID.rows(session, {"job_id": job_id})
    said = [(InstanceRequest.model_validate_json(request).offer, message) for request, message in rows if message]
    return [f"{offer.backend}/{offer.region} ({journal.terms_of(offer)}): {message}" for offer, message in said]


def view_of(row: JobRow) -> JobView:
    """The part of a row that a step looks at."""
    return JobView(
        status=RunStatus(row.status),
        attempt=row.attempt,
        reason=Reason(row.reason) if row.reason else None,
        message=row.message,
        exit_code=row.exit_code,
        tried=tuple(tuple(key) for key in row.tried),
        instance_id=row.instance_id,
        ports=tuple(sorted((int(port), host) for port, host in row.ports.items())),
        log_bytes=row.log_bytes,
        log_lost_bytes=row.log_lost_bytes,
        running_at=row.running_at,
        finished_at=row.finished_at,
        retry_since=row.retry_since,
        ready_at=row.ready_at,
        unready_failures=row.unready_failures,
    )


def apply_view(row: JobRow, view: JobView) -> None:
    """Writes a view back to its row."""
    row.status = view.status.value
    row.reason = view.reason.value if view.reason else None
    row.tried = [list(key) for key in view.tried]
    row.ports = {str(port): host for port, host in view.ports}
    for column in ("message", "exit_code", "instance_id", "log_bytes", "log_lost_bytes"):
        setattr(row, column, getattr(view, column))
    for column in ("running_at", "finished_at", "ready_at"):
        setattr(row, column, getattr(view, column))
