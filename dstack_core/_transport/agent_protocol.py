"""The agent's protocol: what the server asks, what the agent answers.

HTTP/1.1 over a unix socket, JSON unless said:

    GET  /v1/health                                       AgentHealth
    PUT  /v1/jobs/ID                    AgentJobSpec      AgentState. The same again: the same answer. Another: 409;
                                                          meant for another instance: 421
    GET  /v1/jobs/ID?after=SEQ&wait=S                     AgentState, as soon as `seq` is greater than SEQ, or after S
    GET  /v1/jobs/ID/log?offset=N&wait=S&limit=BYTES      bytes, with the headers X-Log-Offset, X-Log-Index, X-Log-End
    POST /v1/jobs/ID/stop               {"grace": S}      AgentState
    GET  /v1/jobs/ID/metrics                              JobMetrics
    POST /v1/jobs/ID/activity           {}                {}: somebody is at work, so the job is not idle
    GET  /v1/code/HASH                                    {"size": BYTES}: so much of this archive is here
    PUT  /v1/code/HASH?offset=N         bytes             {"size": BYTES}; 409 if N is not what is here, 507: no room
    PUT  /v1/lease                      {"seconds": S}    {"lease_expires_at": TIME}
    POST /v1/shutdown                                     {}

The code of a job is sent before the job: one archive (an uncompressed tar of files, folders and relative links),
piece by piece, from where the agent stands; a job whose code is not here is refused (409). The agent checks each entry
before it unpacks anything. What the job was given counts as here, though its archive is unpacked and gone.
Secrets (environment, registry password, credentials of a repository) travel in bodies only.
"""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, Self

from dstack_core._models.instances import Endpoint
from dstack_core.errors import DstackError

PROTOCOL = 1

AgentStatus = Literal["preparing", "pulling", "running", "exited"]

AgentReason = Literal[
    "exited",
    "stopped",
    "killed",
    "max_duration",
    "inactive",
    "start_failed",
    "code_failed",
    "pull_failed",
    "port_failed",
    "agent_error",
]
"""Why a job is over.

- `exited`: its main process ended by itself, with any exit code, or by a signal other than SIGKILL
- `killed`: SIGKILL that the agent did not send; `oom` says whether the kernel did for want of memory
- `stopped`: it was asked to stop; `max_duration`: it ran for too long; `inactive`: nobody used it for too long
- `start_failed`, `code_failed`, `pull_failed`, `port_failed`: it never ran; the message has the cure
- `agent_error`: the agent itself failed
"""


class AgentUnreachable(DstackError):
    """No agent answered: it is not there yet, or no more, or does not react. Nothing is known about the request.

    That of another instance, which has got the address since, counts as none.
    """


class HostKeyRefused(AgentUnreachable):
    """What answers at the address has another host key than the one that is known, so nothing was said to it."""


