"""Runs, their jobs and attempts, as client and server exchange them."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from dstack_core._models.configurations import AnyConfiguration, AppSpec
from dstack_core._models.offers import Availability, MachineResources, Requirements
from dstack_core._models.profiles import Profile, RetryPolicy
from dstack_core._models.repos import RemoteRunRepoData
from dstack_core._models.services import ProbeConfig


class RunStatus(str, Enum):
    """Where a run (or one attempt of one job) stands.

    The last four are final.

    Attributes:
        PENDING: waits until it is tried again.
        SUBMITTED: accepted; a machine is being looked for.
        PROVISIONING: the machine is being made, or its agent starts.
        PULLING: the container image is being fetched.
        RUNNING: the job's commands run.
        TERMINATING: was asked to end, and has not yet.
        TERMINATED: stopped by a person, or by a time limit.
        ABORTED: killed by a person, with `abort=True`.
        FAILED: ended badly; the run's message says why.
        DONE: ended with exit code 0.
    """

    PENDING = "pending"
    SUBMITTED = "submitted"
    PROVISIONING = "provisioning"
    PULLING = "pulling"
    RUNNING = "running"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    ABORTED = "aborted"
    FAILED = "failed"
    DONE = "done"

    @property
    def is_finished(self) -> bool:
        """True for the final statuses: terminated, aborted, failed, done."""
        return self in _FINISHED


_FINISHED = frozenset({RunStatus.TERMINATED, RunStatus.ABORTED, RunStatus.FAILED, RunStatus.DONE})


class Reason(str, Enum):
    """Why an attempt ended, or why it is where it is. The values of the 0.13.0 API keep their spelling.

    Attributes:
        NO_CAPACITY: no backend had a machine for it.
        INTERRUPTED: the cloud took its spot instance away.
        WAITING_RUNNER_LIMIT: its machine started, and nothing on it could be reached in time.
        TERMINATED_BY_USER: a person stopped it.
        ABORTED_BY_USER: a person killed it, with `abort=True`.
        EXITED_WITH_ERROR: its commands ended with another exit code than 0.
        PORTS_BINDING_FAILED: a port that it needs was taken on its machine.
        MAX_DURATION_EXCEEDED: it ran for longer than `max_duration`.
        AGENT_LOST: nothing was heard from its machine any more.
        INSTANCE_LOST: its machine is gone.
        START_FAILED: its commands could not be started.
        BACKEND_ERROR: the backend refused; the message has its words.
        LOG_FAILED: its output could not be kept.
        INACTIVE: nobody used the dev environment for `inactivity_duration`.
    """

    NO_CAPACITY = "failed_to_start_due_to_no_capacity"
    INTERRUPTED = "interrupted_by_no_capacity"
    WAITING_RUNNER_LIMIT = "waiting_runner_limit_exceeded"
    TERMINATED_BY_USER = "terminated_by_user"
    ABORTED_BY_USER = "aborted_by_user"
    EXITED_WITH_ERROR = "container_exited_with_error"
    PORTS_BINDING_FAILED = "ports_binding_failed"
    MAX_DURATION_EXCEEDED = "max_duration_exceeded"
    AGENT_LOST = "agent_lost"
    INSTANCE_LOST = "instance_lost"
    START_FAILED = "failed_to_start"
    BACKEND_ERROR = "backend_error"
    LOG_FAILED = "log_failed"
    INACTIVE = "inactivity_duration_exceeded"


class _Wire(BaseModel):
    # "ignore": a newer server may say more than this client knows.
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class RunSpec(_Wire):
    """All that a user asked for, as one document.

    `profile` holds what was passed beside the configuration (`backends=`, `resources=`, `spot_policy=`, …); it wins
    over the same field of the configuration.
    """

    run_name: str | None = None
    repo_id: str = "none"
    repo_data: dict[str, Any] = Field(default_factory=lambda: {"repo_type": "virtual"})
    repo_code_hash: str | None = None
    working_dir: str = "."
    configuration_path: str = "(python)"
    configuration: AnyConfiguration = Field(discriminator="type")
    profile: Profile
    ssh_key_pub: str | None = None


class JobSpec(_Wire):
    """What one job runs, worked out from the run's configuration.

    Attributes:
        job_num: number of the node within its replica, from 0.
        replica_num: number of the replica, from 0.
        job_name: `RUN-REPLICA-NODE`.
        app_specs: the ports to forward on attach.
        commands: shell commands, run in order until one fails; with an `entrypoint`, its arguments. Empty: the
            image's own command.
        shell: what runs the commands; `None` for bash where there is one, else sh.
        env: environment of the job. Secret: never logged, never put in a process list.
        image_name: container image, or `None` for processes on the machine.
        python: version for a fresh environment, or `None`.
        max_duration: seconds, or `None` for no limit.
        stop_duration: seconds between the polite stop and the kill.
        backends: the backends it may run on; empty means all that are configured.
        working_dir: where the commands run, absolute or below the job's folder.
        repo_id: the git repository to clone into the job's folder, as the server knows it; `None` for none.
        repo_data: with `repo_id`, what to check out.
        code_hash: the `CodeManifest` to lay into the job's folder; `None` for none.
        ssh_key_pub: the user's public key, which the machine lets in as well; `None` for none.
        service_port: the port of a replica, which is probed and gets traffic; `None` for what is no service.
        probes: how it is found out whether a replica is ready.
        replicas: of a service: how many there are.
        inactivity_duration: seconds after which a dev environment ends that nobody uses; `None` for never.
        ide: of a dev environment.
    """

    job_num: int = 0
    replica_num: int = 0
    job_name: str
    app_specs: tuple[AppSpec, ...] = ()
    commands: tuple[str, ...] = ()
    shell: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    home_dir: str | None = None
    image_name: str | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str | None = None
    privileged: bool = False
    python: str | None = None
    registry_username: str | None = None
    registry_password: str | None = None
    max_duration: int | None = None
    stop_duration: int = 15
    requirements: Requirements
    backends: tuple[str, ...] = ()
    retry_policy: RetryPolicy = RetryPolicy()
    working_dir: str | None = None
    repo_id: str | None = None
    repo_data: RemoteRunRepoData | None = None
    code_hash: str | None = None
    ssh_key_pub: str | None = None
    service_port: int | None = None
    probes: tuple[ProbeConfig, ...] = ()
    replicas: int = 1
    inactivity_duration: int | None = None
    ide: str | None = None


class InstanceType(_Wire):
    """Name and contents of a kind of machine.

    Attributes:
        name: the cloud's own name.
        resources: what it has.
    """

    name: str
    resources: InstanceResources


class InstanceResources(_Wire):
    """What a machine has: `spot` and a one-line `description` included.

    Attributes:
        cpus: CPUs; may be a fraction.
        memory_mib: memory, in MiB.
        disk_mib: disk, in MiB.
        gpus: one entry for each GPU.
        spot: whether the cloud may take it away.
        arch: `"x86"` or `"arm"`.
    """

    cpus: float
    memory_mib: int
    disk_mib: int = 0
    gpus: tuple[InstanceGpu, ...] = ()
    spot: bool = False
    arch: str = "x86"

    @classmethod
    def of(cls, resources: MachineResources, spot: bool) -> InstanceResources:
        """The wire form of a backend's `MachineResources`."""
        gpus = tuple(InstanceGpu(name=g.name, memory_mib=g.memory_mib, vendor=g.vendor) for g in resources.gpus)
        return cls(
            cpus=resources.cpus,
            memory_mib=resources.memory_mib,
            disk_mib=resources.disk_mib,
            gpus=gpus,
            spot=spot,
            arch=resources.arch,
        )

    @property
    def description(self) -> str:
        """For people: `4 CPUs, 16GB, 1xL4 (24GB), 100GB disk, spot`."""
        parts = [f"{self.cpus:g} CPUs", _gb(self.memory_mib)]
        parts += [f"{self.gpus.count(gpu)}x{gpu.name} ({_gb(gpu.memory_mib)})" for gpu in dict.fromkeys(self.gpus)]
        if self.disk_mib:
            parts.append(f"{_gb(self.disk_mib)} disk")
        return ", ".join([*parts, *(["spot"] if self.spot else [])])


