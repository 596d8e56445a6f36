"""What the store says about services: which there are, and how their replicas stand. Functions of a session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, bindparam, func, select
from sqlalchemy.orm import Session, aliased

from dstack_core._engine.booting import way_to
from dstack_core._engine.specs import stored_job, stored_run
from dstack_core._models.instances import Endpoint
from dstack_core._models.runs import JobSpec, RunStatus
from dstack_core._models.services import OpenAIChatModel, ProbeConfig, Service
from dstack_core._store.tables import InstanceRow, JobRow, ProjectRow, RunRow

_FINISHED = [status.value for status in RunStatus if status.is_finished]


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """What does not change about a service. `model_prefix` is where it speaks OpenAI's protocol, as `/v1`."""

    run_id: UUID
    project: str
    name: str
    auth: bool
    strip_prefix: bool
    model: str | None
    model_prefix: str
    replicas: int


@dataclass(frozen=True, slots=True)
class RunningReplica:
    """A replica that runs, and at which port of its machine; `where` is that for people.

    `proven`: that it was ready once is written down.
    """

    job_id: UUID
    number: int
    endpoint: Endpoint
    port: int
    where: str
    probes: tuple[ProbeConfig, ...]
    proven: bool


@dataclass(frozen=True, slots=True)
class ServiceState:
    """A service as it stands. `others` says of each replica that does not run what it does instead, by its number."""

    facts: ServiceFacts
    version: int
    running: tuple[RunningReplica, ...]
    others: Mapping[int, str]


# A task's jobs say that they have no such port. The text of a job's spec cannot hold these words in any other place:
# in a string, its quotes would be escaped.
_VERSIONS = (
    select(RunRow.id, RunRow.version)
    .join(JobRow, JobRow.run_id == RunRow.id)
    .where(JobRow.due_at.is_not(None), JobRow.spec.not_like('%"service_port":null%'))
    .distinct()
)
_RUNS = (
    select(RunRow.id, RunRow.name, ProjectRow.name.label("project"), RunRow.spec, RunRow.version)
    .join(ProjectRow, ProjectRow.id == RunRow.project_id)
    .where(
        RunRow.id.in_(bindparam("run_ids", expanding=True)),
        RunRow.status.not_in(_FINISHED),
        RunRow.deleted_at.is_(None),
    )
)
_LATER = aliased(JobRow)
_LATEST = (
    select(func.max(_LATER.attempt))
    .where(_LATER.run_id == JobRow.run_id, _LATER.replica_num == JobRow.replica_num, _LATER.job_num == JobRow.job_num)
    .scalar_subquery()
)
_JOBS = (
    select(
        JobRow.id,
        JobRow.run_id,
        JobRow.replica_num,
        JobRow.status,
        JobRow.ports,
        JobRow.message,
        JobRow.spec,
        JobRow.ready_at,
        InstanceRow.endpoint,
        InstanceRow.host_key,
    )
    .outerjoin(InstanceRow, InstanceRow.id == JobRow.instance_id)
    .where(JobRow.run_id.in_(bindparam("run_ids", expanding=True)), JobRow.attempt == _LATEST)
    .order_by(JobRow.replica_num)
)


def service_versions(session: Session) -> dict[UUID, int]:
    """The services that have not ended, and the version of each."""
    return {row.id: row.version for row in session.execute(_VERSIONS)}


def services_of(session: Session, run_ids: Collection[UUID]) -> dict[UUID, ServiceState]:
    """Those of these runs that are services and have not ended."""
    runs = session.execute(_RUNS, {"run_ids": list(run_ids)})
    found = {row.id: (facts, row.version) for row in runs if (facts := _facts(row))}
    jobs: defaultdict[UUID, list[Row[Any]]] = defaultdict(list)
    for job in session.execute(_JOBS, {"run_ids": list(found)}) if found else ():
        jobs[job.run_id].append(job)
    return {run_id: _state(facts, version, jobs[run_id]) for run_id, (facts, version) in found.items()}


def _facts(row: Row[UUID, str, str, str, int]) -> ServiceFacts | None:
    configuration = stored_run(row.spec).configuration
    if not isinstance(configuration, Service):
        return None
    model = configuration.model
    return ServiceFacts(
        run_id=row.id,
        project=row.project,
        name=row.name,
        auth=configuration.auth,
        strip_prefix=configuration.strip_prefix,
        model=model.name if model is not None else None,
        model_prefix=model.prefix if isinstance(model, OpenAIChatModel) else "/v1",
        replicas=configuration.replicas.min or 0,
    )


def _state(facts: ServiceFacts, version: int, jobs: Sequence[Row[Any]]) -> ServiceState:
    running, others = [], {}
    for job in jobs:
        replica = _running(job)
        if replica is not None:
            running.append(replica)
        else:
            others[job.replica_num] = f"{job.status}{f': {job.message}' if job.message else ''}"
    return ServiceState(facts, version, tuple(running), others)


def _running(job: Row[Any]) -> RunningReplica | None:
    if job.status != RunStatus.RUNNING.value or job.endpoint is None:
        return None
    spec = stored_job(job.spec)
    own = spec.service_port or 0
    port = int(job.ports.get(str(own), own))
    return RunningReplica(
        job_id=job.id,
        number=job.replica_num,
        endpoint=way_to(Endpoint.model_validate_json(job.endpoint), job.host_key),
        port=port,
        where=where_of(spec, port),
        probes=spec.probes,
        proven=job.ready_at is not None,
    )


def where_of(spec: JobSpec, port: int) -> str:
    """For people: the port of a replica, and how it comes to be that one, given that of the machine."""
    if port == spec.service_port:
        return f"port {port}"
    if spec.image_name is not None:
        return f"port {spec.service_port} of its container (port {port} of the machine)"
    return f"port {port}, where it is to listen as its variable PORT says"
