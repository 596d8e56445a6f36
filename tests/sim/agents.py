"""How a simulated server reaches the agents of a SimCloud: the engine's `Transport`, with a network that fails."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from dstack_core._models.instances import Endpoint
from dstack_core._transport import (
    AgentHealth,
    AgentJobSpec,
    AgentRefused,
    AgentState,
    AgentUnreachable,
    JobMetrics,
    LogChunk,
    Said,
)
from dstack_core.testing.simcloud import SimCloud, SimJob, SimMachine, SimRefused

T = TypeVar("T")

_MISDIRECTED = 421

_SILENCE = 10.0
"""Seconds after which a call to an address where nobody answers is given up."""


@dataclass
class Network:
    """The way from one server to the agents.

    Attributes:
        point: called before and after each call that reaches an agent; may not return.
        cut_until: until then nobody is reached.
        loss: how likely an answer is lost.
        twice: how likely a request arrives twice.
    """

    cloud: SimCloud
    rng: random.Random
    point: Callable[[str], None] = lambda _: None
    trace: Callable[[str], None] = lambda _: None
    cut_until: float = 0.0
    loss: float = 0.0
    twice: float = 0.0
    struck: dict[str, int] = field(default_factory=dict)

    def connect(self, endpoint: Endpoint) -> Connection:
        """A connection to whatever has that address when it is used."""
        return Connection(self, endpoint.ssh_host or "")

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """No simulated machine listens on ports."""
        raise AgentUnreachable(f"nothing is published at {endpoint.ssh_host}:{port}")

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """Simulated machines are born with their agents, and have no shell."""
        raise AgentUnreachable(f"nothing at {endpoint.ssh_host} runs '{command}' on {len(data)} bytes")

    def count(self, what: str) -> None:
        """Notes that a fault happened."""
        self.struck[what] = self.struck.get(what, 0) + 1


class Connection:
    """An `AgentConnection`."""

    def __init__(self, network: Network, address: str) -> None:
        self._net = network
        self._address = address
        self._clock = network.cloud.clock

    async def health(self) -> AgentHealth:
        """Who answers."""
        machine = await self._reach("health")
        jobs = (machine.job.id,) if machine.job is not None else ()
        return AgentHealth("sim", 1, 1, 1, jobs, None, str(machine.instance))

    async def put_job(self, job_id: str, spec: AgentJobSpec) -> AgentState:
        """Starts the job, once."""
        return await self._act(f"put_job {job_id}", lambda machine: self._state(self._put(machine, job_id, spec)))

    @staticmethod
    def _put(machine: SimMachine, job_id: str, spec: AgentJobSpec) -> SimJob:
        if spec.instance not in (None, str(machine.instance)):
            raise SimRefused(_MISDIRECTED, f"this is instance {machine.instance}")
        return machine.put_job(job_id, spec, spec.max_duration)

    async def stop_job(self, job_id: str, grace: float) -> AgentState:
        """Has it end."""
        return await self._act(f"stop_job {job_id}", lambda machine: self._state(machine.stop_job(job_id, grace)))

    async def job_state(self, job_id: str, after: int = -1, wait: float = 0) -> AgentState:
        """As soon as `seq` is greater than `after`, or after `wait` seconds."""
        machine = await self._reach("job_state")
        job = await self._until(machine, job_id, lambda job: job.state(self._clock.time()).seq > after, wait)
        await self._return(machine)
        return self._state(job)

    async def read_log(self, job_id: str, offset: int, wait: float = 0.0, limit: int = 1 << 20) -> LogChunk:
        """As soon as there is something from `offset` on, or after `wait` seconds."""

        def something(job: SimJob) -> bool:
            now = self._clock.time()
            return job.printed(now) > offset or now >= job.ends_at

        machine = await self._reach("read_log")
        job = await self._until(machine, job_id, something, wait)
        now = self._clock.time()
        # Small pieces, so that there is something to be torn apart.
        end = min(job.printed(now), offset + min(limit, 100))
        chunk = LogChunk(
            offset=offset,
            data=job.output(offset, end),
            index=((offset, int(job.printed_at(offset) * 1e6)),) if end > offset else (),
            end=now >= job.ends_at and end == job.printed(now),
        )
        await self._return(machine)
        return chunk

    async def renew_lease(self, seconds: float) -> None:
        """A server is there."""
        await self._act("renew_lease", lambda machine: machine.renew(seconds))

    async def code_size(self, code_hash: str) -> int:
        """Simulated jobs have no code."""
        raise AgentRefused(404, f"no code here: {code_hash}")

    async def put_code(self, code_hash: str, offset: int, data: bytes) -> int:
        """Simulated jobs have no code."""
        raise AgentRefused(404, f"no code here: {code_hash}")

    async def note_activity(self, job_id: str) -> None:
        """Somebody is at work."""
        await self._act("note_activity", lambda machine: machine.find(job_id))

    async def metrics(self, job_id: str) -> JobMetrics:
        """Nothing is measured."""
        raise AgentRefused(404, f"nothing is measured of {job_id}")

    async def shutdown(self) -> None:
        """Never asked for."""
        raise AgentRefused(404, "a simulated agent does not shut down")

    async def aclose(self) -> None:
        """Nothing is held."""

    # -- inside --------------------------------------------------------------------------------------------------

    async def _act(self, what: str, effect: Callable[[SimMachine], T]) -> T:
        """A call that changes something, once or twice."""
        self._net.point(f"before agent {what.partition(' ')[0]}")
        machine = await self._reach(what)
        again = self._net.rng.random() < self._net.twice
        try:
            result = effect(machine)
            if again:
                self._net.count("agent: a request arrived twice")
                result = effect(machine)
        except SimRefused as refused:
            self._net.trace(f"agent {self._address} refuses {what}: {refused}")
            if refused.status == _MISDIRECTED:
                self._net.count("agent: another machine has the address")
                raise AgentUnreachable(str(refused)) from None
            raise AgentRefused(refused.status, str(refused)) from None
        self._net.trace(f"agent {self._address} {what}")
        self._net.point(f"after agent {what.partition(' ')[0]}")
        await self._return(machine)
        return result

    async def _reach(self, what: str) -> SimMachine:
        """The machine that has the address, if it can be reached."""
        await self._travel()
        machine = self._there()
        if machine is None:
            await asyncio.sleep(self._net.rng.uniform(1, _SILENCE))
            raise AgentUnreachable(f"nobody answers at {self._address} ({what})")
        return machine

    async def _return(self, machine: SimMachine) -> None:
        """The way back of an answer."""
        await self._travel()
        lost = self._net.loss and self._net.rng.random() < self._net.loss
        if lost:
            self._net.count("agent: an answer was lost")
        if lost or self._there() is not machine:
            raise AgentUnreachable(f"the connection to {self._address} broke")

    def _there(self) -> SimMachine | None:
        if self._clock.time() < self._net.cut_until:
            self._net.count("agent: the server was cut off")
            return None
        instance = self._net.cloud.at(self._address)
        return instance.machine if instance is not None and instance.machine.answers() else None

    async def _travel(self) -> None:
        await asyncio.sleep(self._net.rng.uniform(0.001, 0.05))

    async def _until(self, machine: SimMachine, job_id: str, true: Callable[[SimJob], bool], wait: float) -> SimJob:
        """Waits on the agent's side until something is true of its job."""
        deadline = self._clock.time() + wait
        while True:
            try:
                job = machine.find(job_id)
            except SimRefused as refused:
                raise AgentRefused(refused.status, str(refused)) from None
            now = self._clock.time()
            if true(job) or now >= deadline:
                return job
            await _told(machine, min(deadline, job.next_change(now)) - now)
            if self._there() is not machine:
                await asyncio.sleep(self._net.rng.uniform(0, _SILENCE))
                raise AgentUnreachable(f"the connection to {self._address} broke")

    def _state(self, job: SimJob) -> AgentState:
        now = job.state(self._clock.time())
        facts: dict[str, Any] = asdict(now)
        facts |= {name: self._date(facts[name]) for name in ("started_at", "running_at", "finished_at")}
        return AgentState(id=job.id, message=None, log_lost_bytes=0, ports={}, oom=False, **facts)

    def _date(self, seconds: float | None) -> datetime | None:
        return None if seconds is None else self._clock.at(seconds)


async def _told(machine: SimMachine, seconds: float) -> None:
    """Waits until something changes on a machine, at most so long."""
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not news.done():
            news.set_result(None)

    machine.listeners.append(tell)
    timer = loop.call_later(max(0.0, seconds), tell)
    try:
        await news
    finally:
        timer.cancel()
        if tell in machine.listeners:
            machine.listeners.remove(tell)
