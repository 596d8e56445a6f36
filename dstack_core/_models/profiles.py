"""How and where a job may run: backends, spot, price, durations, retries.

Durations are whole seconds, or text: `"90s"`, `"30m"`, `"1h"`, `"2d"`, `"1w"`. Prices are USD per hour.
"""

import re
from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from dstack_core._models._base import Accepts, UserModel, ValueModel, default, shown
from dstack_core._models.resources import Resources, merged
from dstack_core.errors import ConfigurationError

__all__ = [
    "CreationPolicy",
    "Profile",
    "ProfileParams",
    "ProfileRetryPolicy",
    "Retry",
    "RetryEvent",
    "RetryPolicy",
    "Schedule",
    "SpotPolicy",
    "StartupOrder",
    "StopCriteria",
    "UtilizationPolicy",
    "profile_with",
]


class SpotPolicy(str, Enum):
    """Whether a job runs on spot instances, which are cheaper and may be taken away.

    Attributes:
        SPOT: on spot instances only.
        ONDEMAND: never on spot instances.
        AUTO: on either, whichever is cheaper.
    """

    SPOT = "spot"
    ONDEMAND = "on-demand"
    AUTO = "auto"


class RetryEvent(str, Enum):
    """What may happen to a job so that it is tried again.

    Attributes:
        NO_CAPACITY: no backend had a machine for it.
        INTERRUPTION: the cloud took its spot instance away.
        ERROR: its commands ended with another exit code than 0.
    """

    NO_CAPACITY = "no-capacity"
    INTERRUPTION = "interruption"
    ERROR = "error"


class CreationPolicy(str, Enum):
    """Whether a run may create instances, or only use idle ones.

    Attributes:
        REUSE: only idle instances.
        REUSE_OR_CREATE: idle instances first, then new ones.
    """

    REUSE = "reuse"
    REUSE_OR_CREATE = "reuse-or-create"


class StartupOrder(str, Enum):
    """Which nodes of a task start first.

    Attributes:
        ANY: in no order.
        MASTER_FIRST: the first node, then the others.
        WORKERS_FIRST: the first node last.
    """

    ANY = "any"
    MASTER_FIRST = "master-first"
    WORKERS_FIRST = "workers-first"


class StopCriteria(str, Enum):
    """When a task of several nodes is done.

    Attributes:
        ALL_DONE: when each node is.
        MASTER_DONE: when the first node is.
    """

    ALL_DONE = "all-done"
    MASTER_DONE = "master-done"


# ---------------------------------------------------------------------------------------------------------------------
# Durations and lists of names
# ---------------------------------------------------------------------------------------------------------------------

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST = 100 * 365 * 86400
_TEXT = r"\s*([0-9]{1,10})\s*([smhdw]?)\s*"


