"""Whether the database went back in time: functions that run inside a transaction.

A database that was restored from a copy, or is the copy of one that is in use, does not know what was made since. To
end all that it does not know would end what is in use, so from the first sign on nothing is ended until a person has
confirmed. There are two signs: an instance of ours that was made for an intent which the database has lost
(`orphans.Verdict.LOST`), and a count of starts, kept in the database and in a file beside it, of which the file has
seen more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from sqlalchemy.orm import Session

from dstack_core._models.instances import Instance
from dstack_core._store.tables import MetaRow

_RESTORED, _CONFIRMED, _STARTS = "restored", "restore_confirmed", "starts"

CURE = "If this database is the only one of its runs, say so with `dstack doctor --confirm-restore`"


class Kept(Protocol):
    """What is remembered of a database outside of it."""

    def read(self, owner: UUID) -> int:
        """How many starts of the database of this owner were seen from here; 0 if none was."""

    def write(self, owner: UUID, starts: int) -> None:
        """Remembers that."""


def lost_instances(instances: Sequence[Instance]) -> str:
    """The sign in the cloud, in words."""
    some = ", ".join(f"{one.ref.id} ({one.ref.backend})" for one in instances[:3])
    more = f" and {len(instances) - 3} more" if len(instances) > 3 else ""
    return f"instances were made for it of which it knows nothing: {some}{more}"


def suspect(session: Session, now: datetime, why: str) -> str | None:
    """From now on nothing is ended that the database does not know. Gives the alarm, the first time."""
    if session.get(MetaRow, _RESTORED) is not None:
        return None
    session.add(MetaRow(key=_RESTORED, value=json.dumps({"since": now.isoformat(), "why": why})))
    return (
        f"This database seems to have been restored from a copy, or to be a copy of another: {why}. "
        f"No instance is swept until a person has looked at `dstack doctor`. {CURE}"
    )


def suspicion(session: Session) -> tuple[datetime, str] | None:
    """Since when the database seems to be restored, and why; `None` if it does not."""
    row = session.get(MetaRow, _RESTORED)
    if row is None:
        return None
    known = json.loads(row.value)
    return datetime.fromisoformat(known["since"]), str(known["why"])


def confirm(session: Session, now: datetime) -> None:
    """A person has looked: what was made before now and is not known may be ended."""
    row = session.get(MetaRow, _RESTORED)
    if row is not None:
        session.delete(row)
    session.merge(MetaRow(key=_CONFIRMED, value=now.isoformat()))


def confirmed_at(session: Session) -> datetime | None:
    """When a person last said that the database may forget what it does not know; `None`: never."""
    row = session.get(MetaRow, _CONFIRMED)
    return datetime.fromisoformat(row.value) if row is not None else None


def count_start(session: Session, now: datetime, seen: int) -> tuple[int, str | None]:
    """Counts a start of a server, of which `seen` were seen from here. Gives their number, and the alarm if any."""
    row = session.get(MetaRow, _STARTS, with_for_update=True)
    known = int(row.value) if row is not None else 0
    alarm = None
    if seen > known:
        alarm = suspect(session, now, f"it counts {known} starts of its servers, and {seen} were seen from here")
    session.merge(MetaRow(key=_STARTS, value=str(max(known, seen) + 1)))
    return max(known, seen) + 1, alarm
