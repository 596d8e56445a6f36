"""Requests and answers of the HTTP API that are not models of their own.

Routes (all JSON unless said otherwise; `P` is the project's name)

    GET  /api/server/info                          -> ServerInfo; needs no token
    POST /api/server/shutdown                      -> {}; only over the unix socket; runs go on
    POST /api/project/P/runs/get_plan              GetPlanRequest -> RunPlan
    POST /api/project/P/runs/submit                SubmitRequest -> Run
    POST /api/project/P/runs/get                   GetRunRequest -> Run
    POST /api/project/P/runs/list                  ListRunsRequest -> [Run]
    POST /api/project/P/runs/stop                  StopRunsRequest -> {}
    POST /api/project/P/runs/delete                DeleteRunsRequest -> {}
    GET  /api/project/P/runs/ID/logs               query LogQuery -> raw bytes, streamed (see LogQuery)
    GET  /api/project/P/runs/ID/metrics            -> JobMetrics
    POST /api/project/P/runs/ID/activity           -> {}; somebody is at work: a dev environment is not idle
    POST /api/project/P/repos/init                 InitRepoRequest -> {}
    POST /api/project/P/repos/get                  GetRepoRequest -> RepoInfo; 404 if it was never initialised
    POST /api/project/P/code/missing               MissingChunksRequest -> MissingChunks
    PUT  /api/project/P/code/chunks                chunks, one after the other (see CHUNK_HEAD) -> {}
    PUT  /api/project/P/code/manifests/HASH        the JSON of a CodeManifest with that SHA-256 -> {}
    GET  /api/project/P/code/manifests/HASH        -> {} if the server has it, with all of its chunks; else 404
    GET  /api/project/P/backends/list              -> [BackendStatus]; query `check=true` also runs dstack_check_config
    GET  /api/project/P/doctor                     -> DoctorReport; asks every backend what there is
    POST /api/project/P/doctor/fix                 FixRequest -> FixReport; ends what is named and should not be there
    POST /api/project/P/doctor/confirm_restore     -> {}; a person says that the database may forget what it lost

A refusal has status 400, 401, 403, 404 or 409 and the body `{"detail": [{"code": "...", "msg": "...", "fields":
[...]}]}`; `code` is that of a subclass of `ServerClientError`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from dstack_core._models.repos import AnyRunRepoData
from dstack_core._models.runs import RunSpec

API_VERSION = 1
"""Version of this HTTP API. Client and server must agree on it."""

OFFSET_HEADER = "X-Dstack-Log-Offset"
END_HEADER = "X-Dstack-Log-End"

CHUNK_HEAD = 36
"""Bytes before each chunk: its SHA-256 (32 bytes), and its length (4 bytes, big-endian)."""
MOST_HASHES = 20_000
"""Hashes that one request may ask about."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class ServerInfo(_Message):
    """Who answers.

    Attributes:
        prefix: the server's `sys.prefix`: the environment whose backends it sees.
        services_url: where this computer's browser reaches the services of a local server, as `http://127.0.0.1:41234`;
            `None` before there was one, and for a server on TCP, which serves them under its own address.
    """

    version: str
    api: int
    pid: int
    local: bool
    home: str
    prefix: str
    python: str
    started_at: datetime
    services_url: str | None = None


class GetPlanRequest(_Message):
    """Asks what would happen."""

    run_spec: RunSpec


class SubmitRequest(_Message):
    """Submits a run. `submit_key` makes it safe to repeat: the same key is the same run."""

    run_spec: RunSpec
    submit_key: UUID


class GetRunRequest(_Message):
    """Asks for the run of that name that is not deleted (finished names may be reused; the newest answers).

    With `run_id` that very run. With `after_version`, answers as soon as the run's version is greater, or after
    `wait` seconds (at most 60).
    """

    run_name: str | None = None
    run_id: UUID | None = None
    after_version: int | None = None
    wait: float = 0.0


class ListRunsRequest(_Message):
    """Lists runs, newest first. Without `all`: the active ones, or if there is none the latest finished one."""

    all: bool = False
    limit: int = Field(default=1000, ge=1, le=1000)


class StopRunsRequest(_Message):
    """Stops runs: politely (SIGTERM, grace, SIGKILL), or with `abort` at once. Stopping a finished run does nothing."""

    runs_names: tuple[str, ...] = ()
    run_ids: tuple[UUID, ...] = ()
    abort: bool = False


class DeleteRunsRequest(_Message):
    """Deletes finished runs and their logs."""

    runs_names: tuple[str, ...]


class LogQuery(_Message):
    """Where to start reading a run's output.

    The output of a replica (a task is its own replica 0) is one stream: that of its attempts, one after the other. The
    answer starts at `OFFSET_HEADER`, which is the requested `offset`, or later if bytes in between were dropped, or
    what `start_time` resolves to. It follows a live run, and ends at the next gap, at the end, or at any time: the
    reader asks again from where it stands. An answer with the header `END_HEADER: 1` has no body and says that there
    is nothing more to come, ever.

    `diagnose` gives the engine's own account of the run instead (UTF-8 lines), in the same way.
    """

    offset: int = Field(default=0, ge=0)
    start_time: datetime | None = None
    diagnose: bool = False
    follow: bool = True
    replica_num: int = Field(default=0, ge=0)


