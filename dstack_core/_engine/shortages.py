"""What the clouds have run out of, as far as they said that it reaches, for as long as that is likely to hold.

One table for all servers of a database, and a copy of it in each: that of a server which is alone never needs to be
read again. A refusal is written down together with the end of its intent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from dstack_core._engine.seams import Clock
from dstack_core._engine.transitions import InstanceObservation
from dstack_core._models.offers import Offer
from dstack_core._store.store import Store
from dstack_core._store.tables import ShortageRow

FIRST = {"capacity": timedelta(minutes=3), "quota": timedelta(minutes=30)}
"""How long a refusal is remembered the first time. Each time in a row that it is repeated, twice as long."""
LONGEST = {"capacity": timedelta(minutes=30), "quota": timedelta(hours=4)}
HELD = 3
"""For this part of the time nothing is tried; after that only if nothing else is left."""
GOOD_FOR = timedelta(seconds=1)
"""How old a copy may be where other servers write to the table."""
_KINDS = {"NoCapacityError": "capacity", "QuotaExceededError": "quota"}

Key = tuple[str, str, str, str, str]
"""Kind, region, zone, machine, market. An empty one stands for all."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """One refusal that is remembered.

    Attributes:
        backend: who refused.
        key: what for.
        times: how often in a row.
        since: when it refused last.
        again_at: from then on it may be tried if nothing else is left.
        until: from then on it is forgotten.
        message: what the cloud said.
    """

    backend: str
    key: Key
    times: int
    since: datetime
    again_at: datetime
    until: datetime
    message: str

    @property
    def reason(self) -> str:
        """For people."""
        what = "no quota" if self.key[0] == "quota" else "none"
        return f"had {what} at {self.since:%H:%M:%S} UTC, passed over until {self.until:%H:%M:%S}: {self.message}"


class Memory:
    """All that is remembered at some time. Asked by plans about thousands of offers."""

    def __init__(self, known: Mapping[tuple[str, Key], Shortage], now: datetime) -> None:
        self.now = now
        self._all = [shortage for shortage in known.values() if shortage.until > now]
        # By what narrows most: backend, machine or family, market.
        self._known: dict[str, dict[tuple[str, str], list[Shortage]]] = {}
        for shortage in self._all:
            machines = self._known.setdefault(shortage.backend, {})
            machines.setdefault(shortage.key[3:], []).append(shortage)

    def __bool__(self) -> bool:
        return bool(self._all)

    def __iter__(self) -> Iterator[Shortage]:
        return iter(self._all)

    def of(self, offer: Offer) -> Shortage | None:
        """The refusal that holds longest against trying an offer; `None` if none does."""
        machines = self._known.get(offer.backend)
        if machines is None:
            return None
        market, machine = _market(offer), offer.instance_type
        found = None
        for key in ((machine, market), (family_of(machine), market), _EVERYTHING):
            for shortage in machines.get(key, ()):
                if _reaches(shortage.key, offer) and (found is None or shortage.again_at > found.again_at):
                    found = shortage
        return found

    def of_all(self, backend: str) -> Shortage | None:
        """The refusal of everything that a backend has."""
        known = self._known.get(backend, {}).get(_EVERYTHING, ())
        return max(known, key=lambda shortage: shortage.again_at, default=None)

    def forbids(self, shortage: Shortage) -> bool:
        """Whether it is too early to try again, even if nothing else is left."""
        return self.now < shortage.again_at


def _is_about(key: Key, offer: Offer) -> bool:
    """Whether a refusal reaches an offer, whatever else it reaches."""
    machines = (("", ""), (offer.instance_type, _market(offer)), (family_of(offer.instance_type), _market(offer)))
    return key[3:] in machines and _reaches(key, offer)


_EVERYTHING = ("", "")


def _reaches(key: Key, offer: Offer) -> bool:
    """Whether a refusal of these machines is one of this offer. A shortage is one of a type, a quota of a family."""
    kind, region, zone, machine, _ = key
    if kind == "capacity" and machine not in ("", offer.instance_type):
        return False
    return region in ("", offer.region) and zone in ("", offer.zone)


def key_of(kind: str, offer: Offer, scope: str) -> Key:
    """Under which key a refusal of this offer is kept. A quota is one of a family of machines."""
    if scope == "account":
        return (kind, "", "", "", "")
    if scope == "type":
        return (kind, "", "", offer.instance_type, _market(offer))
    zone = offer.zone or "" if scope == "zone" else ""
    machine = family_of(offer.instance_type) if kind == "quota" else offer.instance_type
    return (kind, offer.region, zone, machine, _market(offer))


@lru_cache(maxsize=10_000)
def family_of(instance_type: str) -> str:
    """What clouds count a quota by: `g5` of `g5.xlarge`, `n1` of `n1-standard-4`."""
    return re.split(r"[.-]", instance_type, maxsplit=1)[0] or instance_type


def _market(offer: Offer) -> str:
    return "spot" if offer.spot else "on-demand"


class Shortages:
    """The table and this server's copy of it.

    Args:
        clock: the time.
        store: the database.
        alone: no other server writes to it.
    """

    def __init__(self, clock: Clock, store: Store, *, alone: bool) -> None:
        self._clock = clock
        self._store = store
        self._alone = alone
        self._known: dict[tuple[str, Key], Shortage] = {}
        self._read_at: datetime | None = None

    async def now(self) -> Memory:
        """What is remembered now. Where no other server writes, the table is read once."""
        now = self._clock.now()
        if self._read_at is None or (not self._alone and now - self._read_at > GOOD_FOR):
            self._known = await self._store.read(_load, quick=True)
            self._read_at = now
        return Memory(self._known, now)

    def learn(self, news: Shortage) -> None:
        """A refusal was written down."""
        self._known[news.backend, news.key] = news

    def note(self, session: Session, offer: Offer, seen: InstanceObservation) -> Shortage | None:
        """Writes a refusal down, and forgets old ones; `None` if it was not for want of something."""
        kind = _KINDS.get(seen.error or "")
        if kind is None or seen.retry_after == 0:
            # Not for want of something, or the cloud says that there will be some at once.
            return None
        session.execute(delete(ShortageRow).where(ShortageRow.until < seen.at - LONGEST[kind]))
        key = key_of(kind, offer, seen.error_scope or "zone")
        row = _row(session, offer.backend, key, seen.at)
        if seen.at >= row.again_at:
            _lengthen(row, seen)
        row.message = seen.message or ""
        return _shortage(row)

    async def forget(self, offer: Offer, had_at: datetime) -> None:
        """An offer could be had then: what was refused before is not true any more."""
        mine = ((key, one) for key, one in self._known.items() if key[0] == offer.backend and one.since <= had_at)
        known = [key for key, one in mine if _is_about(one.key, offer)]
        if known:
            await self._store.transact(lambda session: _forget(session, known), quick=True)
        for one in known:
            self._known.pop(one, None)


def _row(session: Session, backend: str, key: Key, now: datetime) -> ShortageRow:
    """The row of a key, locked; made if there is none, by us or by another server at the same moment."""
    identity = (key[0], backend, *key[1:])
    row = session.get(ShortageRow, identity, with_for_update=True)
    if row is None:
        names = dict(zip(_COLUMNS, key[1:], strict=True))
        with suppress(IntegrityError), session.begin_nested():
            session.add(ShortageRow(kind=key[0], backend=backend, **names, times=0, since=now, **_none(now)))
        row = session.get_one(ShortageRow, identity, with_for_update=True)
    return row


def _none(now: datetime) -> dict[str, Any]:
    return {"again_at": now, "until": now, "message": ""}


_COLUMNS = ("region", "zone", "machine", "market")


def _lengthen(row: ShortageRow, seen: InstanceObservation) -> None:
    """Refused again, though it was given time: that takes twice as long. Many refusals at once are one."""
    recent = row.times and seen.at - row.until < FIRST[row.kind]
    row.times = row.times + 1 if recent else 1
    length = min(LONGEST[row.kind], FIRST[row.kind] * 2 ** min(row.times - 1, 10))
    row.since, row.until, row.again_at = seen.at, seen.at + length, seen.at + length / HELD
    if seen.retry_after is not None:
        # The cloud knows best.
        row.until = row.again_at = seen.at + timedelta(seconds=seen.retry_after)


def _load(session: Session) -> dict[tuple[str, Key], Shortage]:
    found = map(_shortage, session.scalars(select(ShortageRow)))
    return {(shortage.backend, shortage.key): shortage for shortage in found}


def _shortage(row: ShortageRow) -> Shortage:
    key = (row.kind, row.region, row.zone, row.machine, row.market)
    return Shortage(row.backend, key, row.times, row.since, row.again_at, row.until, row.message)


def _forget(session: Session, known: Iterable[tuple[str, Key]]) -> None:
    for backend, (kind, *rest) in known:
        row = session.get(ShortageRow, (kind, backend, *rest))
        if row is not None:
            session.delete(row)
