"""What a listed instance is: every rule by itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from dstack_core._engine.orphans import Claim, Grounds, Sightings, Verdict, judge, least_age, time_of, too_many
from dstack_core._engine.transitions import InstanceStatus
from dstack_core.plugin import Instance, InstanceRef, InstanceState
from tests.support.bench import OWNER
from tests.support.cloud import INFO

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
OLD = NOON - timedelta(hours=1)
S, V = InstanceStatus, Verdict


def intent(when: datetime = OLD) -> UUID:
    """An intent that was made then."""
    return UUID(int=(int(when.timestamp() * 1000) << 80) | (0x7 << 76) | (0b10 << 62) | 5)


def instance(known: UUID | None = None, **facts: object) -> Instance:
    """One that runs since an hour."""
    ref = InstanceRef(backend="sim", id="i-1", region="here")
    given = {"intent": known or intent(), "owner": OWNER, "state": InstanceState.RUNNING, "created_at": OLD}
    return Instance(ref=ref, **{**given, **facts})  # type: ignore[arg-type]  # fields by name


def verdict(one: Instance, claim: Claim | None = None, whole_until: datetime | None = NOON) -> Verdict:
    """What it is, given what the database says of its intent."""
    claims = {one.intent: claim} if claim else {}
    return judge(one, Grounds(OWNER, claims, NOON, timedelta(minutes=5), whole_until))


@pytest.mark.parametrize("status", [status for status in S if not status.is_final])
def test_what_its_row_knows_is_ours(status: InstanceStatus) -> None:
    """In use, or being ended by its own row."""
    expected = V.ARRIVING if status in (S.INTENT, S.UNKNOWN) else V.OURS
    assert verdict(instance(), Claim(status, None if expected is V.ARRIVING else "i-1")) is expected


@pytest.mark.parametrize("status", [S.TERMINATED, S.FAILED])
def test_what_outlives_its_row_is_an_orphan(status: InstanceStatus) -> None:
    """The row is final and the instance is there: it is over."""
    assert verdict(instance(), Claim(status, "i-1")) is V.OVER


def test_a_second_instance_of_an_intent_is_an_orphan() -> None:
    """The row knows another one."""
    assert verdict(instance(), Claim(S.RUNNING, "i-2")) is V.DOUBLE
    assert verdict(instance(), Claim(S.TERMINATED, "i-2")) is V.DOUBLE


def test_while_an_intent_is_unsettled_all_of_its_instances_are_left_to_it() -> None:
    """Whoever creates or looks for it decides, though the row may remember another id."""
    assert verdict(instance(), Claim(S.UNKNOWN, "i-2")) is V.ARRIVING
    assert verdict(instance(), Claim(S.INTENT, None)) is V.ARRIVING


def test_another_owner_is_another_owner() -> None:
    """Whatever else is true of it."""
    other = UUID("01890000-0000-7000-8000-00000000000f")
    assert verdict(instance(owner=other)) is V.FOREIGN
    assert verdict(instance(owner=other), Claim(S.TERMINATED, "i-1")) is V.FOREIGN


def test_what_has_ended_is_nobody_s_business() -> None:
    """Clouds list instances for an hour after their end."""
    assert verdict(instance(state=InstanceState.TERMINATED)) is V.GONE


@pytest.mark.parametrize("claim", [None, Claim(S.TERMINATED, "i-1"), Claim(S.RUNNING, "i-2")])
def test_what_is_young_is_no_orphan(claim: Claim | None) -> None:
    """Whatever it looks like."""
    assert verdict(instance(created_at=NOON - timedelta(minutes=5)), claim) is V.YOUNG
    assert verdict(instance(created_at=NOON - timedelta(minutes=5, seconds=1)), claim).is_orphan


def test_an_unknown_intent_is_an_orphan_only_where_none_can_be_lost() -> None:
    """Of a time in which the database was whole; younger ones it may have lost."""
    assert verdict(instance(), whole_until=OLD) is V.UNKNOWN
    assert verdict(instance(), whole_until=OLD - timedelta(seconds=1)) is V.LOST
    assert verdict(instance(), whole_until=None) is V.LOST


def test_an_intent_that_no_server_made_is_strange() -> None:
    """Of another version, or from the future: no orphan, and no sign of anything."""
    assert verdict(instance(UUID("6f0f1c1e-5b3c-4d0e-9a57-3d7d2a1d7e52"))) is V.STRANGE
    assert verdict(instance(intent(NOON + timedelta(days=2)))) is V.STRANGE
    assert verdict(instance(UUID(int=(((1 << 48) - 1) << 80) | (0x7 << 76) | (0b10 << 62)))) is V.STRANGE


def test_the_time_of_an_intent_is_in_it() -> None:
    """To the millisecond."""
    assert time_of(intent(OLD)) == OLD


def test_the_least_age_follows_from_the_backend() -> None:
    """Five minutes, or three windows where those are longer."""
    assert least_age(INFO) == timedelta(minutes=5)
    assert least_age(replace(INFO, visibility_window=200.0)) == timedelta(minutes=10)


def test_seen_once_is_not_enough() -> None:
    """Two rounds in a row; what was away in between begins anew."""
    once = Sightings().again(["a", "b"])
    assert not once.enough("a")
    twice = once.again(["a"])
    assert (twice.enough("a"), twice.enough("b")) == (True, False)
    assert not twice.again(["b"]).again(["a"]).enough("a")


@pytest.mark.parametrize(
    ("orphans", "listed", "refused"), [(10, 10, False), (11, 11, True), (20, 100, False), (21, 100, True)]
)
def test_there_is_an_end_to_sweeping(orphans: int, listed: int, refused: bool) -> None:
    """Ten, or a fifth of all that there is."""
    assert too_many(orphans, listed) is refused