def _gb(mib: int) -> str:
    return f"{round(mib / 1024, 1):g}GB"


class InstanceGpu(_Wire):
    """One GPU of a machine.

    Attributes:
        name: upper-case, without vendor and memory, as `"A100"`.
        memory_mib: its memory, in MiB.
        vendor: `"nvidia"`, `"amd"`, `"google"`, `"intel"` or `"tenstorrent"`.
    """

    name: str
    memory_mib: int
    vendor: str = "nvidia"


class InstanceOffer(_Wire):
    """One offer of a plan: where, what, at which price.

    Attributes:
        backend: name of the backend.
        instance: the machine.
        region: the cloud's own name of the region.
        zone: the zone, or `None` when the backend chooses one or has none.
        price: USD per hour, all in.
        availability: `"available"`, `"unknown"`, `"no_capacity"` or `"no_quota"`.
        reason: for an offer that is not available, why, for people.
        terminates_itself: what ends the machine if every server dies: `"agent"`, `"cloud"`, or `"nobody"`.
    """

    backend: str
    instance: InstanceType
    region: str
    zone: str | None = None
    price: float
    availability: Availability = Availability.UNKNOWN
    reason: str | None = None
    terminates_itself: str = "agent"


class JobPlan(_Wire):
    """One job of a plan and where it could run: at most 50 offers, cheapest first, unavailable ones last.

    Attributes:
        job_spec: what the job runs.
        offers: where it could run.
        total_offers: how many offers match in all.
        notes: per backend, what is missing and why, for people.
    """

    job_spec: JobSpec
    offers: tuple[InstanceOffer, ...] = ()
    total_offers: int = 0
    notes: tuple[str, ...] = ()


