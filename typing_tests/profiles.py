"""Profiles, retry and spot policies."""

from typing import Literal, assert_type

from dstack.api import GPU, Profile, Resources, RetryPolicy, SpotPolicy


def profiles() -> None:
    """A profile, and what is read back of it."""
    profile = Profile(
        name="cheap",
        backends=["local"],
        resources=Resources(gpu=GPU(memory="24GB")),
        spot_policy="spot",
        retry_policy=RetryPolicy(limit=3600),
        max_duration="6h",
        max_price=1.5,
        default=True,
    )
    assert_type(profile.name, str)
    assert_type(profile.resources, Resources)
    assert_type(profile.spot_policy, SpotPolicy | None)
    assert_type(profile.retry_policy, RetryPolicy | None)
    assert_type(profile.max_seconds, int | None)
    assert_type(profile.default, bool)


def retries() -> None:
    """A retry policy in its forms."""
    policy = RetryPolicy(retry=True, limit="4h", on_events=["no-capacity", "interruption", "error"])
    assert_type(policy.retry, bool)
    assert_type(policy.limit, int | None)
    assert_type([event.value for event in policy.on_events], list[str])


def policies() -> None:
    """A spot policy is an enumeration of text."""
    assert_type(SpotPolicy.SPOT, Literal[SpotPolicy.SPOT])
    assert_type(SpotPolicy("on-demand"), SpotPolicy)
