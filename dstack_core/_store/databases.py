"""What differs between SQLite and PostgreSQL: how to connect, and what an error means for the transaction."""

from __future__ import annotations

import os
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

from sqlalchemy import create_engine, event, make_url
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from dstack_core.errors import ConfigurationError

BUSY_TIMEOUT = 0.05
"""Seconds for which SQLite itself waits for a lock, and all else with it; then the store's own retries come."""

SCHEMA_LOCK = 0x6473_7461_636B
"""Key of the PostgreSQL advisory lock under which tables are made and changed ("dstack" in ASCII)."""

URL_FORM = "postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"
URL_CURE = f"DSTACK_DATABASE_URL has the form {URL_FORM}; unset it to use a SQLite file in the home folder"


class Trouble(Enum):
    """What an error of the database means."""

    AGAIN = "rolled back by the database; the same transaction may be run again"
    LOST = "the connection is gone"
    FULL = "there is no room, or the file cannot be reached"
    READONLY = "writing is not allowed"
    DAMAGED = "the file is not a database, or is broken"
    OTHER = "the caller's business"


class Database(ABC):
    """One database, with an engine for transactions that write and one for those that only read."""

    dialect: str
    place: str
    """Where it is, for messages. Never a password."""
    cure: str
    """What to look at when it does not answer."""
    writers: int
    readers: int
    """How many threads may use it at once."""
    writer: Engine
    reader: Engine

    @abstractmethod
    def trouble(self, error: DBAPIError) -> Trouble:
        """Says what an error means."""

    @abstractmethod
    def lock_schema(self, connection: Connection) -> None:
        """Begins a transaction in which no other process can make or change tables."""

    def scrub(self, error: BaseException) -> str:
        """Returns the database's own words without secrets."""
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        return " ".join(str(cause).split())

    def dispose(self) -> None:
        """Closes every connection."""
        self.reader.dispose()
        self.writer.dispose()


class Sqlite(Database):
    """A file: one writer, any number of readers, each of which sees the state at its start."""

    dialect = "sqlite"
    writers = 1
    readers = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = f"SQLite database {path}"
        self.cure = f"Look for another program that has {path} open"
        self._ready_file()
        self.writer = self._engine(begin="BEGIN IMMEDIATE", pool_size=self.writers)
        # One more than threads: for those that are read without one.
        self.reader = self._engine(begin="BEGIN", pool_size=self.readers + 1, pragmas=("query_only=ON",))

    def _ready_file(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            if self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
        except OSError as error:
            raise ConfigurationError(
                f"Cannot open the database {self.path} for writing: {error.strerror}. "
                "Make it writable for this user, or set DSTACK_HOME to a folder that is."
            ) from error

    def _connect(self, pragmas: tuple[str, ...]) -> sqlite3.Connection:
        # No implicit transactions: BEGIN is ours, or it would come too late and not be IMMEDIATE.
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "temp_store=MEMORY", *pragmas):
            connection.execute(f"PRAGMA {pragma}").close()
        return connection

    def _engine(self, *, begin: str, pool_size: int, pragmas: tuple[str, ...] = ()) -> Engine:
        engine = create_engine(
            "sqlite://",
            creator=lambda: self._connect(pragmas),
            poolclass=QueuePool,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=60,
            hide_parameters=True,
        )
        event.listen(engine, "begin", partial(_begin, begin))
        return engine

    def trouble(self, error: DBAPIError) -> Trouble:
        """Reads the primary result code."""
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        match code:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Trouble.AGAIN
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return Trouble.DAMAGED
            case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_CANTOPEN:
                return Trouble.FULL
            case sqlite3.SQLITE_READONLY:
                return Trouble.READONLY
        return Trouble.OTHER

    def lock_schema(self, connection: Connection) -> None:
        """Begins with the write lock; WAL and foreign keys can only be switched before that."""
        driver = driver_of(connection)
        driver.execute("PRAGMA journal_mode=WAL").close()
        # A migration rebuilds tables, which must not cascade. They are checked before COMMIT instead.
        driver.execute("PRAGMA foreign_keys=OFF").close()
        connection.begin()


