"""A cloud in memory, behind the ordinary hooks, that does what a test scripts: for the engine's own tests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import UUID

from dstack_core._backends import BackendHub
from dstack_core.plugin import (
    Availability,
    BackendConfig,
    BackendInfo,
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    MachineResources,
    Offer,
    Requirements,
    StateReason,
    UnknownOutcomeError,
    hookimpl,
)
from tests.support.agents import agent_health

SMALL = MachineResources(cpus=2, memory_mib=8 * 1024, disk_mib=100 * 1024)


class CloudConfig(BackendConfig):
    """Nothing to configure."""

    type: Literal["sim"] = "sim"


INFO = BackendInfo(
    name="sim",
    title="Scripted cloud",
    config=CloudConfig,
    factory="tests.support.cloud:take_prepared",
    default_config=CloudConfig(),
    visibility_window=10.0,
    provisioning_timeout=120.0,
    hook_timeout=5.0,
    offers_ttl=0.0,
)

Fault = Callable[[], None]
"""Called in the middle of a hook; raises what the hook is to raise."""


@dataclass
class ScriptedCloud:
    """A cloud whose next answers a test decides.

    Attributes:
        before: faults for the next calls of a hook, raised before anything happened.
        after: faults for the next calls of a hook, raised when it has happened already.
        hidden: ids that listings do not show (yet).
        stuck: ids that do not go away when terminated.
        late: how the next instances are found that are accepted and cannot be made for want of capacity.
        idempotent: whether the same intent gives the same instance.
        calls: how often each hook was called.
        instances: all instances that ever were, by id.
        now: what the cloud says that the time is.
        agents: where real agents are started, one folder for each instance; `None` for instances without.
    """

    offers: list[Offer] = field(default_factory=lambda: [Offer("sim", "small", "here", SMALL, 1.0, zone="a")])
    before: dict[str, list[Fault]] = field(default_factory=dict)
    after: dict[str, list[Fault]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    late: list[InstanceState] = field(default_factory=list)
    idempotent: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    instances: dict[str, Instance] = field(default_factory=dict)
    requests: list[InstanceRequest] = field(default_factory=list)
    now: Callable[[], datetime] = lambda: datetime(2026, 1, 1, tzinfo=UTC)
    agents: Path | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    hashes: dict[UUID, str] = field(default_factory=dict)
    closed: bool = False

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """The scripted offers."""
        self._enter("offers")
        return list(self.offers)

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Starts an instance, once for each intent."""
        self._enter("create")
        with self.lock:
            if self.closed:
                raise UnknownOutcomeError("the test is over")
            self.requests.append(request)
            body = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
            if self.hashes.setdefault(request.intent, body) != body:
                raise InvalidRequestError("this intent was used with another body")
            known = [one for one in self.instances.values() if one.intent == request.intent]
            instance = known[0] if known and self.idempotent else self._start(request)
        self._leave("create")
        return instance

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """How an instance is."""
        self._enter("get")
        return self.instances.get(ref.id)

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Those of an owner that are not hidden."""
        self._enter("list")
        return [one for one in self.instances.values() if one.owner == owner and one.ref.id not in self.hidden]

    @hookimpl
    def dstack_list_all_instances(self) -> list[Instance]:
        """Those of all owners."""
        self._enter("list all")
        return list(self.instances.values())

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Ends an instance, unless it is stuck."""
        self._enter("terminate")
        if ref.id in self.instances and ref.id not in self.stuck:
            self.end(ref.id)
        self._leave("terminate")

    def _start(self, request: InstanceRequest) -> Instance:
        number = len(self.instances) + 1
        instance = Instance(
            ref=InstanceRef(backend="sim", id=f"i-{number}", region=request.offer.region, zone=request.offer.zone),
            intent=request.intent,
            owner=request.owner,
            state=InstanceState.RUNNING,
            created_at=self.now(),
            endpoint=Endpoint(unix_socket=(self.agents or Path("/nonexistent")) / f"i-{number}" / "agent.sock"),
        )
        if self.late:
            return self._accept_in_vain(instance)
        self.instances[instance.ref.id] = instance
        if self.agents is not None:
            self._start_agent(instance.ref.id, request, self.agents)
        return instance

    def _accept_in_vain(self, instance: Instance) -> Instance:
        accepted = instance.model_copy(update={"state": InstanceState.PENDING, "endpoint": None})
        short = {"state": self.late.pop(0), "reason": StateReason.NO_CAPACITY}
        self.instances[instance.ref.id] = accepted.model_copy(update=short)
        return accepted

    def _start_agent(self, instance_id: str, request: InstanceRequest, agents: Path) -> None:
        folder = agents / instance_id
        folder.mkdir(parents=True)
        with (folder / "agent.log").open("wb") as log:
            self.processes[instance_id] = subprocess.Popen(
                request.agent_command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def plant(self, owner: UUID, intent: UUID, instance_id: str | None = None) -> Instance:
        """An instance that nobody asked for through the hooks."""
        found = Instance(
            ref=InstanceRef(backend="sim", id=instance_id or f"p-{len(self.instances) + 1}", region="here", zone="a"),
            intent=intent,
            owner=owner,
            state=InstanceState.RUNNING,
            created_at=self.now(),
        )
        self.instances[found.ref.id] = found
        return found

    def end(self, instance_id: str, reason: StateReason = StateReason.REQUESTED) -> None:
        """Makes an instance terminated, as a user or the cloud itself would."""
        process = self.processes.pop(instance_id, None)
        if process is not None:
            stop_agent(process, (self.agents or Path()) / instance_id)
        gone = {"state": InstanceState.TERMINATED, "reason": reason}
        self.instances[instance_id] = self.instances[instance_id].model_copy(update=gone)

    def close(self) -> None:
        """Ends all agents. A call that is still under way starts no more of them."""
        with self.lock:
            self.closed = True
        for instance_id in list(self.processes):
            self.end(instance_id)

    def alive(self) -> list[Instance]:
        """What costs money now."""
        return [one for one in self.instances.values() if one.state is not InstanceState.TERMINATED]

    def _enter(self, hook: str) -> None:
        self.calls[hook] += 1
        self._play(self.before.get(hook))

    def _leave(self, hook: str) -> None:
        self._play(self.after.get(hook))

    def _play(self, faults: list[Fault] | None) -> None:
        if faults:
            faults.pop(0)()


def stop_agent(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Cuts the power: SIGKILL to the agent proper, whose watchdog ends everything else."""
    try:
        pid = agent_health(folder / "agent.sock")["pid"]
    except (OSError, ValueError):
        # It ended by itself, perhaps in the middle of its answer.
        pid = process.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    process.wait(30)


def raising(error: BaseException, times: int = 1) -> list[Fault]:
    """Faults that raise this error."""

    def fault() -> None:
        raise error

    return [fault] * times


def offers_in(*zones: str, price: float = 1.0) -> Iterator[Offer]:
    """One small offer for each zone, each a little dearer than the one before."""
    for number, zone in enumerate(zones):
        yield Offer("sim", "small", "here", SMALL, price + number / 100, zone=zone, availability=Availability.AVAILABLE)


_PREPARED: list[ScriptedCloud] = []


def take_prepared(_: CloudConfig) -> ScriptedCloud:
    """The factory: hands out the cloud that the test prepared."""
    return _PREPARED.pop()


class _Registration:
    """What the entry point of the scripted cloud leads to."""

    def __init__(self, info: BackendInfo) -> None:
        self._info = info

    @hookimpl
    def dstack_register_backends(self) -> list[BackendInfo]:
        """The one backend."""
        return [self._info]


@dataclass(frozen=True)
class _EntryPoint:
    registration: _Registration
    name: str = "sim"
    value: str = "tests.support.cloud"
    dist: None = None

    def load(self) -> object:
        """The plugin."""
        return self.registration


def hub_of(cloud: ScriptedCloud, **facts: object) -> BackendHub:
    """A hub whose only backend is this cloud, with other declared facts where given."""
    registration = _Registration(replace(INFO, **facts))  # type: ignore[arg-type]  # fields by name
    _PREPARED.append(cloud)
    return BackendHub.discover(entry_points=lambda **_: [_EntryPoint(registration)])
