"""Statements that are put together once, for what is done to single rows many times a second.

    _OF_RUN = Prepared(select(JOBS.c.id, JOBS.c.status).where(JOBS.c.run_id == bindparam("run_id")))

    for job_id, status in _OF_RUN.rows(session, {"run_id": run_id}): ...

On SQLite a statement goes to the driver as it is, between the conversions that its types ask for: all else that
SQLAlchemy does for it takes several times as long as SQLite's answer. Elsewhere SQLAlchemy runs it. Nothing is flushed
before it: `session.flush()` does that.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Insert, Select, Table, Update, bindparam, insert
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from dstack_core._store.databases import run_on_driver

Terms = Mapping[str, Any]
_Convert = Callable[[Any], Any]


class _Plan(NamedTuple):
    """A statement in SQLite's words: what it takes, in its order, and how its columns are read."""

    text: str
    taken: Sequence[tuple[str, _Convert | None]]
    fixed: Terms
    read: Sequence[tuple[int, _Convert]]

    def values(self, terms: Terms) -> list[Any]:
        """What the driver gets."""
        given = {**self.fixed, **terms}
        return [given[name] if convert is None else convert(given[name]) for name, convert in self.taken]

    def converted(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """A row as it came from the driver, in Python's types."""
        values = list(row)
        for place, convert in self.read:
            values[place] = convert(values[place])
        return tuple(values)


class Prepared:
    """One statement. It names all that differs from use to use with `bindparam`."""

    def __init__(self, statement: Select[*tuple[Any, ...]] | Insert | Update) -> None:
        self._statement = statement
        self._plan: _Plan | None = None

    def rows(self, session: Session, terms: Terms) -> Sequence[Sequence[Any]]:
        """What a query finds."""
        connection = session.connection()
        if connection.dialect.name != "sqlite":
            return connection.execute(self._statement, terms).all()
        plan = self._planned(connection.dialect)
        return [plan.converted(row) for row in self._run(connection, plan, terms).fetchall()]

    def row(self, session: Session, terms: Terms) -> Sequence[Any] | None:
        """The first row that a query finds."""
        return next(iter(self.rows(session, terms)), None)

    def change(self, session: Session, terms: Terms) -> int:
        """Writes; the number of rows that it was done to."""
        connection = session.connection()
        if connection.dialect.name != "sqlite":
            return connection.execute(self._statement, terms).rowcount
        return self._run(connection, self._planned(connection.dialect), terms).rowcount

    def _planned(self, dialect: Dialect) -> _Plan:
        if self._plan is None:
            self._plan = _plan(self._statement, dialect)
        return self._plan

    def _run(self, connection: Connection, plan: _Plan, terms: Terms) -> sqlite3.Cursor:
        return run_on_driver(connection, plan.text, plan.values(terms))


def _plan(statement: Select[*tuple[Any, ...]] | Insert | Update, dialect: Dialect) -> _Plan:
    compiled = statement.compile(dialect=dialect)
    kinds = {name: parameter.type for parameter, name in compiled.bind_names.items()}
    fixed = {name: value for name, value in compiled.params.items() if value is not None}
    columns = statement.selected_columns if isinstance(statement, Select) else ()
    readers = enumerate(_reader(column.type, dialect) for column in columns)
    return _Plan(
        str(compiled),
        [(name, _writer(kinds[name], dialect)) for name in compiled.positiontup or ()],
        fixed,
        [(place, reader) for place, reader in readers if reader is not None],
    )


def _writer(kind: TypeEngine[Any], dialect: Dialect) -> _Convert | None:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _reader(kind: TypeEngine[Any], dialect: Dialect) -> _Convert | None:
    return kind.dialect_impl(dialect).result_processor(dialect, None)


class PreparedInsert:
    """Adds rows to a table; columns that are not given get their defaults."""

    def __init__(self, table: Table) -> None:
        columns = [column for column in table.columns if column is not table.autoincrement_column]
        self._defaults = {column.name: column.default for column in columns}
        self._prepared = Prepared(insert(table).values({column.name: bindparam(column.name) for column in columns}))

    def add(self, session: Session, values: Terms) -> dict[str, Any]:
        """Writes one row, and returns all of its values."""
        whole = {name: _default(default) for name, default in self._defaults.items()} | dict(values)
        self._prepared.change(session, whole)
        return whole


def _default(default: Any) -> Any:
    """What a column holds that nobody gave a value for."""
    if default is None:
        return None
    return default.arg if default.is_scalar else default.arg(None)
