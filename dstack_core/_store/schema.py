"""Brings a database to this version's tables: made at once when it is empty, migrated when it is older.

Alembic is imported for a migration only: it would double the time that a server needs to start.
"""

from __future__ import annotations

import time

from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, String, Table, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from dstack_core._store import StoreDamaged, StoreError, StoreUnavailable
from dstack_core._store.databases import Database, Trouble
from dstack_core._store.migrations import HEAD, REVISIONS, VERSION_TABLE
from dstack_core._store.tables import Base
from dstack_core.errors import ConfigurationError

_VERSION = Table(
    VERSION_TABLE,
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)

PATIENCE = 60.0
"""Seconds to wait for another process that makes or changes the tables."""


def prepare(database: Database) -> None:
    """Makes the tables what this version needs, once, however many processes try at the same time.

    Raises:
        ConfigurationError: the database is of a newer version, or of another program.
        StoreError: a migration failed; nothing was changed.
        StoreDamaged: it is not a database.
        StoreUnavailable: it does not answer.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _prepare(database)
        except DBAPIError as error:
            trouble = database.trouble(error)
            if trouble is not Trouble.AGAIN or time.monotonic() > deadline:
                raise opening_error(database, error, trouble) from None
        time.sleep(0.02)


def opening_error(database: Database, error: DBAPIError, trouble: Trouble) -> Exception:
    """Returns what to tell a person when the database cannot be opened."""
    words = database.scrub(error)
    match trouble:
        case Trouble.DAMAGED:
            return StoreDamaged(
                f"{database.place} is damaged, or no database at all ({words}). Restore a copy of it; or move it away "
                "to begin with an empty one, after making sure that no instance of its runs is left in any cloud."
            )
        case Trouble.OTHER:
            return ConfigurationError(
                f"{database.place} cannot be used ({words}). "
                "If it belongs to another program, give dstack a database of its own."
            )
    return StoreUnavailable(f"{database.place} cannot be opened ({words}). {database.cure}.")


def _prepare(database: Database) -> None:
    with database.reader.connect() as connection:
        if _version(connection) == HEAD:
            return
    with database.writer.connect() as connection:
        database.lock_schema(connection)
        try:
            _bring_up(connection, _version(connection), database)
            connection.commit()
        finally:
            # Its session settings were changed for the migration.
            connection.invalidate()


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.scalar(select(_VERSION.c.version_num))


def _bring_up(connection: Connection, version: str | None, database: Database) -> None:
    if version == HEAD:
        return
    if version is None:
        _create(connection)
    elif version in REVISIONS:
        _migrate(connection, version, database)
    else:
        raise ConfigurationError(
            f"{database.place} was last used by a newer dstack-core (tables {version}, this one knows up to {HEAD}). "
            "Upgrade this one with: pip install --upgrade dstack-core"
        )


def _create(connection: Connection) -> None:
    # Without a look at what is there: a table of that name is another program's, and an error.
    Base.metadata.create_all(connection, checkfirst=False)
    _VERSION.create(connection, checkfirst=False)
    connection.execute(_VERSION.insert().values(version_num=HEAD))


def _migrate(connection: Connection, version: str, database: Database) -> None:
    from dstack_core._store.migrations.upgrade import upgrade

    try:
        upgrade(connection)
        if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
            raise IntegrityError(None, None, ValueError("rows would be left without those that they depend on"))
    except DBAPIError as error:
        if database.trouble(error) is not Trouble.OTHER:
            raise
        raise StoreError(
            f"{database.place} cannot be migrated from {version} to {HEAD} ({database.scrub(error)}). "
            "Nothing was changed: the version of dstack-core that used it before still can. Please report this."
        ) from error
