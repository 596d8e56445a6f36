"""Which instances of a listing nobody claims: pure functions, each rule with its reason.

An intent is committed before any cloud hears of it, so an instance of ours whose intent this database has never heard
of has one explanation only: the database went back in time (it was restored from a copy), or there is a second one
with the same owner. A person is asked about those. What can be ended without asking is what this database knows to be
over, or to be somebody else, and unknown intents of a time in which this database was certainly whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from uuid import UUID

from dstack_core._engine.transitions import InstanceStatus
from dstack_core._hookspecs import BackendInfo
from dstack_core._models.instances import Instance, InstanceState

YOUNGEST = timedelta(minutes=5)
"""Nothing younger is an orphan, whatever else it looks like."""
WINDOWS = 3
"""Nor anything younger than so many of the backend's visibility windows."""
ROUNDS = 2
"""In so many rounds in a row an instance must look like an orphan to be one, or a running one be absent to be lost."""
MOST = 10
SHARE = 0.2
"""More than `MOST` in one round, or this share of all that was listed if that is more, is not swept but reported."""
_AHEAD = timedelta(days=1)
_YEAR_9999 = 253_370_764_800_000


class Verdict(str, Enum):
    """What an instance of a listing is.

    OURS       its row knows it
    GONE       it has ended already
    ARRIVING   its intent is being created or looked for: that is for the one who does so
    YOUNG      looks like an orphan, and is too young to be one
    OVER       its row is final: the instance should not be there any more
    DOUBLE     its row has another instance
    UNKNOWN    nobody has ever heard of its intent
    LOST       likewise, and the intent is so young that this database may have lost it
    STRANGE    its intent cannot be one of ours: marked by somebody else
    FOREIGN    it belongs to another owner
    """

    OURS = "ours"
    GONE = "gone"
    ARRIVING = "arriving"
    YOUNG = "young"
    OVER = "over"
    DOUBLE = "double"
    UNKNOWN = "unknown"
    LOST = "lost"
    STRANGE = "strange"
    FOREIGN = "foreign"

    @property
    def is_orphan(self) -> bool:
        """Whether its end may be asked for, seen often enough."""
        return self in (Verdict.OVER, Verdict.DOUBLE, Verdict.UNKNOWN)


REASONS = {
    Verdict.OURS: "is in use",
    Verdict.GONE: "has ended",
    Verdict.ARRIVING: "is being created",
    Verdict.YOUNG: "is not claimed, but too young to be judged",
    Verdict.OVER: "should have ended: nobody needs it any more",
    Verdict.DOUBLE: "is a second instance of one intent",
    Verdict.UNKNOWN: "is marked as ours, for an intent that was never written down",
    Verdict.LOST: "is marked as ours, and this database has lost its intent, or belongs to another server",
    Verdict.STRANGE: "carries our owner's mark, but no server made it",
    Verdict.FOREIGN: "belongs to another owner",
}


@dataclass(frozen=True, slots=True)
class Claim:
    """What the database says about an intent: its status, and the cloud's id of its instance if there is one."""

    status: InstanceStatus
    instance_id: str | None


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a listing is judged by.

    Attributes:
        owner: whose instances are ours.
        claims: what the database says, read *after* the listing was made, so that it knows what came meanwhile.
        now: the time.
        least_age: how old an orphan is at least.
        whole_until: no intent older than this was ever lost; `None`: nothing is known.
    """

    owner: UUID
    claims: Mapping[UUID, Claim]
    now: datetime
    least_age: timedelta
    whole_until: datetime | None


def least_age(info: BackendInfo) -> timedelta:
    """How old an instance must be, so that a row or a listing that lags behind is no danger to it."""
    return max(YOUNGEST, WINDOWS * timedelta(seconds=info.visibility_window))


def judge(instance: Instance, grounds: Grounds) -> Verdict:
    """What one listed instance is."""
    if instance.owner != grounds.owner:
        return Verdict.FOREIGN
    if instance.state is InstanceState.TERMINATED:
        return Verdict.GONE
    claim = grounds.claims.get(instance.intent)
    looks = _unheard_of(instance.intent, grounds) if claim is None else _claimed(instance, claim)
    young = grounds.now - instance.created_at <= grounds.least_age
    return Verdict.YOUNG if looks.is_orphan and young else looks


def _claimed(instance: Instance, claim: Claim) -> Verdict:
    if claim.status in (InstanceStatus.INTENT, InstanceStatus.UNKNOWN):
        return Verdict.ARRIVING
    if claim.instance_id is not None and claim.instance_id != instance.ref.id:
        return Verdict.DOUBLE
    return Verdict.OVER if claim.status.is_final else Verdict.OURS


def _unheard_of(intent: UUID, grounds: Grounds) -> Verdict:
    made = time_of(intent)
    if made is None or made > grounds.now + _AHEAD:
        return Verdict.STRANGE
    whole = grounds.whole_until is not None and made <= grounds.whole_until
    return Verdict.UNKNOWN if whole else Verdict.LOST


def time_of(intent: UUID) -> datetime | None:
    """When an intent was made, which is in its id; `None` for an id that no server made."""
    millis = intent.int >> 80
    return datetime.fromtimestamp(millis / 1000, UTC) if intent.version == 7 and millis < _YEAR_9999 else None


def too_many(orphans: int, listed: int) -> bool:
    """Whether so many orphans among so many instances rather mean that something is wrong with us."""
    return orphans > max(MOST, SHARE * listed)


@dataclass(frozen=True, slots=True)
class Sightings:
    """In how many rounds in a row each instance of a backend looked like an orphan."""

    rounds: Mapping[str, int] = field(default_factory=dict)

    def again(self, ids: Collection[str]) -> Sightings:
        """After one more round. What did not look like an orphan in it begins anew."""
        return Sightings({one: self.rounds.get(one, 0) + 1 for one in ids})

    def enough(self, instance_id: str) -> bool:
        """Whether an instance looked like an orphan often enough to be one."""
        return self.rounds.get(instance_id, 0) >= ROUNDS
