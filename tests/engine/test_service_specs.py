"""From a service to its jobs; what a service may not ask for yet is refused with the cure."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core._engine.specs import agent_job_spec, job_specs
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import JobSpec, RunSpec
from dstack_core._models.services import Service
from dstack_core.errors import ConfigurationError


def jobs(**fields: Any) -> tuple[JobSpec, ...]:
    """The jobs of a service."""
    service = Service(**{"port": 8000, "commands": ["serve"], **fields})
    return job_specs(RunSpec(configuration=service, profile=Profile()), "svc")


def test_one_job_for_each_replica() -> None:
    """Numbered, named, with the port and the probes, and no limit of time."""
    found = jobs(replicas=3, env={"A": "b"}, probes=[{"type": "http", "url": "/up"}], setup=["prepare"])
    assert [(job.replica_num, job.job_num, job.job_name) for job in found] == [
        (0, 0, "svc-0-0"),
        (1, 0, "svc-1-0"),
        (2, 0, "svc-2-0"),
    ]
    first = found[0]
    assert (first.service_port, first.max_duration, first.replicas) == (8000, None, 3)
    assert first.env == {"A": "b", "DSTACK_RUN_NAME": "svc"}
    assert first.commands == ("prepare", "serve")
    assert [probe.url for probe in first.probes] == ["/up"]
    assert [(app.port, app.map_to_port) for app in first.app_specs] == [(8000, 80)]


def test_a_single_replica_may_have_the_port_for_itself() -> None:
    """Several may not: they may meet on one machine."""
    assert agent_job_spec(jobs()[0]).keep_port
    assert not agent_job_spec(jobs(replicas=2)[0]).keep_port
    assert agent_job_spec(jobs()[0]).service_port == 8000


SCALING = {"metric": "rps", "target": 10}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"replicas": "1..3", "scaling": SCALING}, "'scaling' .* replicas=2"),
        ({"scaling": SCALING}, "'scaling' .* replicas=2"),
        ({"replicas": 0}, "replicas='0..0' .* at least one: replicas=2"),
        ({"gateway": "mine"}, "'gateway' .* at the run's url"),
        ({"gateway": True}, "'gateway' .* at the run's url"),
        ({"https": True}, "'https' .* proxy with TLS"),
        ({"rate_limits": [{"rps": 1}]}, "'rate_limits' .* in the service itself"),
        ({"groups": [{"name": "a"}]}, "'groups' is not carried out"),
        ({"model": {"name": "m", "format": "tgi"}}, "'format: tgi' .* use format: openai"),
        ({"volumes": ["v:/data"]}, "Service: 'volumes' is not carried out .* to run the service"),
    ],
)
def test_what_is_not_carried_out_is_refused(fields: dict[str, Any], words: str) -> None:
    """Never passed over: which field, and what to do instead."""
    with pytest.raises(ConfigurationError, match=words):
        jobs(**fields)


@pytest.mark.parametrize("fields", [{"gateway": False}, {"https": "auto"}, {"https": False}, {"model": "m"}])
def test_what_means_no_more_than_is_done_is_accepted(fields: dict[str, Any]) -> None:
    """No gateway, and no certificate that there would have to be."""
    assert len(jobs(**fields)) == 1