class AgentRefused(DstackError):
    """The agent answered that it will not do this.

    Args:
        status: HTTP status, in the 400s or 500s.
        message: the agent's own words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCode:
    """What is laid into the job's folder: an archive that was sent before.

    Attributes:
        hash: names the archive.
        size: its bytes.
        deleted: paths that are taken away first; with a repository, what its commit has and the user's copy has not.
    """

    hash: str
    size: int
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRepo:
    """A git repository to clone into the job's folder.

    Attributes:
        url: without user and password.
        branch: to check out; the default one if `None`.
        commit: to check out; the newest of the branch if `None`.
        oauth_token: for an HTTPS address. Secret.
        private_key: for an SSH address. Secret.
        user_name, user_email: for commits that are made in the job.
    """

    url: str
    branch: str | None = None
    commit: str | None = None
    oauth_token: str | None = field(default=None, repr=False)
    private_key: str | None = field(default=None, repr=False)
    user_name: str | None = None
    user_email: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentJobSpec:
    """What to run.

    Attributes:
        argv: run as it is, when there is no `shell`; in a container it follows the image's entrypoint.
        shell: a script, for `/bin/bash -c` on the machine (`/bin/sh` if there is no bash), `/bin/sh -c` in a container.
        env: added to the machine's or the image's environment. Secret.
        image: container image; `None` for a process on the machine.
        entrypoint: instead of the image's own; with `shell`, the shell to use.
        user: of the container.
        privileged: of the container.
        registry: `username` and `password` for pulling the image. Secret.
        python: version of a fresh environment, for a process.
        working_dir: absolute, or below the job's own fresh folder.
        ports: that the job listens on; those of a container are published on free ports of the machine.
        gpus: which, for containers; processes see what `env` lets them see.
        shm_mib: size of the container's /dev/shm.
        cpus: limit, for containers.
        memory_mib: limit, for containers.
        max_duration: seconds from running on, after which the agent stops it.
        stop_grace: seconds between SIGTERM and SIGKILL, when the agent itself stops it.
        log_limit: bytes of output to keep, the newest; `None`: the agent's own limit.
        code: files for the job's folder; `None` for none.
        repo: a git repository for the job's folder; `code` is laid over it.
        service_port: the one of `ports` that traffic comes in by; the variable `PORT` says where to listen, unless
            `env` sets it. A process is given a free port of the machine, which it may share with others, as the
            state's `ports` says. If `env` sets `PORT`, the process is left to listen on `service_port` itself.
        keep_port: no other process here is to listen on `service_port`: a process gets that very port if it is free.
        inactivity: seconds without anybody at work after which the agent stops the job; `None` for never.
        instance: the instance that the job is meant for; `None` for whichever answers.
    """

    argv: tuple[str, ...] = ()
    shell: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    image: str | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str | None = None
    privileged: bool = False
    registry: dict[str, str] | None = field(default=None, repr=False)
    python: str | None = None
    working_dir: str | None = None
    ports: tuple[int, ...] = ()
    gpus: Literal["all"] | tuple[int, ...] | None = None
    shm_mib: int | None = None
    cpus: float | None = None
    memory_mib: int | None = None
    max_duration: float | None = None
    stop_grace: float = 15
    log_limit: int | None = None
    code: AgentCode | None = None
    repo: AgentRepo | None = None
    service_port: int | None = None
    keep_port: bool = False
    inactivity: float | None = None
    instance: str | None = None

    def document(self) -> dict[str, Any]:
        """The body of `PUT /v1/jobs/ID`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AgentHealth:
    """Who answers.

    Attributes:
        instance: what it is the agent of; `None` if it was not told.
    """

    version: str
    protocol: int
    pid: int
    watchdog_pid: int
    jobs: tuple[str, ...]
    lease_expires_at: datetime | None
    instance: str | None = None

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Self:
        """From JSON; what a newer agent says beyond this is left aside, and an older one does not say what it is of."""
        known = {name: document[name] for name in cls.__slots__ if name != "instance"}
        known["instance"] = document.get("instance")
        return cls(**known | {"jobs": tuple(known["jobs"]), "lease_expires_at": _time(known["lease_expires_at"])})


