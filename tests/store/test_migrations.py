"""The tables' history: migrations make what the tables say, keep what there was, and happen wholly or not at all."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import inspect, select, text
from sqlalchemy.orm import Session

from dstack_core._store import StoreError, migrations, schema
from dstack_core._store.databases import open_database
from dstack_core._store.migrations import upgrade as upgrading
from dstack_core._store.store import Store
from dstack_core._store.tables import Base, ProjectRow, RunRow, UtcDateTime
from dstack_core.errors import ConfigurationError

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def shape(url: str) -> dict[str, Any]:
    """Returns all that a database says about its tables."""
    database = open_database(url, None)
    with database.reader.connect() as connection:
        inspector = inspect(connection)
        found = {
            name: (
                {column["name"]: normal(column) for column in inspector.get_columns(name)},
                inspector.get_pk_constraint(name)["constrained_columns"],
                sorted(plain(key) for key in inspector.get_foreign_keys(name)),
                sorted(plain(index) for index in inspector.get_indexes(name)),
                sorted(plain(constraint) for constraint in inspector.get_unique_constraints(name)),
            )
            for name in inspector.get_table_names()
        }
    database.dispose()
    return found


def plain(value: Any) -> str:
    """Returns a description without the identities of objects."""
    if isinstance(value, dict):
        return str({key: plain(value[key]) for key in sorted(value)})
    return str(value)


def normal(column: Any) -> tuple[str, ...]:
    """Returns what matters of a column."""
    return (str(column["type"]), str(column["nullable"]), str(column["default"]), str(column.get("autoincrement")))


def close(store: Store) -> None:
    """Closes from outside of any event loop."""
    asyncio.run(store.close())


def migrate(url: str, target: str) -> None:
    """Brings a database to a revision by migrations alone."""
    database = open_database(url, None)
    with database.writer.connect() as connection:
        database.lock_schema(connection)
        upgrading.upgrade(connection, target)
        connection.commit()
    database.dispose()


def test_migrations_make_what_the_tables_say(blank_store_url: str) -> None:
    """A database made by migrations is the same as one made at once."""
    migrate(blank_store_url, migrations.HEAD)
    by_migrations = shape(blank_store_url)
    assert {"runs", "jobs", "instances", migrations.VERSION_TABLE} <= by_migrations.keys()
    clear(blank_store_url)
    close(Store.open(blank_store_url))
    assert shape(blank_store_url) == by_migrations


def clear(url: str) -> None:
    """Removes all tables."""
    database = open_database(url, None)
    with database.writer.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text(f"DROP TABLE {migrations.VERSION_TABLE}"))
    database.dispose()
    assert shape(url) == {}


def test_the_list_of_revisions_is_that_of_the_files(tmp_path: Path) -> None:
    """`REVISIONS`, which start-up reads, names the files, in their order."""
    database = open_database(None, tmp_path / "x.db")
    with database.reader.connect() as connection:
        assert upgrading.revisions(connection) == migrations.REVISIONS
    database.dispose()


def test_check_finds_no_difference() -> None:
    """`python -m dstack_core._store.migrations check` agrees that nothing is missing."""
    command = [sys.executable, "-m", "dstack_core._store.migrations", "check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


NEXT = '''
"""A change for a test."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    with op.batch_alter_table("projects") as batch_op:
        batch_op.alter_column("name", existing_type=sa.String(64), type_=sa.Text(), existing_nullable=False)
        batch_op.add_column(sa.Column("colour", sa.Text(), nullable=False, server_default="grey"))
    {more}
