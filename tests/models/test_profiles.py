"""Durations, retries, lists of names, and profiles."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core._models.profiles import (
    Profile,
    ProfileRetryPolicy,
    Retry,
    RetryEvent,
    RetryPolicy,
    SpotPolicy,
    UtilizationPolicy,
)
from dstack_core._models.resources import Resources
from dstack_core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(90, 90), ("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("1 h", 3600), ("2d", 172800), ("1w", 604800)],
)
def test_durations_are_whole_seconds(written: Any, seconds: int) -> None:
    """A number is seconds, a letter says what else."""
    profile = Profile(max_duration=written, stop_duration=written, idle_duration=written)
    assert profile.max_duration == profile.stop_duration == profile.idle_duration == seconds
    assert profile.max_seconds == seconds


@pytest.mark.parametrize("nonsense", ["1h30m", "1.5h", "-1h", -5, 1.5, "soon", "", "h", [1], "9" * 5000, "9999999999w"])
@pytest.mark.parametrize("field", ["max_duration", "stop_duration", "idle_duration"])
def test_what_is_no_duration_is_refused(field: str, nonsense: Any) -> None:
    """The message names the field, the value and how a duration is written."""
    with pytest.raises(ConfigurationError, match=rf"^Profile: {field}: "):
        Profile.model_validate({field: nonsense})


def test_off_means_no_limit() -> None:
    """`"off"` and `False` switch a limit off, `True` leaves the default, and nothing may last zero seconds."""
    assert Profile(max_duration="off").max_duration == "off"
    assert Profile(max_duration=False).max_duration == "off"
    assert Profile(max_duration="off").max_seconds is None
    assert Profile(max_duration=True).max_duration is None
    assert Profile(idle_duration=-1).idle_duration == "off"
    with pytest.raises(ConfigurationError, match="write 'off' for no limit"):
        Profile(max_duration=0)


def test_a_stopping_job_must_end() -> None:
    """The time between asking and killing cannot be without limit."""
    assert Profile(stop_duration=0).stop_duration == 0
    with pytest.raises(ConfigurationError, match="stop_duration"):
        Profile(stop_duration="off")


def test_a_limit_means_retry() -> None:
    """Whoever gives a limit wants retries; without one they go on for ever."""
    assert ProfileRetryPolicy(limit="1h") == RetryPolicy(retry=True, limit=3600)
    assert not RetryPolicy().retry
    assert RetryPolicy(retry=True).limit is None
    assert RetryPolicy(retry=True).on_events == (RetryEvent.NO_CAPACITY, RetryEvent.INTERRUPTION)


def test_retry_is_said_once() -> None:
    """The old and the newer spelling exclude each other."""
    assert Profile(retry=True).retry is True
    assert Profile(retry=Retry(on_events=["error"], duration="2h")).retry == Retry(on_events=["error"], duration=7200)
    with pytest.raises(ConfigurationError, match="set only one of them"):
        Profile(retry=True, retry_policy=RetryPolicy(retry=True))


@pytest.mark.parametrize("nonsense", ["sometimes", {"on_events": ["rain"]}, {"duration": "off"}, 3])
def test_what_is_no_retry_is_refused(nonsense: Any) -> None:
    """A wrong retry names the field, without the names of pydantic's union members."""
    with pytest.raises(ConfigurationError, match=r"^Profile: retry(\.on_events\[0\]|\.duration)?: "):
        Profile(retry=nonsense)


@pytest.mark.parametrize(
    "field", ["backends", "regions", "availability_zones", "instance_types", "fleets", "instances"]
)
def test_lists_of_names_are_lists(field: str) -> None:
    """A lone name is answered with how the list is written, and a list that allows nothing is refused."""
    assert getattr(Profile.model_validate({field: ["a", "b"]}), field) == ("a", "b")
    with pytest.raises(ConfigurationError, match=rf"^Profile: {field}: 'aws' is not a list: write \['aws'\]$"):
        Profile.model_validate({field: "aws"})
    with pytest.raises(ConfigurationError, match=rf"^Profile: {field}: an empty list would allow nothing"):
        Profile.model_validate({field: []})
    with pytest.raises(ConfigurationError, match=rf"^Profile: {field}\[0\]: "):
        Profile.model_validate({field: [1]})


@pytest.mark.parametrize("price", [0, -1, float("nan"), float("inf"), "cheap"])
def test_a_price_is_a_positive_number(price: Any) -> None:
    """Zero, negative, infinite and other non-prices are refused."""
    with pytest.raises(ConfigurationError, match=r"^Profile: max_price: "):
        Profile(max_price=price)


def test_spot_policies() -> None:
    """The three policies are text, and a fourth is refused with the list of them."""
    assert [SpotPolicy("spot"), SpotPolicy("on-demand"), SpotPolicy("auto")] == list(SpotPolicy)
    assert Profile(spot_policy="on-demand").spot_policy is SpotPolicy.ONDEMAND
    with pytest.raises(ConfigurationError, match="'spot', 'on-demand' or 'auto', not 'cheap'"):
        Profile(spot_policy="cheap")


def test_a_profile_always_has_resources() -> None:
    """Not passing resources and passing none is the same."""
    assert Profile().resources == Profile(resources=None).resources == Resources()
    assert Profile().name == "(python)"


def test_idle_gpus_are_watched_for_five_minutes_at_least() -> None:
    """Shorter windows and impossible percentages are refused."""
    assert UtilizationPolicy(min_gpu_utilization=10, time_window="5m").time_window == 300
    with pytest.raises(ConfigurationError, match="time_window"):
        UtilizationPolicy(min_gpu_utilization=10, time_window="4m")
    with pytest.raises(ConfigurationError, match="min_gpu_utilization"):
        UtilizationPolicy(min_gpu_utilization=101, time_window="5m")


def test_a_profile_is_a_value() -> None:
    """A profile cannot be changed after it was made."""
    with pytest.raises(ConfigurationError, match="cannot be changed"):
        Profile().max_price = 3.0
