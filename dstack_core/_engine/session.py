"""The live connection to the agent of one running job: its state, its output, its lease.

Lives in memory only. Whoever takes over a job after a crash makes a new one, and it goes on where the stored output
ends.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import asdict
from uuid import UUID

from dstack_core._engine.code import JobCode
from dstack_core._engine.intents import ORPHAN_GRACE
from dstack_core._engine.seams import Seams
from dstack_core._models.instances import Endpoint
from dstack_core._models.wire import JobMetrics
from dstack_core._store.logs import LogStore, LogStoreClosed, LogStoreFull
from dstack_core._transport import AgentCode, AgentJobSpec, AgentRefused, AgentState, AgentUnreachable, Transport

log = logging.getLogger(__name__)

POLL = 20.0
"""Seconds of one long-poll."""
_CHUNK = 2 << 20
_SHORTEST_REST, _LONGEST_REST = 0.002, 0.016
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class JobSession:
    """Follows one job on one agent. `changed` is set whenever there is something new to look at.

    Attributes:
        state: the agent's latest word, or `None` before the first.
        output_ended: all output has been stored, or given up.
        lost: bytes of output that could not be stored here, and why.
        silent_since: when the agent stopped answering; `None` while it answers.
        unknown: the agent answers, but does not know the job.
        doubted: whether something was wrong at the last look.
    """

    def __init__(
        self,
        seams: Seams,
        transport: Transport,
        logs: LogStore,
        job_id: UUID,
        endpoint: Endpoint,
        lease: float = ORPHAN_GRACE,
    ) -> None:
        self._clock = seams.clock
        self._lease = lease
        self._agent = transport.connect(endpoint)
        self._log_agent = transport.connect(endpoint)
        self._logs = logs
        self._id = job_id
        self._tasks: list[asyncio.Task[None]] = []
        self.changed = asyncio.Event()
        self.state: AgentState | None = None
        self.output_ended = False
        self.lost: tuple[int, str] = (0, "")
        self.silent_since: float | None = None
        self.unknown = False
        self.doubted = False
        self._full = False

    async def send(self, code: JobCode, archive: AgentCode, woken: asyncio.Event) -> bool:
        """Sends the job's code, as `JobCode.send` does."""
        return await code.send(self._agent, archive, woken, self._note_answer)

    async def put(self, spec: AgentJobSpec) -> None:
        """Gives the job to the agent; the same job again changes nothing."""
        self._take(await self._agent.put_job(str(self._id), spec))

    async def begin(self) -> None:
        """Starts following."""
        if not self._tasks:
            work = (self._follow_state(), self._copy_output(), self._renew_lease())
            self._tasks = [asyncio.create_task(one) for one in work]

    async def stop(self, grace: float) -> None:
        """Has the agent stop the job."""
        self._take(await self._agent.stop_job(str(self._id), grace))

    def _take(self, state: AgentState) -> None:
        """Keeps the latest word: the answer to one call may be read after that to a later one."""
        if self.state is None or state.seq >= self.state.seq:
            self.state = state

    def in_trouble(self) -> bool:
        """Whether the job has ended, or its agent is silent, so that nobody had better rely on it."""
        ended = self.state is not None and self.state.status == "exited"
        return ended or self.unknown or self.silent_since is not None

    async def note_activity(self) -> None:
        """Tells the agent that somebody is at work."""
        await self._agent.note_activity(str(self._id))

    async def metrics(self) -> JobMetrics:
        """What the job uses now."""
        return JobMetrics.model_validate(asdict(await self._agent.metrics(str(self._id))))

    async def close(self) -> None:
        """Stops following. The job goes on."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            # Also when the server stops meanwhile: nobody else knows these connections any more.
            for connection in (self._agent, self._log_agent):
                with suppress(Exception):
                    await connection.aclose()

    async def _follow_state(self) -> None:
        failures = 0
        while self.state is None or self.state.status != "exited":
            try:
                after = -1 if self.state is None else self.state.seq
                state = await self._agent.job_state(str(self._id), after=after, wait=POLL)
            except AgentUnreachable:
                failures += 1
                await self._note_silence(failures)
                continue
            except AgentRefused as refused:
                log.warning("The agent of job %s refuses: %s", self._id, refused)
                self.unknown = True
                self.changed.set()
                return
            failures = 0
            if self.silent_since is not None or self.state is None or state.seq != self.state.seq:
                self.changed.set()
            self._take(state)
            self.silent_since = None

    def _note_answer(self) -> None:
        self.silent_since = None

    async def _note_silence(self, failures: int) -> None:
        if self.silent_since is None:
            self.silent_since = self._clock.now().timestamp()
        self.changed.set()
        await self._clock.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures - 1, 10)))

    async def _copy_output(self) -> None:
        """Copies the output by offset: what is stored is never asked for again, what is not is never skipped."""
        try:
            await self._copy(await self._logs.end(self._id))
        except (AgentRefused, LogStoreFull, LogStoreClosed) as error:
            await self._give_up_output(error)
        else:
            await self._end_output()

    async def _copy(self, offset: int) -> None:
        failures, rest = 0, 0.0
        while True:
            asked = self._clock.now().timestamp()
            try:
                chunk = await self._log_agent.read_log(str(self._id), offset, wait=POLL, limit=_CHUNK)
            except AgentUnreachable:
                failures += 1
                await self._clock.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures - 1, 10)))
                continue
            failures = 0
            waited = self._clock.now().timestamp() - asked
            # Only now, as asking for an offset tells the agent that it may drop what lies before.
            try:
                offset = await self._logs.append(self._id, chunk.offset, chunk.data, chunk.index)
            except LogStoreFull as error:
                offset = await self._wait_for_room(error)
                continue
            if chunk.end:
                return
            rest = _rest_after(waited, rest)
            if rest and len(chunk.data) < _CHUNK:
                await self._clock.sleep(rest)

    async def _wait_for_room(self, error: LogStoreFull) -> int:
        """While the job runs, its agent keeps its output, and there may be room again. The offset to go on from."""
        if self.unknown or (self.state is not None and self.state.status == "exited"):
            raise error
        if not self._full:
            log.error("Output of job %s stays with its agent as long as it runs: %s", self._id, error)
        self._full = True
        await self._clock.sleep(_LONGEST_PAUSE)
        return await self._logs.end(self._id)

    async def _give_up_output(self, error: Exception) -> None:
        """The job matters more than its output: what is lost is counted and reported."""
        log.error("Output of job %s is lost from here on: %s", self._id, error)
        stored = await self._logs.end(self._id)
        while self.state is None or (self.state.status != "exited" and not self.unknown):
            await self._clock.sleep(0.25)
        self.lost = (max(0, self.state.log_bytes - stored), str(error))
        await self._end_output()

    async def _end_output(self) -> None:
        try:
            await self._logs.close_job(self._id)
        except LogStoreFull as error:
            # The end of the run is what tells its readers then.
            log.warning("The output of job %s cannot be marked as complete: %s", self._id, error)
        self.output_ended = True
        self.changed.set()

    async def _renew_lease(self) -> None:
        while True:
            with suppress(AgentUnreachable, AgentRefused):
                await self._agent.renew_lease(self._lease)
            await self._clock.sleep(self._lease / 5)


def _rest_after(waited: float, rest: float) -> float:
    """How long to leave the agent alone after a chunk.

    What comes after silence is fetched at once. While output flows, asking less often makes larger chunks, which cost
    the agent, this server and whoever reads along far less.
    """
    return min(_LONGEST_REST, max(_SHORTEST_REST, 2 * rest)) if waited < _LONGEST_REST else 0.0