'''


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The migrations of a later version, which makes SQLite rebuild `projects`. Not in force before `release`."""
    scripts = tmp_path / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    write_next(scripts)
    return scripts


def write_next(scripts: Path, more: str = "") -> None:
    """Writes the migration of the later version."""
    (scripts / "versions" / "9999_next.py").write_text(NEXT.format(head=migrations.HEAD, more=more))


def release(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this code that of the later version."""
    monkeypatch.setattr(upgrading, "SCRIPTS", scripts)
    monkeypatch.setattr(upgrading, "HEAD", "9999")
    monkeypatch.setattr(schema, "HEAD", "9999")
    monkeypatch.setattr(schema, "REVISIONS", (*migrations.REVISIONS, "9999"))


def fill(session: Session) -> None:
    """Writes a project, and a run that depends on it."""
    project = ProjectRow(id=uuid4(), name="main", created_at=NOON)
    session.add(project)
    session.flush()
    session.execute(
        RunRow.__table__.insert().values(  # type: ignore[attr-defined]  # declared as FromClause
            {column.name: sample(column, project) for column in RunRow.__table__.columns if not column.nullable}
        )
    )


def sample(column: Any, project: ProjectRow) -> Any:
    """Returns a value for a column of any type, whatever columns the table has by now."""
    if column.foreign_keys:
        return project.id
    samples = {"UUID": uuid4(), "dict": {}, "list": [], "bool": False, "str": "1", "int": 1}
    return NOON if isinstance(column.type, UtcDateTime) else samples[column.type.python_type.__name__]


def test_an_older_database_is_migrated_with_its_rows(
    store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening with a later version changes the tables and keeps every row, those that depend on a rebuilt one, too."""
    store = Store.open(store_url)
    asyncio.run(store.transact(fill))
    close(store)
    release(next_version, monkeypatch)
    for _ in range(2):
        store = Store.open(store_url)
        rows = asyncio.run(store.read(lambda session: session.execute(text("SELECT name, colour FROM projects")).all()))
        runs = asyncio.run(store.read(lambda session: len(session.execute(select(RunRow.id)).all())))
        close(store)
        assert (rows, runs) == ([("main", "grey")], 1)


def test_foreign_keys_hold_after_a_migration(
    store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a migration switched off is on again in the store that it returns."""
    store = Store.open(store_url)
    asyncio.run(store.transact(fill))
    close(store)
    release(next_version, monkeypatch)
    store = Store.open(store_url)
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        asyncio.run(store.transact(lambda session: session.execute(text("DELETE FROM projects"))))
    close(store)


def test_a_migration_that_fails_changes_nothing(
    store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration happens wholly or not at all, on both databases: the older version can still use the database."""
    store = Store.open(store_url)
    asyncio.run(store.transact(fill))
    close(store)
    before = shape(store_url)
    write_next(next_version, more="raise RuntimeError('power failure')")
    with monkeypatch.context() as later:
        release(next_version, later)
        with pytest.raises(RuntimeError, match="power failure"):
            Store.open(store_url)
    assert shape(store_url) == before
    close(Store.open(store_url))


def test_a_migration_that_cannot_work_is_explained(
    store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the database refuses in a migration is said, with what still works."""
    close(Store.open(store_url))
    write_next(next_version, more="op.execute('SELECT nonsense FROM nowhere')")
    with monkeypatch.context() as later:
        release(next_version, later)
        with pytest.raises(StoreError, match=r"cannot be migrated .* to 9999 .*nowhere.*Nothing was changed"):
            Store.open(store_url)
    close(Store.open(store_url))


def test_rows_without_parents_are_not_left_behind(
    store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that breaks references is refused and undone."""
    store = Store.open(store_url)
    asyncio.run(store.transact(fill))
    close(store)
    before = shape(store_url)
    write_next(next_version, more="op.execute('DELETE FROM projects')")
    with monkeypatch.context() as later:
        release(next_version, later)
        with pytest.raises(StoreError, match="Nothing was changed"):
            Store.open(store_url)
    assert shape(store_url) == before


def test_a_newer_database_is_refused(store_url: str, next_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that a later version has used is left alone; the error says what to upgrade."""
    with monkeypatch.context() as later:
        release(next_version, later)
        close(Store.open(store_url))
    with pytest.raises(
        ConfigurationError, match=r"newer dstack-core \(tables 9999, this one knows up to .*pip install --upgrade"
    ):
        Store.open(store_url)
