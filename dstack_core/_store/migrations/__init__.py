"""The tables' history. `python -m dstack_core._store.migrations` writes it; a test compares it with the tables."""

from __future__ import annotations

__all__ = ["HEAD", "REVISIONS", "VERSION_TABLE"]

REVISIONS = ("0001", "0002", "0003", "0004")
"""All revisions, oldest first. Kept by hand, so that a start needs no alembic; a test compares it with the files."""

HEAD = REVISIONS[-1]

VERSION_TABLE = "dstack_version"
"""Holds the revision of a database. A name of our own: a database may be shared with other users of alembic."""
