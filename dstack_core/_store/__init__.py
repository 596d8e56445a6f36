"""What the server remembers: rows in a database (`store`), bytes of logs in files (`logs`).

The errors live here, so that reading logs does not import SQLAlchemy:

    StoreError
    ├── StoreUnavailable       the database did not answer or stayed locked; nothing of the transaction was written
    ├── StoreOutcomeUnknown    the connection broke during COMMIT: read before doing it again
    ├── StoreDamaged           the database file is not one, or is broken
    ├── LogStoreFull           no room for more bytes of a log; what was stored is kept
    ├── LogStoreClosed         bytes for a log that was already complete
    ├── CodeStoreFull          no room for more code; what was stored is kept
    ├── CodeRefused            code that is not what it says, or that would leave its folder; names the entry
    └── CodeIncomplete         a part of the code is not here (any more): the client has to send it again
"""

from __future__ import annotations

from dstack_core.errors import DstackError

__all__ = [
    "CodeIncomplete",
    "CodeRefused",
    "CodeStoreFull",
    "LogStoreClosed",
    "LogStoreFull",
    "StoreDamaged",
    "StoreError",
    "StoreOutcomeUnknown",
    "StoreUnavailable",
]


class StoreError(DstackError):
    """The store could not do what was asked."""


class StoreUnavailable(StoreError):
    """The database did not answer, stayed locked or has no room, after all retries. Nothing was written."""


class StoreOutcomeUnknown(StoreError):
    """The connection broke during COMMIT: the transaction happened wholly or not at all. Read before repeating it."""


class StoreDamaged(StoreError):
    """The database file is not a database, or is broken."""


class LogStoreFull(StoreError):
    """There is no room for these bytes. Those that fitted are kept: go on from `LogStore.end` when there is."""


class LogStoreClosed(StoreError):
    """The log was marked complete, and these bytes lie behind its end."""


class CodeStoreFull(StoreError):
    """There is no room for this code. What was stored before is kept, and nothing is there in part."""


class CodeRefused(StoreError):
    """A chunk or manifest is not what it says, is too large, or has an entry that would leave its folder."""


class CodeIncomplete(StoreError):
    """A manifest, or a chunk that it names, is not here. The client has to send it (again)."""
