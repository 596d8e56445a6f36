"""What a run asks for when configuration, profile and defaults are put together."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core._models.configurations import AnyConfiguration, DevEnvironment, Service, Task
from dstack_core._models.offers import GpuRequirements, Requirements
from dstack_core._models.profiles import Profile, Retry, RetryEvent, RetryPolicy, SpotPolicy
from dstack_core._models.requirements import effective_profile, requirements_of
from dstack_core._models.resources import GPU, Range, Resources

TASK = Task(commands=["x"])
SERVICE = Service(commands=["x"], port=80)
DEV = DevEnvironment()


def of(resources: Resources) -> Requirements:
    """The requirements of a task with these resources."""
    return requirements_of(TASK, Profile(resources=resources))


def test_a_plain_task_asks_nothing_of_this_computer() -> None:
    """The defaults size machines that are made to order; of one that exists they ask for nothing."""
    wanted = requirements_of(TASK, Profile())
    assert (wanted.cpus, wanted.memory_mib, wanted.disk_mib) == (Range(2), Range(8192), Range(102400))
    assert wanted.unset == {"cpus", "memory_mib", "disk_mib"}
    here = wanted.for_existing_machine()
    assert (here.cpus, here.memory_mib, here.disk_mib) == (Range(0), Range(0), Range(0))


def test_what_is_set_is_asked_of_every_machine() -> None:
    """A wish stays one, even if it equals the default."""
    wanted = of(Resources(cpu=2, memory="8GB", disk="100GB"))
    assert wanted.unset == frozenset()
    assert wanted.for_existing_machine() == wanted


def test_sizes_are_mib() -> None:
    """Every size of the requirements is a plain number of MiB."""
    gpu = GPU(memory="24GB", total_memory="48GB")
    wanted = of(Resources(memory="16GB..64GB", disk="50GB", shm_size="1GB", gpu=gpu))
    assert wanted.memory_mib == Range(16384, 65536)
    assert wanted.disk_mib == Range(51200)
    assert wanted.shm_mib == 1024
    assert wanted.gpu == GpuRequirements(memory_mib=Range(24576), total_memory_mib=Range(49152))
    written = wanted.model_dump(mode="json")
    assert (written["memory_mib"], written["shm_mib"]) == ("16384..65536", 1024)
    assert Requirements.model_validate(written) == wanted


def test_an_architecture_alone_leaves_the_number_open() -> None:
    """`cpu="arm"` asks for ARM, not for two CPUs of it on a machine that exists."""
    wanted = of(Resources(cpu="arm"))
    assert wanted.arch == "arm"
    assert wanted.unset == {"cpus", "memory_mib", "disk_mib"}


def test_none_asks_for_nothing_anywhere() -> None:
    """`None` takes the default away also from machines that are made to order."""
    wanted = of(Resources(cpu=None, memory=None, disk=None, gpu=None))
    assert (wanted.cpus, wanted.memory_mib, wanted.disk_mib, wanted.gpu) == (Range(0), Range(0), Range(0), None)
    assert wanted.unset == frozenset()


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [
        (None, None),
        (0, None),
        ("0..", None),
        (1, GpuRequirements(count=Range(1))),
        ("0..0", GpuRequirements(count=Range(0, 0))),
        ("A100:2", GpuRequirements(names=("A100",), count=Range(2))),
        ("amd:24GB", GpuRequirements(vendor="amd", memory_mib=Range(24576))),
    ],
)
def test_gpus(gpu: Any, wanted: GpuRequirements | None) -> None:
    """None or more is no requirement; everything else is one."""
    assert of(Resources(gpu=gpu)).gpu == wanted


@pytest.mark.parametrize(
    ("configuration", "spot", "seconds"),
    [(TASK, SpotPolicy.AUTO, 259200), (SERVICE, SpotPolicy.AUTO, None), (DEV, SpotPolicy.ONDEMAND, 21600)],
)
def test_defaults_by_kind(configuration: AnyConfiguration, spot: SpotPolicy, seconds: int | None) -> None:
    """Tasks last three days, services for ever, dev environments six hours without being interrupted."""
    assert requirements_of(configuration, Profile()).spot_policy is spot
    effective = effective_profile(configuration, Profile())
    assert effective.spot_policy is spot
    assert effective.max_seconds == seconds
    assert effective.retry_policy == RetryPolicy(retry=False)
    assert effective.stop_duration == 15


def test_the_profile_wins_over_the_configuration_and_both_over_defaults() -> None:
    """Field by field: what was passed at submit, then what the configuration says, then the default."""
    task = Task(
        commands=["x"],
        spot_policy="spot",
        max_price=2,
        max_duration="1h",
        backends=["aws"],
        regions=["eu"],
        availability_zones=["eu-1"],
        instance_types=["big"],
    )
    said = effective_profile(task, Profile())
    assert (said.spot_policy, said.max_price, said.max_seconds, said.backends) == (SpotPolicy.SPOT, 2, 3600, ("aws",))
    passed = Profile(
        spot_policy="on-demand", max_price=1, max_duration="off", backends=["gcp", "local"], regions=["us"]
    )
    wins = effective_profile(task, passed)
    assert (wins.spot_policy, wins.max_price, wins.max_seconds) == (SpotPolicy.ONDEMAND, 1, None)
    assert wins.backends == ("gcp", "local")
    wanted = requirements_of(task, passed)
    assert (wanted.regions, wanted.zones, wanted.instance_types) == (("us",), ("eu-1",), ("big",))
    assert (wanted.spot_policy, wanted.max_price) == (SpotPolicy.ONDEMAND, 1)


def test_resources_are_merged_field_by_field() -> None:
    """The profile's memory does not throw the configuration's GPU away."""
    task = Task(commands=["x"], resources=Resources(gpu="A100", memory="8GB"))
    wanted = requirements_of(task, Profile(resources=Resources(memory="32GB")))
    assert wanted.memory_mib == Range(32768)
    assert wanted.gpu == GpuRequirements(names=("A100",))
    assert wanted.unset == {"cpus", "disk_mib"}


def test_an_image_needs_a_container_engine() -> None:
    """So does a job with an engine of its own."""
    assert not requirements_of(TASK, Profile()).container
    assert requirements_of(Task(image="nginx"), Profile()).container
    assert requirements_of(Task(commands=["x"], docker=True), Profile()).container


def test_both_spellings_of_retries_become_one() -> None:
    """`retry` retries after everything unless it says otherwise, and the profile's spelling wins whichever it is."""
    every = tuple(RetryEvent)
    assert effective_profile(Task(commands=["x"], retry=True), Profile()).retry_policy == RetryPolicy(
        retry=True, on_events=every
    )
    hourly = Retry(on_events=[RetryEvent.ERROR], duration="1h")
    assert effective_profile(Task(commands=["x"], retry=hourly), Profile()).retry_policy == RetryPolicy(
        retry=True, limit=3600, on_events=(RetryEvent.ERROR,)
    )
    passed = Profile(retry_policy=RetryPolicy(retry=False))
    effective = effective_profile(Task(commands=["x"], retry=True), passed)
    assert effective.retry_policy == RetryPolicy(retry=False)
    assert effective.retry is None


def test_what_neither_says_stays_open() -> None:
    """Every other field is passed on from whoever set it."""
    task = Task(commands=["x"], tags={"team": "a"}, idle_duration="5m")
    effective = effective_profile(task, Profile(name="mine", tags={"team": "b"}))
    assert (effective.name, effective.tags, effective.idle_duration) == ("mine", {"team": "b"}, 300)
    assert effective.fleets is None


def test_putting_together_is_repeatable() -> None:
    """The effective profile of an effective profile is itself, also after a round trip."""
    task = Task(commands=["x"], retry=True, max_duration="off", resources=Resources(cpu="arm", gpu="24GB:2"))
    once = effective_profile(task, Profile(max_price=3))
    assert effective_profile(task, once) == once
    assert Profile.model_validate_json(once.model_dump_json()) == once
    assert requirements_of(task, once) == requirements_of(task, Profile(max_price=3))