def driver_of(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection to SQLite."""
    return cast("sqlite3.Connection", connection.connection.driver_connection)


def run_on_driver(connection: Connection, text: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
    """Runs a statement in SQLite's own words. Its errors are those that SQLAlchemy would have raised."""
    try:
        return driver_of(connection).execute(text, values)
    except sqlite3.Error as error:
        told = DBAPIError.instance(text, None, error, sqlite3.Error, hide_parameters=True, dialect=connection.dialect)
        raise told from error


def _begin(how: str, connection: Connection) -> None:
    run_on_driver(connection, how).close()


class Postgres(Database):
    """A server: many replicas of ours on one database."""

    dialect = "postgresql"
    writers = 8
    readers = 0
    """They share the threads and connections of the writers."""

    def __init__(self, url: URL) -> None:
        self._secrets = _secrets(url)
        port = f":{url.port}" if url.port else ""
        host = url.host or url.query.get("host") or "the default socket"
        self.place = f"PostgreSQL database '{url.database or url.username or ''}' at {host}{port}"
        self.cure = "See that it runs, and that DSTACK_DATABASE_URL has its host, port, user, password and database"
        self.writer = self._engine(url)
        self.reader = self.writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    def _engine(self, url: URL) -> Engine:
        arguments = {name: value for name, value in _CONNECT_ARGUMENTS.items() if name not in url.query}
        try:
            engine = create_engine(
                url,
                connect_args=arguments,
                pool_size=self.writers,
                max_overflow=0,
                pool_timeout=60,
                isolation_level="READ COMMITTED",
                hide_parameters=True,
            )
        except ImportError:
            raise ConfigurationError(
                "DSTACK_DATABASE_URL names a PostgreSQL database, but its driver (psycopg 3) is not installed. "
                "Install it with: pip install 'dstack-core[postgres]'"
            ) from None
        event.listen(engine, "connect", _set_up_session)
        return engine

    def trouble(self, error: DBAPIError) -> Trouble:
        """Reads SQLSTATE; without one, the server has not answered."""
        state = getattr(error.orig, "sqlstate", None)
        if state is None:
            lost = error.connection_invalidated or type(error.orig).__name__ in _UNANSWERED
            return Trouble.LOST if lost else Trouble.OTHER
        if error.connection_invalidated or state[:2] == "08" or state[:3] == "57P":
            return Trouble.LOST
        return _TROUBLES.get(state, Trouble.OTHER)

    def lock_schema(self, connection: Connection) -> None:
        """Begins, and waits for the advisory lock, which goes with the transaction."""
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})").close()

    def scrub(self, error: BaseException) -> str:
        """Takes out the passwords that the URL has."""
        words = super().scrub(error)
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return words


def open_database(url: str | None, path: Path | None) -> Database:
    """Returns the database that a URL names, or the SQLite file at `path` when there is no URL.

    Raises:
        ConfigurationError: the URL cannot be read, or names something that is not supported.
    """
    if not url:
        if path is None:
            raise ValueError("Store.open needs a url or a path")
        return Sqlite(path)
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return Sqlite(_sqlite_path(parsed))
    return Postgres(parsed)


def _parse(text: str) -> URL:
    # What the parser says may quote a piece of the password, so none of it is passed on.
    try:
        url = make_url(text.strip())
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"The database URL cannot be read. {URL_CURE}. "
            "Special characters in a password are written percent-encoded, for example '@' as '%40'."
        ) from None
    if url.drivername in {"postgresql", "postgres"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in {"postgresql+psycopg", "sqlite", "sqlite+pysqlite"}:
        raise ConfigurationError(f"A database URL of the kind '{_shown_kind(url)}' is not supported. {URL_CURE}.")
    return url


def _shown_kind(url: URL) -> str:
    return url.drivername if re.fullmatch(r"[\w+]{1,40}", url.drivername) else "?"


def _sqlite_path(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or url.query:
        raise ConfigurationError("A SQLite database is a file: write sqlite:////path/to/server.db, without options.")
    return Path(url.database)


def _secrets(url: URL) -> list[str]:
    """Passwords of a URL, wherever libpq accepts one."""
    named = [value for key, value in url.query.items() if "password" in key]
    values = [str(url.password or ""), *(str(value) for value in named)]
    return [value for value in values if value]


def _set_up_session(connection: Any, _entry: ConnectionPoolEntry) -> None:
    """Makes times UTC, and frees the locks of a replica that was suspended within a transaction."""
    connection.execute("SET TIME ZONE 'UTC'; SET idle_in_transaction_session_timeout = '60s'").close()
    connection.commit()


_UNANSWERED = {"OperationalError", "InterfaceError", "ConnectionTimeout"}
"""What psycopg raises when the server said nothing."""

_TROUBLES = {
    "40001": Trouble.AGAIN,  # serialization failure
    "40P01": Trouble.AGAIN,  # deadlock
    "25P03": Trouble.LOST,  # idle in a transaction for too long
    "25P04": Trouble.LOST,  # in a transaction for too long
    "53300": Trouble.LOST,  # too many connections
    "53100": Trouble.FULL,  # disk full
    "58030": Trouble.FULL,  # I/O error
    "25006": Trouble.READONLY,
}

_CONNECT_ARGUMENTS: dict[str, Any] = {
    "application_name": "dstack",
    "connect_timeout": 10,
    # A host that vanished is noticed within half a minute, not after the two hours of TCP's own.
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
