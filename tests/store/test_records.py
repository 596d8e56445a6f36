"""Rows that are read and written without the ORM, on both databases: as exact as the ORM, and in step with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest
from sqlalchemy import Table, bindparam, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._store import records
from dstack_core._store.prepared import Prepared
from dstack_core._store.records import One
from dstack_core._store.store import Store
from dstack_core._store.tables import InstanceRow, JobRow, ProjectRow, RunRow

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 11, 30, 12, 0, 0, 123456, tzinfo=UTC)
JOB, RUN, PROJECT = UUID(int=1), UUID(int=2), UUID(int=3)
RUN_VALUES = {
    "id": RUN,
    "project_id": PROJECT,
    "user": "u",
    "name": "a-run",
    "submit_key": UUID(int=9),
    "spec": "{}",
    "status": "submitted",
    "submitted_at": NOON,
}
JOB_VALUES = {"id": JOB, "run_id": RUN, "spec": "{}", "status": "submitted", "submitted_at": NOON, "due_at": NOON}


@pytest.fixture
async def job(store: Store) -> UUID:
    """A job in the store."""

    def write(session: Session) -> None:
        session.add(ProjectRow(id=PROJECT, name="main", created_at=NOON))
        session.flush()
        records.add(session, RunRow, RUN_VALUES)
        records.add(session, JobRow, JOB_VALUES)

    await store.transact(write)
    return JOB


def plain(row: Any) -> dict[str, Any]:
    """All columns of a row of a job."""
    return {column.name: getattr(row, column.name) for column in JobRow.__table__.columns}


async def test_a_record_is_what_the_orm_reads(store: Store, job: UUID) -> None:
    """Every column, in its own type, defaults of those that were not given included."""
    record = await store.read(lambda session: plain(records.get(session, JobRow, job)))
    row = await store.read(lambda session: plain(session.get_one(JobRow, job)))
    assert record == row
    assert {name: type(value) for name, value in record.items()} == {name: type(value) for name, value in row.items()}
    assert (record["submitted_at"], record["tried"], record["ports"], record["lease_token"]) == (NOON, [], {}, 0)


async def test_what_was_changed_on_a_record_is_written_when_the_function_returns(store: Store, job: UUID) -> None:
    """All kinds of values; and nothing else than what was changed."""

    def change(session: Session) -> None:
        row = records.get(session, JobRow, job)
        assert row is not None
        row.status, row.exit_code, row.tried, row.ports = "running", 3, [["aws", "x", "r", None, True]], {"80": 8080}
        row.running_at, row.instance_id, row.message = NOON, UUID(int=7), 'it said "ü"'

    await store.transact(change)
    row = await store.read(lambda session: session.get_one(JobRow, job))
    assert (row.status, row.exit_code, row.ports, row.running_at) == ("running", 3, {"80": 8080}, NOON)
    assert (row.tried, row.instance_id, row.message) == ([["aws", "x", "r", None, True]], UUID(int=7), 'it said "ü"')
    assert row.spec == "{}"


async def test_a_transaction_that_raises_writes_no_record(store: Store, job: UUID) -> None:
    """Flushed or not."""

    def change(session: Session) -> None:
        row = records.get(session, JobRow, job)
        assert row is not None
        row.status = "running"
        session.flush()
        row.status = "done"
        raise KeyError("no")

    with pytest.raises(KeyError):
        await store.transact(change)
    assert (await store.read(lambda session: session.get_one(JobRow, job))).status == "submitted"


async def test_the_orm_sees_what_was_changed_on_a_record(store: Store, job: UUID) -> None:
    """A query of the ORM in the same transaction writes records first; and a record sees what the ORM wrote."""

    def change(session: Session) -> tuple[str, str]:
        row = records.get(session, JobRow, job)
        assert row is not None
        row.status = "running"
        through_orm = session.scalars(select(JobRow.status).where(JobRow.id == job)).one()
        run = session.get_one(RunRow, RUN)
        run.status = "running"
        again = records.get(session, RunRow, RUN)
        assert again is not None
        return through_orm, again.status

    assert await store.transact(change) == ("running", "running")


async def test_one_transaction_has_one_record_of_a_row(store: Store, job: UUID) -> None:
    """Whoever reads it again goes on with the same, brought up to date."""
    again = One(JobRow, JobRow.id == bindparam("row_id"), lock=True)
    jobs = cast("Table", JobRow.__table__)
    raised = Prepared(update(jobs).where(jobs.c.id == bindparam("row_id")).values(lease_token=5))

    def change(session: Session) -> None:
        row = records.get(session, JobRow, job)
        assert row is not None
        row.status = "running"
        assert records.get(session, JobRow, job) is row
        assert raised.change(session, {"row_id": job}) == 1
        assert again.read(session, {"row_id": job}) is row
        assert (row.status, row.lease_token) == ("running", 5)

    await store.transact(change)


async def test_what_is_not_there_is_none(store: Store, job: UUID) -> None:
    """No error: it may have been removed."""
    assert await store.read(lambda session: records.get(session, InstanceRow, job)) is None


async def test_a_violated_constraint_is_the_error_of_sqlalchemy(store: Store, job: UUID) -> None:
    """As every caller of the store expects it; without the values."""
    with pytest.raises(IntegrityError) as caught:
        await store.transact(lambda session: records.add(session, RunRow, {**RUN_VALUES, "id": job, "spec": "secret"}))
    assert "secret" not in str(caught.value)


async def test_a_reader_cannot_change_a_record(store: Store, job: UUID) -> None:
    """As with rows of the ORM: writing is a mistake, and says so."""

    def change(session: Session) -> None:
        row = records.get(session, JobRow, job)
        assert row is not None
        row.status = "done"

    with pytest.raises(RuntimeError, match="changes rows"):
        await store.read(change)


async def test_a_record_does_not_outgrow_its_transaction(store: Store, job: UUID) -> None:
    """What was read stays readable afterwards; changes to it go nowhere."""
    row = await store.transact(lambda session: records.get(session, JobRow, job))
    assert row is not None
    row.status = "done"
    assert (await store.read(lambda session: session.get_one(JobRow, job))).status == "submitted"