def _duration(value: Any) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(_TEXT, str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if match is None:
        raise ConfigurationError(
            f"{shown(value)} is not a duration: write seconds, or a number with s, m, h, d or w ('1h')"
        )
    seconds = int(match[1]) * _SECONDS[match[2] or "s"]
    if seconds > _LONGEST:
        raise ConfigurationError(f"{shown(value)} is longer than 100 years")
    return seconds


def _duration_or_off(value: Any) -> int | str | None:
    if value is False or value == "off":
        return "off"
    return None if value is True else _duration(value)


def _limit(value: Any) -> int | str | None:
    if _duration_or_off(value) == 0:
        raise ConfigurationError("0 would end every job at once: write 'off' for no limit")
    return _duration_or_off(value)


def _idle(value: Any) -> int | str | None:
    return "off" if value == -1 else _duration_or_off(value)


_SOME_SECONDS = Annotated[int, Field(ge=0, le=_LONGEST)] | Annotated[str, Field(pattern=f"^{_TEXT}$")]
_OFF = _SOME_SECONDS | Literal["off"] | bool | None
Duration = Annotated[Accepts[int, str], BeforeValidator(_duration, json_schema_input_type=_SOME_SECONDS)]
OptionalDuration = Annotated[
    Accepts[int | None, str], BeforeValidator(_duration, json_schema_input_type=_SOME_SECONDS | None)
]
MaxDuration = Annotated[
    Accepts[int | Literal["off"] | None, str | bool], BeforeValidator(_limit, json_schema_input_type=_OFF)
]
IdleDuration = Annotated[
    Accepts[int | Literal["off"] | None, str | bool],
    BeforeValidator(_idle, json_schema_input_type=_OFF | Literal[-1]),
]


def _some(value: Any) -> Any:
    if isinstance(value, str):
        raise ConfigurationError(f"{shown(value)} is not a list: write [{shown(value)}]")
    if value is not None and not isinstance(value, bool) and hasattr(value, "__len__") and len(value) == 0:
        raise ConfigurationError("an empty list would allow nothing: leave the field out to allow all")
    return value


Names = Annotated[
    Accepts[tuple[str, ...] | None, list[str]],
    BeforeValidator(_some, json_schema_input_type=Annotated[list[str], Field(min_length=1)] | None),
]

# ---------------------------------------------------------------------------------------------------------------------
# Retries
# ---------------------------------------------------------------------------------------------------------------------


class ProfileRetryPolicy(ValueModel):
    """Whether a run that did not get an instance, or lost it, is tried again.

    Attributes:
        retry: try again. Becomes true if a limit is set.
        limit: how long after its submission a run may be tried again, as `3600` or `"1h"`; `None` for no limit.
        on_events: after what; by default when there is no capacity and when a spot instance is taken away.
    """

    retry: bool = False
    limit: OptionalDuration = default(None)
    on_events: Accepts[tuple[RetryEvent, ...], list[str]] = default((RetryEvent.NO_CAPACITY, RetryEvent.INTERRUPTION))

    @model_validator(mode="before")
    @classmethod
    def _a_limit_means_retry(cls, value: Any) -> Any:
        return value | {"retry": True} if isinstance(value, dict) and value.get("limit") is not None else value


RetryPolicy = ProfileRetryPolicy


class Retry(ValueModel):
    """After what, and for how long, a run is tried again.

    Attributes:
        on_events: `"no-capacity"`, `"interruption"`, `"error"`; all of them if not set.
        duration: how long after its submission a run may be tried again, as `3600` or `"1h"`; `None` for no limit.
    """

    on_events: Accepts[tuple[RetryEvent, ...] | None, list[str]] = default(None)
    duration: OptionalDuration = default(None)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles
# ---------------------------------------------------------------------------------------------------------------------


class UtilizationPolicy(ValueModel):
    """Ends a run whose GPUs stay idle.

    Attributes:
        min_gpu_utilization: percent below which a GPU counts as idle.
        time_window: for how long all GPUs must be idle, in seconds or as `"10m"`; at least 5 minutes.
    """

    min_gpu_utilization: Annotated[int, Field(ge=0, le=100)]
    time_window: Annotated[Duration, Field(ge=300)]


class Schedule(ValueModel):
    """When a run starts.

    Attributes:
        cron: one cron expression (UTC) or several.
    """

    cron: str | tuple[str, ...]


class ProfileParams(UserModel):
    """What a profile and a configuration can both say. The profile's word wins.

    Attributes:
        backends: names of the backends that may be used; all if not set.
        regions: names of the regions that may be used; all that are configured if not set.
        availability_zones: names of the zones that may be used; all if not set.
        instance_types: the clouds' names of the instance types that may be used; all if not set.
        reservation: the cloud's name of a reservation to use.
        spot_policy: `"spot"`, `"on-demand"` or `"auto"` (either). Default: `auto` for tasks and services, `on-demand`
            for dev environments.
        retry_policy: whether to try again when there is no capacity or a spot instance is taken away. Default: no.
        retry: the newer spelling: `True`, or after what and for how long. Not together with `retry_policy`.
        max_duration: after which a run is stopped, as `3600` or `"1h"`; `"off"` for no limit. Default: 72 hours for
            tasks, 6 hours for dev environments, no limit for services.
        stop_duration: time a stopping job has between the polite request and the kill, as `30` or `"30s"`. Default: 15
            seconds.
        max_price: the most that may be paid, in USD per hour.
        creation_policy: `"reuse"` uses idle instances only. Default: `"reuse-or-create"`.
        idle_duration: for how long an instance is kept idle after the run, as `300` or `"5m"`; `"off"` for not at all.
        utilization_policy: ends a run whose GPUs stay idle.
        startup_order: which nodes start first: `"any"`, `"master-first"`, `"workers-first"`.
        stop_criteria: when a run of several nodes is done: `"all-done"` or `"master-done"`.
        schedule: when the run starts, again and again.
        fleets: names of the fleets that may be used.
        instances: names of the instances that may be used.
        tags: put on the cloud resources of the run.
        backend_options: settings that only one backend understands, by the backend's name.
    """

    backends: Names = default(None)
    regions: Names = default(None)
    availability_zones: Names = default(None)
    instance_types: Names = default(None)
    reservation: str | None = None
    spot_policy: Accepts[SpotPolicy | None, str] = default(None)
    retry_policy: ProfileRetryPolicy | None = None
    retry: bool | Retry | None = None
    max_duration: MaxDuration = default(None)
    stop_duration: OptionalDuration = default(None)
    max_price: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    creation_policy: Accepts[CreationPolicy | None, str] = default(None)
    idle_duration: IdleDuration = default(None)
    utilization_policy: UtilizationPolicy | None = None
    startup_order: Accepts[StartupOrder | None, str] = default(None)
    stop_criteria: Accepts[StopCriteria | None, str] = default(None)
    schedule: Schedule | None = None
    fleets: Names = default(None)
    instances: Names = default(None)
    tags: dict[str, str] | None = None
    backend_options: dict[str, dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_word_on_retries(self) -> Self:
        if self.retry is not None and self.retry_policy is not None:
            raise ConfigurationError("'retry' and 'retry_policy' say the same thing: set only one of them")
        return self


def _or_unset(value: Any) -> Any:
    return Resources() if value is None else value


class Profile(ProfileParams):
    """What is passed beside a configuration; what it says wins over the configuration's own fields.

    Attributes:
        name: a name for people.
        resources: what the job needs. Each of its fields that is set wins over the configuration's.
        default: used when no profile is named.
    """

    model_config = ConfigDict(frozen=True)

    name: str = "(python)"
    resources: Annotated[
        Accepts[Resources, None], BeforeValidator(_or_unset, json_schema_input_type=Resources | None)
    ] = default(Resources.model_construct(set()))
    default: bool = False

    @property
    def max_seconds(self) -> int | None:
        """`max_duration` in seconds; `None` when it is `"off"` or not set."""
        return self.max_duration if isinstance(self.max_duration, int) else None


def profile_with(profile: Profile | None, **given: Any) -> Profile:
    """A profile and what was given besides it, which wins; of `resources`, each field that was set.

    Args:
        profile: the profile; `None` for an empty one.
        given: fields of a profile; `None` for what was not given.
    """
    said = {name: value for name, value in given.items() if value is not None}
    own = {name: getattr(profile, name) for name in profile.model_fields_set} if profile is not None else {}
    if "retry_policy" in said:
        own.pop("retry", None)
    if "resources" in said and "resources" in own:
        said["resources"] = merged(own["resources"], said["resources"])
    return Profile(**own | said)
