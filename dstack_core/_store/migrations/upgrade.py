"""Runs alembic. The only module that imports it, apart from the migrations themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from alembic.autogenerate.api import AutogenContext
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from sqlalchemy.engine import Connection

from dstack_core._store.migrations import HEAD, VERSION_TABLE
from dstack_core._store.tables import Base, UtcDateTime

__all__ = ["configuration", "options", "revisions", "upgrade"]

SCRIPTS = Path(__file__).parent
"""Where alembic finds the migrations."""


def configuration(connection: Connection) -> Config:
    """Returns alembic's configuration: no file, this package, that connection."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection, target: str | None = None) -> None:
    """Applies what is missing, up to this version's head, within the transaction that `connection` is in."""
    from alembic import command

    command.upgrade(configuration(connection), target or HEAD)


def options() -> dict[str, Any]:
    """Returns alembic's options for our tables."""
    return {
        "target_metadata": Base.metadata,
        "version_table": VERSION_TABLE,
        "render_as_batch": True,
        "render_item": _render,
        "compare_type": True,
        "compare_server_default": True,
    }


def _render(kind: str, item: object, _context: AutogenContext) -> str | Literal[False]:
    # A migration says what it does for ever, whatever becomes of our own types.
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


def revisions(connection: Connection) -> tuple[str, ...]:
    """Returns the revisions that the files have, oldest first."""
    scripts = ScriptDirectory.from_config(configuration(connection))
    found = tuple(script.revision for script in scripts.walk_revisions())
    if len(scripts.get_heads()) > 1:
        raise RevisionError(f"several heads: {scripts.get_heads()}")
    return found[::-1]
