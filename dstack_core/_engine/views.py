"""From rows to what clients see."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import TypeVar
from uuid import UUID

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from dstack_core._engine.specs import stored_job, stored_run
from dstack_core._models.instances import Endpoint, InstanceRef, InstanceRequest
from dstack_core._models.offers import Offer
from dstack_core._models.runs import (
    InstanceOffer,
    InstanceResources,
    InstanceType,
    Job,
    JobProvisioningData,
    JobSpec,
    JobSubmission,
    Reason,
    Run,
    RunSpec,
    RunStatus,
    ServiceInfo,
)
from dstack_core._models.services import Service
from dstack_core._store.tables import InstanceRow, JobRow, ProjectRow, RunRow


def instance_type_of(offer: Offer) -> InstanceType:
    """The wire form of what an offer buys."""
    return InstanceType(name=offer.instance_type, resources=InstanceResources.of(offer.resources, offer.spot))


def offer_of(offer: Offer, terminates_itself: str) -> InstanceOffer:
    """The wire form of an offer."""
    return InstanceOffer(
        backend=offer.backend,
        instance=instance_type_of(offer),
        region=offer.region,
        zone=offer.zone,
        price=offer.price,
        availability=offer.availability,
        reason=offer.reason,
        terminates_itself=terminates_itself,
    )


def runs_of(session: Session, rows: Sequence[RunRow], now: datetime) -> list[Run]:
    """The runs of these rows, in their order, with three queries in all."""
    ids = [row.id for row in rows]
    jobs = _by_run(session.scalars(_JOBS, {"run_ids": ids}))
    instances = _by_run(session.scalars(_INSTANCES, {"run_ids": ids}))
    projects = {project.id: project.name for project in session.execute(_PROJECTS)}
    return [
        run_of(row, projects[row.project_id], jobs[row.id], {one.id: one for one in instances[row.id]}, now)
        for row in rows
    ]


_JOBS = (
    select(JobRow)
    .where(JobRow.run_id.in_(bindparam("run_ids", expanding=True)))
    .order_by(JobRow.run_id, JobRow.replica_num, JobRow.job_num, JobRow.attempt)
)
_INSTANCES = select(InstanceRow).where(InstanceRow.run_id.in_(bindparam("run_ids", expanding=True)))
_PROJECTS = select(ProjectRow.id, ProjectRow.name)

R = TypeVar("R", JobRow, InstanceRow)


def _by_run(rows: Iterable[R]) -> defaultdict[UUID | None, list[R]]:
    found: defaultdict[UUID | None, list[R]] = defaultdict(list)
    for row in rows:
        found[row.run_id].append(row)
    return found


def run_of(row: RunRow, project: str, jobs: Sequence[JobRow], instances: dict[UUID, InstanceRow], now: datetime) -> Run:
    """The run of a row, given the rows of its jobs, in the order of their attempts, and of its instances."""
    attempts = groupby(jobs, key=lambda job: (job.replica_num, job.job_num))
    spec = stored_run(row.spec)
    return Run(
        id=row.id,
        project_name=project,
        user=row.user,
        run_name=row.name,
        submitted_at=row.submitted_at,
        finished_at=row.finished_at,
        status=RunStatus(row.status),
        reason=Reason(row.reason) if row.reason else None,
        message=row.message,
        run_spec=spec,
        jobs=tuple(_job(list(rows), instances) for _, rows in attempts),
        cost=sum(cost_of(instance, now) for instance in instances.values()),
        version=row.version,
        service=_service(row, project, spec, jobs),
    )


def _service(row: RunRow, project: str, spec: RunSpec, jobs: Sequence[JobRow]) -> ServiceInfo | None:
    """How a service is reached, and how it does as far as the store knows."""
    service = spec.configuration
    if not isinstance(service, Service) or RunStatus(row.status).is_finished:
        return None
    latest = {job.replica_num: job for job in jobs}.values()
    return ServiceInfo(
        path=f"/services/{project}/{row.name}/",
        model=service.model.name if service.model is not None else None,
        replicas=service.replicas.min or 0,
        ready=sum(job.status == RunStatus.RUNNING.value and job.ready_at is not None for job in latest),
    )


def _job(rows: Sequence[JobRow], instances: dict[UUID, InstanceRow]) -> Job:
    spec = stored_job(rows[-1].spec)
    return Job(job_spec=spec, job_submissions=tuple(_submission(row, spec, instances) for row in rows))


def _submission(row: JobRow, spec: JobSpec, instances: dict[UUID, InstanceRow]) -> JobSubmission:
    instance = instances.get(row.instance_id) if row.instance_id is not None else None
    return JobSubmission(
        id=row.id,
        submission_num=row.attempt,
        submitted_at=row.submitted_at,
        running_at=row.running_at,
        finished_at=row.finished_at,
        status=RunStatus(row.status),
        reason=Reason(row.reason) if row.reason else None,
        message=row.message,
        exit_code=row.exit_code,
        log_lost_bytes=row.log_lost_bytes,
        ready_at=row.ready_at,
        job_provisioning_data=_provisioning_data(row, spec, instance) if instance is not None else None,
    )


def _provisioning_data(row: JobRow, spec: JobSpec, instance: InstanceRow) -> JobProvisioningData | None:
    """The instance of an attempt; `None` until the cloud has accepted it."""
    if instance.ref is None:
        return None
    ref = InstanceRef.model_validate_json(instance.ref)
    endpoint = Endpoint.model_validate_json(instance.endpoint) if instance.endpoint else None
    same_host = endpoint is not None and endpoint.unix_socket is not None
    hostname = socket.gethostname() if same_host else endpoint.ssh_host if endpoint else None
    return JobProvisioningData(
        backend=ref.backend,
        instance_type=instance_type_of(InstanceRequest.model_validate_json(instance.request).offer),
        instance_id=ref.id,
        hostname=hostname,
        region=ref.region,
        zone=ref.zone,
        price=instance.price,
        username=endpoint.ssh_user if endpoint else "root",
        ssh_port=endpoint.ssh_port if endpoint and endpoint.ssh_host else None,
        dockerized=spec.image_name is not None,
        ports={int(port): host for port, host in row.ports.items()},
        same_host_as_server=same_host,
        host_key=instance.host_key,
    )


def cost_of(instance: InstanceRow, now: datetime) -> float:
    """USD so far: price by time, from the cloud's acceptance to the confirmed end."""
    if instance.accepted_at is None or not instance.price:
        return 0.0
    seconds = ((instance.terminated_at or now) - instance.accepted_at).total_seconds()
    return instance.price * seconds / 3600