@dataclass(frozen=True, slots=True)
class AgentState:
    """Where the job stands.

    Attributes:
        seq: grows with every change.
        exit_code: of the main process; 128 + N when signal N ended it; `None` if there was none.
        message: for people, with the cure.
        log_bytes: bytes written by the job so far, kept or not.
        log_lost_bytes: of these, the ones that could not be kept until they were read.
        ports: where each port of the job can be reached on the machine.
        oom: the kernel killed it for want of memory.
    """

    id: str
    seq: int
    status: AgentStatus
    exit_code: int | None
    reason: AgentReason | None
    message: str | None
    started_at: datetime | None
    running_at: datetime | None
    finished_at: datetime | None
    log_bytes: int
    log_lost_bytes: int
    ports: dict[int, int]
    oom: bool

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Self:
        """From JSON; what a newer agent says beyond this is left aside."""
        known = {name: document[name] for name in cls.__slots__}
        times = {name: _time(known[name]) for name in ("started_at", "running_at", "finished_at")}
        ports = {int(port): host_port for port, host_port in known["ports"].items()}
        return cls(**known | times | {"ports": ports})

    @property
    def is_finished(self) -> bool:
        """Nothing of it is left but its output."""
        return self.status == "exited"


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A run of the job's output.

    Attributes:
        offset: of the first byte; greater than what was asked for if bytes in between are lost.
        data: the bytes.
        index: (offset, microseconds since the epoch): when the bytes from that offset on were written.
        end: the output is complete, and nothing follows.
    """

    offset: int
    data: bytes
    index: tuple[tuple[int, int], ...]
    end: bool


@dataclass(frozen=True, slots=True)
class GpuMetrics:
    """One GPU at work."""

    name: str
    utilization_percent: float
    memory_used_mib: float
    memory_total_mib: float


@dataclass(frozen=True, slots=True)
class JobMetrics:
    """What the job uses, its whole process tree together.

    Attributes:
        cpu_seconds: since it began; grows.
        memory_mib: resident now.
    """

    at: datetime
    cpu_seconds: float
    memory_mib: float
    processes: int
    gpus: tuple[GpuMetrics, ...]

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Self:
        """From JSON; what a newer agent says beyond this is left aside."""
        known = {name: document[name] for name in cls.__slots__}
        gpus = tuple(GpuMetrics(**{name: gpu[name] for name in GpuMetrics.__slots__}) for gpu in known["gpus"])
        return cls(**known | {"at": datetime.fromisoformat(known["at"]), "gpus": gpus})


class AgentConnection(Protocol):
    """One agent, as the engine sees it. Every call may be repeated without harm.

    Raises:
        AgentUnreachable: from every call, at once if nobody listens.
        AgentRefused: from every call.
    """

    async def health(self) -> AgentHealth:
        """Who answers."""

    async def put_job(self, job_id: str, spec: AgentJobSpec) -> AgentState:
        """Starts the job, once."""

    async def job_state(self, job_id: str, after: int = -1, wait: float = 0) -> AgentState:
        """As soon as `seq` is greater than `after`, or after `wait` seconds."""

    async def read_log(self, job_id: str, offset: int, wait: float = 0.0, limit: int = 1 << 20) -> LogChunk:
        """As soon as there is something from `offset` on, or after `wait` seconds. Says that all before has arrived."""

    async def code_size(self, code_hash: str) -> int:
        """How much of an archive the agent has."""

    async def put_code(self, code_hash: str, offset: int, data: bytes) -> int:
        """Adds a piece of an archive, and says how much of it is there now.

        Refused anywhere but at its end (409), and if the machine's disk has no room for it (507).
        """

    async def note_activity(self, job_id: str) -> None:
        """Somebody is at work, so the job is not idle."""

    async def stop_job(self, job_id: str, grace: float) -> AgentState:
        """SIGTERM, and SIGKILL to all that is left after `grace` seconds; a later call with less grace wins."""

    async def metrics(self, job_id: str) -> JobMetrics:
        """What the job uses."""

    async def renew_lease(self, seconds: float) -> None:
        """Without a renewal the agent ends itself after this time, when no job runs."""

    async def shutdown(self) -> None:
        """Ends the agent; a job that still runs is killed."""

    async def aclose(self) -> None:
        """Closes the connection; the agent goes on."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a command on a machine came to.

    Attributes:
        code: its exit code; 128 + N when signal N ended it.
        output: what it wrote to its standard output.
        errors: what it wrote to its standard error.
    """

    code: int
    output: bytes
    errors: bytes


class Transport(Protocol):
    """Reaches agents of one kind of endpoint."""

    def connect(self, endpoint: Endpoint) -> AgentConnection:
        """Cheap: nothing is sent before the first call."""

    async def open_port(self, endpoint: Endpoint, port: int) -> socket.socket:
        """A connection to a port of the agent's machine: a non-blocking stream socket that sends at once.

        Raises:
            AgentUnreachable: there is no way to the machine.
            OSError: nobody listens there.
        """

    async def run(self, endpoint: Endpoint, command: str, data: bytes = b"") -> Said:
        """Runs a command in a shell of a machine that has no agent yet, with `data` as its input.

        Raises:
            HostKeyRefused: another machine answers there than the one whose key is known.
            AgentUnreachable: there is no way to the machine, or it broke: the command may have run or not.
        """


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