class RepoCredentials(_Message):
    """What opens a private git repository. Encrypted where it is kept; never shown.

    Attributes:
        clone_url: the address that it belongs to, without user and password.
        private_key: text of an SSH key, for an SSH address.
        oauth_token: a token, for an HTTPS address.
    """

    clone_url: str
    private_key: str | None = Field(default=None, repr=False)
    oauth_token: str | None = Field(default=None, repr=False)


class InitRepoRequest(_Message):
    """Makes a repo known, or its credentials new. Without credentials those that are kept stay."""

    repo_id: str = Field(min_length=1, max_length=128)
    repo_data: AnyRunRepoData
    credentials: RepoCredentials | None = None


class GetRepoRequest(_Message):
    """Asks for the repo of that id."""

    repo_id: str


class RepoInfo(_Message):
    """A repo as the server knows it. Credentials are never given back."""

    repo_id: str
    repo_data: AnyRunRepoData
    has_credentials: bool = False


class MissingChunksRequest(_Message):
    """Asks which chunks the server does not have."""

    hashes: tuple[str, ...] = Field(max_length=MOST_HASHES)


class MissingChunks(_Message):
    """The chunks to send."""

    hashes: tuple[str, ...]


class BackendStatus(_Message):
    """One backend as `dstack backends` shows it.

    `state`: `configured` (usable), `not_configured` (installed only), `not_installed` (configured only), `failed`.
    `reason` says why it is not usable and what to do.
    """

    name: str
    title: str
    state: Literal["configured", "not_configured", "not_installed", "failed"]
    distribution: str | None = None
    version: str | None = None
    path: str | None = None
    reason: str | None = None
    problems: tuple[str, ...] = ()


class DoctorInstance(_Message):
    """One instance that a cloud lists, or that the database believes in.

    Attributes:
        backend: the backend's name.
        id: the cloud's own id; `None` while there is none.
        region: where it is.
        zone: the zone, or `None`.
        state: what the cloud says; `None` if it was not listed.
        owner: whose it is.
        intent: what it was made for.
        created_at: since when it is there.
        verdict: a `Verdict` of the engine, or `missing` for one that the cloud does not list.
        reason: the verdict, in words.
        ending: its end is asked for, and not confirmed.
        run_name: the run that it was made for; `None` if unknown.
        status: how far the database thinks that it is.
        price: USD per hour; `None` if unknown.
        cost: USD so far; `None` if unknown.
        message: what the cloud said last.
    """

    backend: str
    id: str | None
    region: str
    zone: str | None = None
    state: str | None = None
    owner: UUID
    intent: UUID
    created_at: datetime
    verdict: str
    reason: str
    ending: bool = False
    run_name: str | None = None
    status: str | None = None
    price: float | None = None
    cost: float | None = None
    message: str | None = None

    @property
    def is_orphan(self) -> bool:
        """Whether `fix` would end it."""
        return self.verdict in ("over", "double", "unknown")


class DoctorBackend(_Message):
    """One backend, as the sweeper sees it.

    Attributes:
        name: the backend's name.
        instances: how many instances of it are not known to have ended.
        swept_at: when it was looked through last.
        problem: why it cannot be looked through, or what was found and not ended.
        lists_others: whether it can show what other owners have.
    """

    name: str
    instances: int = 0
    swept_at: datetime | None = None
    problem: str | None = None
    lists_others: bool = False


class DoctorShortage(_Message):
    """Something that a cloud refused, and that is passed over until then. An empty place or machine means all."""

    kind: Literal["capacity", "quota"]
    backend: str
    region: str
    zone: str
    machine: str
    market: str
    until: datetime
    message: str


class DoctorReport(_Message):
    """What there is in the clouds, and what is wrong with it.

    Attributes:
        owner: under whose id instances of this server are marked.
        at: when this was found out.
        instances: those of this owner.
        others: those of other owners, of the backends that can tell. They are never touched.
        backends: the backends that were asked, and those that should have been.
        shortages: what is passed over at the moment.
        restored_since: since when the database seems to be restored from a copy; `None` if it does not.
        report_only: this server ends nothing by itself.
        problems: what needs a person, in words.
    """

    owner: UUID
    at: datetime
    instances: tuple[DoctorInstance, ...] = ()
    others: tuple[DoctorInstance, ...] = ()
    backends: tuple[DoctorBackend, ...] = ()
    shortages: tuple[DoctorShortage, ...] = ()
    restored_since: datetime | None = None
    report_only: bool = False
    problems: tuple[str, ...] = ()


class InstanceId(_Message):
    """An instance, by the cloud's own id."""

    backend: str
    id: str


class FixRequest(_Message):
    """Which instances to end, as a person has seen them. Any that is in use after all is left alone."""

    instances: tuple[InstanceId, ...]


class Fixed(InstanceId):
    """What came of one: `problem` is `None` if it is gone; else its end is asked for again and again."""

    problem: str | None = None


class FixReport(_Message):
    """What was ended, and what was left alone."""

    ended: tuple[Fixed, ...] = ()
    left: tuple[InstanceId, ...] = ()


class GpuMetrics(_Message):
    """One GPU at one moment."""

    name: str
    utilization_percent: float | None = None
    memory_used_mib: int | None = None
    memory_total_mib: int | None = None


class JobMetrics(_Message):
    """What a job uses now. CPU time in seconds since its start, memory in MiB, both over its whole process tree."""

    at: datetime
    cpu_seconds: float
    memory_mib: float
    processes: int
    gpus: tuple[GpuMetrics, ...] = ()
