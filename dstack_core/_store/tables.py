"""The tables. A row of `instances` is an intent, from before the first call to the cloud to its confirmed end."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    DateTime,
    Double,
    ForeignKey,
    Index,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC, on every database. A naive one is a bug and refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Converts to UTC on the way in."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}: all times are aware")
        return value.astimezone(UTC).replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # its signature
        """Marks as UTC what a database without time zones gives back."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Base of all tables. Constraint names are fixed so that migrations can name them."""

    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy reads it as a class attribute
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
        list[Any]: JSON,
        float: Double,
        str: Text,
        UUID: Uuid,
    }


Base.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Leased:
    """What the reconciler needs on a row: when it is due, and who works on it.

    `lease_token` is the fencing token: it grows with each taking, and a result is written only where it still holds.
    """

    due_at: Mapped[datetime | None] = mapped_column(index=True)
    lease_owner: Mapped[str | None]
    lease_token: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]


class MetaRow(Base):
    """Facts about this database: `owner` is the id under which its instances are marked."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str]


class ProjectRow(Base):
    """A project: the name space of runs."""

    __tablename__ = "projects"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]


class RepoRow(Base):
    """A repo that was initialised. `credentials` is encrypted."""

    __tablename__ = "repos"
    __table_args__ = (UniqueConstraint("project_id", "repo_id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    repo_id: Mapped[str] = mapped_column(String(128))
    repo_data: Mapped[str]
    credentials: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class RunRow(Base):
    """A run. Its status is worked out from the latest attempts of its jobs whenever one of them changes."""

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("project_id", "submit_key"),
        Index(
            "uq_runs_active_name",
            "project_id",
            "name",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index("ix_runs_project_submitted", "project_id", "submitted_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    user: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    submit_key: Mapped[UUID]
    spec: Mapped[str]
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None]
    message: Mapped[str | None]
    stop: Mapped[str | None] = mapped_column(String(16))
    """What the user asked for: `None`, `"stop"` or `"abort"`."""
    version: Mapped[int] = mapped_column(default=0)
    submitted_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class JobRow(Leased, Base):
    """One attempt of one job."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("run_id", "replica_num", "job_num", "attempt"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"), index=True)
    replica_num: Mapped[int] = mapped_column(default=0)
    job_num: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    spec: Mapped[str]
    status: Mapped[str] = mapped_column(String(16))
    stop: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str | None]
    message: Mapped[str | None]
    exit_code: Mapped[int | None]
    tried: Mapped[list[Any]] = mapped_column(default=list)
    """Offers of this attempt that were refused: `[[backend, instance type, region, zone, spot], …]`."""
    instance_id: Mapped[UUID | None] = mapped_column(index=True)
    ports: Mapped[dict[str, Any]] = mapped_column(default=dict)
    log_bytes: Mapped[int] = mapped_column(default=0)
    log_lost_bytes: Mapped[int] = mapped_column(default=0)
    submitted_at: Mapped[datetime]
    given_at: Mapped[datetime | None]
    """When a job with code was about to be given to its agent: from here on it may have run."""
    running_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    retry_since: Mapped[datetime | None]
    """When the first attempt in this row of failures failed: the start of the retry policy's limit."""
    ready_at: Mapped[datetime | None]
    """When a replica of a service first answered its probes."""
    unready_failures: Mapped[int] = mapped_column(default=0, server_default="0")
    """How many attempts in a row, before this one, ended without having been ready."""


class InstanceRow(Leased, Base):
    """An intent, and the instance that it became. `id` is the intent."""

    __tablename__ = "instances"
    __table_args__ = (Index("ix_instances_backend_status", "backend", "status"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID | None] = mapped_column(index=True)
    run_id: Mapped[UUID | None]
    backend: Mapped[str] = mapped_column(String(64))
    region: Mapped[str]
    zone: Mapped[str | None]
    status: Mapped[str] = mapped_column(String(16))
    wanted: Mapped[bool] = mapped_column(default=True)
    """False as soon as nobody needs it: it is then terminated, whatever its status."""
    request: Mapped[str]
    """The rendered `InstanceRequest`, replayed byte for byte."""
    request_hash: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(40), unique=True)
    price: Mapped[float] = mapped_column(default=0.0)
    ref: Mapped[str | None]
    endpoint: Mapped[str | None]
    host_key: Mapped[str | None]
    """With which its machine proves itself, once it has made a key of its own: `ssh-ed25519 AAAA...`."""
    error: Mapped[str | None]
    """Name of the error class of a definite failure."""
    error_scope: Mapped[str | None]
    message: Mapped[str | None]
    create_calls: Mapped[int] = mapped_column(default=0)
    last_create_at: Mapped[datetime | None]
    misses: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    """Calls in a row that failed, for the length of the pause."""
    unlisted: Mapped[int] = mapped_column(default=0, server_default="0")
    """Rounds of the sweeper in a row whose listing did not have it, though it runs."""
    created_at: Mapped[datetime]
    accepted_at: Mapped[datetime | None]
    running_at: Mapped[datetime | None]
    terminating_at: Mapped[datetime | None]
    terminated_at: Mapped[datetime | None]


class SweepRow(Base):
    """Which server looks through a backend for instances that nobody claims, and what the last round came to."""

    __tablename__ = "sweeps"

    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    lease_owner: Mapped[str | None]
    lease_token: Mapped[int] = mapped_column(default=0)
    """The fencing token: what a round found is written only where it still holds."""
    lease_until: Mapped[datetime | None]
    whole_until: Mapped[datetime | None]
    """No intent older than this was ever lost: a round looked, and knew everything that it was shown."""
    swept_at: Mapped[datetime | None]
    problem: Mapped[str | None]


class OrphanRow(Base):
    """An instance that nobody claims: written down before its end is asked for, which is repeated until it is gone."""

    __tablename__ = "orphans"

    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    instance_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    """The cloud's own id."""
    ref: Mapped[str]
    intent: Mapped[UUID]
    reason: Mapped[str]
    found_at: Mapped[datetime]
    message: Mapped[str | None]
    """What came of asking for its end the last time."""
    gone_at: Mapped[datetime | None] = mapped_column(index=True)


class ShortageRow(Base):
    """What a cloud said it has none of, or may not give us more of. An empty column stands for all."""

    __tablename__ = "shortages"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`"capacity"`, or `"quota"`: then `machine` is a family of instance types."""
    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    region: Mapped[str] = mapped_column(String(128), primary_key=True)
    zone: Mapped[str] = mapped_column(String(128), primary_key=True)
    machine: Mapped[str] = mapped_column(String(128), primary_key=True)
    market: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`"spot"` or `"on-demand"`."""
    times: Mapped[int] = mapped_column(default=1)
    """How often in a row it was said."""
    since: Mapped[datetime]
    """When it was said last."""
    again_at: Mapped[datetime]
    """From then on it is tried if nothing else is left."""
    until: Mapped[datetime]
    message: Mapped[str]


class EventRow(Base):
    """The engine's own account of a run, one line each: what `run.logs(diagnose=True)` shows."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[UUID] = mapped_column(index=True)
    job_id: Mapped[UUID | None]
    at: Mapped[datetime]
    text: Mapped[str]
