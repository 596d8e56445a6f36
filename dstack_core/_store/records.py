"""Single rows of jobs and instances, read and written without the ORM's bookkeeping, which costs more than they do.

A record has the attributes of its row, and what was changed on it is written by `session.flush()`, as for a row of the
ORM: before the transaction ends, and before the ORM asks the database for anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Generic, Protocol, TypeVar, cast
from uuid import UUID

from sqlalchemy import ColumnElement, Table, bindparam, select, update
from sqlalchemy.orm import Session

from dstack_core._store.prepared import Prepared, PreparedInsert, Terms
from dstack_core._store.tables import Base

Row = TypeVar("Row", bound=Base)


class Keeper(Protocol):
    """A session that writes records. The store's sessions do."""

    records: dict[tuple[type[Base], UUID], Record]


class Record:
    """A row that was read or written in this transaction. Its attributes are those of the table's class."""

    __slots__ = ("__dict__", "_before")

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._before = values

    def changes(self) -> dict[str, Any]:
        """What differs from the database."""
        before = self._before
        return {
            name: value for name, value in self.__dict__.items() if value is not before[name] and value != before[name]
        }

    def are_written(self, changes: dict[str, Any]) -> None:
        """These changes are in the database now."""
        self._before = {**self._before, **changes}


def columns(table: type[Base]) -> Any:
    """The columns of a table, for statements that are prepared."""
    return table.__table__.c


class One(Generic[Row]):
    """Reads one row by a condition, whose parameters are bound by name. `lock`: for the rest of the transaction."""

    def __init__(self, table: type[Row], *where: ColumnElement[bool], lock: bool = False) -> None:
        query = select(cast("Table", table.__table__)).where(*where)
        self._names = [column.name for column in table.__table__.columns]
        self._prepared = Prepared(query.with_for_update() if lock else query)
        self._table = table

    def read(self, session: Session, terms: Terms) -> Row | None:
        """The row, as it is now; `None` if there is none."""
        session.flush()
        found = self._prepared.row(session, terms)
        if found is None:
            return None
        return _kept(session, self._table, dict(zip(self._names, found, strict=True)))


def get(session: Session, table: type[Row], row_id: UUID) -> Row | None:
    """The row with this id; the record that this transaction has of it, if it has one."""
    known = cast("Keeper", session).records.get((table, row_id))
    return cast("Row", known) if known is not None else _by_id(table).read(session, {"row_id": row_id})


def add(session: Session, table: type[Row], values: Terms) -> Row:
    """Writes a new row."""
    return _kept(session, table, _insert(table).add(session, values))


def of(table: type[Row], values: Terms) -> Row:  # noqa: ARG001  # what the result stands for
    """What a new row with these values looks like to a reader."""
    return cast("Row", Record(dict(values)))


def flush(session: Session, records: Iterable[tuple[type[Base], Record]]) -> None:
    """Writes what was changed on these records."""
    for table, record in records:
        changes = record.changes()
        if changes:
            terms = {**changes, "row_id": record.__dict__["id"]}
            _update(table, tuple(changes)).change(session, terms)
            record.are_written(changes)


def _kept(session: Session, table: type[Row], values: dict[str, Any]) -> Row:
    """The record of a row. One that this transaction has already is brought up to date."""
    records = cast("Keeper", session).records
    known = records.get((table, values["id"]))
    if known is None:
        known = records[table, values["id"]] = Record(values)
    else:
        known.__init__(values)  # type: ignore[misc]  # the same object, as whoever has it may go on with it
    return cast("Row", known)


@cache
def _by_id(table: type[Row]) -> One[Row]:
    return One(table, columns(table).id == bindparam("row_id"))


@cache
def _insert(table: type[Base]) -> PreparedInsert:
    return PreparedInsert(cast("Table", table.__table__))


@cache
def _update(table: type[Base], names: tuple[str, ...]) -> Prepared:
    whole = cast("Table", table.__table__)
    values: dict[str, Any] = {name: bindparam(name) for name in names}
    return Prepared(update(whole).where(whole.c.id == bindparam("row_id")).values(values))