class RunPlan(_Wire):
    """What would happen if the run were submitted now.

    Attributes:
        project_name: the project.
        user: who would submit it.
        run_spec: what would be submitted.
        job_plans: one for each job of the run.
    """

    project_name: str
    user: str
    run_spec: RunSpec
    job_plans: tuple[JobPlan, ...]


class JobProvisioningData(_Wire):
    """The instance of an attempt.

    `ports` maps a port of the job to the port on `hostname` where it can be reached; filled in when the job runs.
    `same_host_as_server` is true when the instance is the server's own computer. `host_key` is what a machine that is
    reached over SSH proves itself with, as `ssh-ed25519 AAAA...`.
    """

    backend: str
    instance_type: InstanceType
    instance_id: str | None = None
    hostname: str | None = None
    region: str
    zone: str | None = None
    price: float = 0.0
    username: str = "root"
    ssh_port: int | None = None
    dockerized: bool = False
    ports: dict[int, int] = Field(default_factory=dict)
    same_host_as_server: bool = False
    host_key: str | None = None


class JobSubmission(_Wire):
    """One attempt of a job.

    Attributes:
        reason: why it ended, machine-readable; `None` while it goes on or after success.
        message: the same for people, with what to do.
        exit_code: of the job's main process; `None` while it runs; 128 + N when signal N ended it.
        log_lost_bytes: bytes of output that could not be kept (full disk, or the size cap).
        ready_at: when a replica of a service first answered as its probes want it; `None` before that.
    """

    id: UUID
    submission_num: int
    submitted_at: datetime
    running_at: datetime | None = None
    finished_at: datetime | None = None
    status: RunStatus
    reason: Reason | None = None
    message: str | None = None
    exit_code: int | None = None
    log_lost_bytes: int = 0
    ready_at: datetime | None = None
    job_provisioning_data: JobProvisioningData | None = None


class Job(_Wire):
    """One job of a run with all its attempts, oldest first."""

    job_spec: JobSpec
    job_submissions: tuple[JobSubmission, ...]


class ServiceInfo(_Wire):
    """How a service is reached, and how it does.

    Attributes:
        path: on the server, as `/services/main/my-service/`.
        model: name of the model that it offers in OpenAI's protocol, under `/models/PROJECT/`.
        replicas: how many are wanted.
        ready: how many answer.
        problem: what keeps the others from being ready: what was probed and what came of it. `None` if all is well.
    """

    path: str
    model: str | None = None
    replicas: int = 1
    ready: int = 0
    problem: str | None = None


class Run(_Wire):
    """A run as the server knows it. `version` grows with every visible change, for long-polling.

    `service` is set for a service that has not ended.
    """

    id: UUID
    project_name: str
    user: str
    run_name: str
    submitted_at: datetime
    finished_at: datetime | None = None
    status: RunStatus
    reason: Reason | None = None
    message: str | None = None
    run_spec: RunSpec
    jobs: tuple[Job, ...] = ()
    cost: float = 0.0
    version: int = 0
    service: ServiceInfo | None = None

    @property
    def latest_job_submission(self) -> JobSubmission | None:
        """The latest attempt of the first job."""
        return self.jobs[0].job_submissions[-1] if self.jobs and self.jobs[0].job_submissions else None
