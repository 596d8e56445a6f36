"""How a plan is shown."""

from __future__ import annotations

import pytest

from dstack.api import Task
from dstack_core._cli.plans import can_start, show_plan
from dstack_core._models.offers import Availability, Requirements
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import (
    InstanceOffer,
    InstanceResources,
    InstanceType,
    JobPlan,
    JobSpec,
    RunPlan,
    RunSpec,
)


def offer(backend: str, price: float, who: str, **facts: object) -> InstanceOffer:
    """One offer."""
    machine = InstanceType(name="small", resources=InstanceResources(cpus=2, memory_mib=8192))
    given = {"availability": Availability.AVAILABLE, "region": "here", "zone": None, "reason": None, **facts}
    return InstanceOffer(backend=backend, instance=machine, price=price, terminates_itself=who, **given)  # type: ignore[arg-type]  # fields by name


def plan(*offers: InstanceOffer) -> RunPlan:
    """A plan with these offers."""
    job = JobPlan(
        job_spec=JobSpec(job_name="x-0-0", requirements=Requirements()), offers=offers, total_offers=len(offers)
    )
    spec = RunSpec(configuration=Task(commands=["true"]), profile=Profile())
    return RunPlan(project_name="main", user="me", run_spec=spec, job_plans=(job,))


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("agent", "the machine ends itself"),
        ("cloud", "the cloud ends the machine"),
        ("nobody", "nobody ends the machine"),
    ],
)
def test_a_plan_says_who_ends_what_costs_money(capsys: pytest.CaptureFixture[str], who: str, said: str) -> None:
    """Of each backend once; not of what is free."""
    show_plan(plan(offer("dear", 1, who), offer("dear", 2, who), offer("local", 0, "agent")))
    lines = [line for line in capsys.readouterr().err.splitlines() if "switched off" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"If the server is switched off (dear): {said}")
    show_plan(plan(offer("dear", 1, who)), on_this_computer=True)
    assert f"If this computer is switched off (dear): {said}" in capsys.readouterr().err


def test_a_plan_says_what_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, and until when."""
    refused = offer("dear", 1, "agent", availability=Availability.NO_CAPACITY, reason="passed over until 12:03:00: dry")
    shown = plan(refused)
    show_plan(shown)
    assert "no capacity (passed over until 12:03:00: dry)" in capsys.readouterr().err
    assert not can_start(shown)
