"""What a run asks for once its configuration, what was passed beside it, and the defaults are put together.

What was passed beside the configuration (the profile) wins over the configuration's own fields, which win over
defaults. All functions here are pure.
"""

from typing import Any

from dstack_core._models.configurations import AnyConfiguration, DevEnvironment, Service, Task
from dstack_core._models.offers import GpuRequirements, Requirements
from dstack_core._models.profiles import (
    Profile,
    ProfileParams,
    ProfileRetryPolicy,
    Retry,
    RetryEvent,
    SpotPolicy,
)
from dstack_core._models.resources import CPU, GPU, Memory, Range, Resources, merged

__all__ = ["effective_profile", "requirements_of"]

_HOUR = 3600
_DEFAULTS: dict[type, dict[str, Any]] = {
    Task: {"spot_policy": SpotPolicy.AUTO, "max_duration": 72 * _HOUR},
    Service: {"spot_policy": SpotPolicy.AUTO, "max_duration": "off"},
    DevEnvironment: {"spot_policy": SpotPolicy.ONDEMAND, "max_duration": 6 * _HOUR},
}


def effective_profile(configuration: AnyConfiguration, profile: Profile) -> Profile:
    """The profile that holds for a run, every field decided.

    Args:
        configuration: what runs.
        profile: what was passed beside it.

    Returns:
        A profile in which `spot_policy`, `retry_policy`, `max_duration` (seconds, or `"off"`; see
        `Profile.max_seconds`) and `stop_duration` are always set, `retry` has become part of `retry_policy`, and
        `resources` has set what either of the two set.
    """
    said = _said(configuration) | _said(profile)
    defaults = {"retry_policy": ProfileRetryPolicy(), "stop_duration": 15} | _DEFAULTS[type(configuration)]
    resources = merged(configuration.resources, profile.resources)
    return Profile(**{**defaults, **said, "resources": resources, "name": profile.name, "default": profile.default})


def _said(params: ProfileParams) -> dict[str, Any]:
    fields = ((name, getattr(params, name)) for name in ProfileParams.model_fields)
    said = {name: value for name, value in fields if value is not None}
    retry = said.pop("retry", None)
    return said if retry is None else said | {"retry_policy": _policy(retry)}


def _policy(retry: bool | Retry) -> ProfileRetryPolicy:
    every = tuple(RetryEvent)
    if isinstance(retry, bool):
        return ProfileRetryPolicy(retry=retry, on_events=every)
    return ProfileRetryPolicy(retry=True, limit=retry.duration, on_events=retry.on_events or every)


def requirements_of(configuration: AnyConfiguration, profile: Profile) -> Requirements:
    """What the run's jobs need from a machine, and what may be paid for it.

    Args:
        configuration: what runs.
        profile: what was passed beside it.

    Returns:
        Requirements whose `unset` names the sizes that are defaults rather than somebody's wish.
    """
    wanted = effective_profile(configuration, profile)
    return Requirements(
        **_sizes(wanted.resources),
        gpu=_gpu(wanted.resources.gpu),
        spot_policy=wanted.spot_policy or SpotPolicy.AUTO,
        max_price=wanted.max_price,
        regions=wanted.regions or (),
        zones=wanted.availability_zones or (),
        instance_types=wanted.instance_types or (),
        container=configuration.image is not None or bool(configuration.docker),
    )


def _sizes(resources: Resources) -> dict[str, Any]:
    return {
        "cpus": resources.cpu.count if resources.cpu else _ANY,
        "arch": resources.cpu.arch if resources.cpu else None,
        "memory_mib": _mib(resources.memory) or _ANY,
        "disk_mib": _mib(resources.disk.size) if resources.disk else _ANY,
        "shm_mib": resources.shm_size,
        "unset": _unset(resources),
    }


_ANY: Range[int] = Range(min=0)


def _unset(resources: Resources) -> frozenset[str]:
    fields = {"cpus": "cpu", "memory_mib": "memory", "disk_mib": "disk"}
    unset = {size for size, field in fields.items() if field not in resources.model_fields_set}
    return frozenset(unset | ({"cpus"} if _only_arch(resources.cpu) else set()))


def _only_arch(cpu: CPU | None) -> bool:
    return cpu is not None and "count" not in cpu.model_fields_set


def _gpu(gpu: GPU | None) -> GpuRequirements | None:
    if gpu is None or gpu == GPU(count="0.."):
        return None
    return GpuRequirements(
        vendor=gpu.vendor,
        names=gpu.name or (),
        count=gpu.count,
        memory_mib=_mib(gpu.memory),
        total_memory_mib=_mib(gpu.total_memory),
        compute_capability=gpu.compute_capability,
    )


def _mib(sizes: Range[Memory] | None) -> Range[int] | None:
    return None if sizes is None else Range(min=sizes.min, max=sizes.max)
