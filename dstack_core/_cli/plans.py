"""How a plan is shown before it is carried out: what was asked for, and what can be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dstack_core._cli.tables import console, plain, table

if TYPE_CHECKING:
    from rich.table import Table

    from dstack_core._models.offers import GpuRequirements, Requirements
    from dstack_core._models.runs import InstanceOffer, JobPlan, JobSpec, RunPlan

_SHOWN = 5
_AVAILABILITY = {"available": "green", "no_capacity": "red", "no_quota": "red", "unknown": ""}


def show_plan(plan: RunPlan, *, on_this_computer: bool = False) -> None:
    """What was asked for, then the offers, cheapest first, and why others are missing; on standard error.

    Args:
        plan: the plan.
        on_this_computer: its server is, so that both are switched off together.
    """
    facts = table("", "")
    facts.show_header = False
    for name, value in _facts(plan):
        facts.add_row(Text(name, style="bold"), plain(value))
    shown = console(stderr=True)
    shown.print(facts)
    for job in plan.job_plans[:1]:
        shown.print(*_offers(job, "this computer" if on_this_computer else "the server"), sep="\n")


def can_start(plan: RunPlan) -> bool:
    """Whether each job has an offer, or will wait for one."""
    return all(
        job.job_spec.retry_policy.retry or any(offer.availability.value in _STARTS for offer in job.offers)
        for job in plan.job_plans
    )


_STARTS = ("available", "unknown")


def _facts(plan: RunPlan) -> Iterator[tuple[str, object]]:
    spec = plan.run_spec
    job = plan.job_plans[0].job_spec
    yield "Configuration", spec.configuration_path
    yield "Type", spec.configuration.type
    yield "Name", spec.run_name or "made up"
    yield "Project", plan.project_name
    yield "User", plan.user
    if spec.profile.name not in {"(python)", "default"}:
        yield "Profile", spec.profile.name
    if len(plan.job_plans) > 1:
        yield "Jobs", len(plan.job_plans)
    yield from _limits(job)


def _limits(job: JobSpec) -> Iterator[tuple[str, object]]:
    needs = job.requirements
    yield "Resources", ", ".join(_sizes(needs)) or "any"
    if needs.container:
        yield "Image", job.image_name
    yield "Spot policy", needs.spot_policy.value
    yield "Max price", f"${needs.max_price:g} an hour" if needs.max_price is not None else "off"
    yield "Max duration", _duration(job.max_duration)
    if job.ide is not None or job.inactivity_duration is not None:
        yield "Inactivity", _duration(job.inactivity_duration)
    if job.retry_policy.retry:
        yield "Retry", f"for {_duration(job.retry_policy.limit)}" if job.retry_policy.limit else "without end"


def _sizes(needs: Requirements) -> Iterator[str]:
    """What somebody asked for; defaults size only machines that are made to order."""
    if "cpus" not in needs.unset:
        yield f"cpu={_range(needs.cpus)}"
    if "memory_mib" not in needs.unset:
        yield f"memory={_range(needs.memory_mib, 'GB')}"
    if "disk_mib" not in needs.unset:
        yield f"disk={_range(needs.disk_mib, 'GB')}"
    if needs.gpu is not None:
        yield f"gpu={':'.join(_gpu(needs.gpu))}"


def _gpu(gpu: GpuRequirements) -> Iterator[str]:
    if gpu.names or gpu.vendor:
        yield ",".join(gpu.names) or str(gpu.vendor)
    if gpu.memory_mib is not None:
        yield _range(gpu.memory_mib, "GB")
    yield _range(gpu.count)


def _range(sizes: Any, unit: str = "") -> str:
    """`2..`, `16GB..32GB`, or one number for an exact size."""
    ends = [_size(end, unit) if end else "" for end in (sizes.min, sizes.max)]
    return ends[0] if ends[0] == ends[1] and ends[0] else "..".join(ends)


def _size(number: int, unit: str) -> str:
    return f"{number / 1024:g}{unit}" if unit else str(number)


def _duration(seconds: int | None) -> str:
    if seconds is None:
        return "off"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _offers(job: JobPlan, server: str) -> Iterator[Table | Text]:
    yield Text()
    if job.offers:
        rows = table("#", "BACKEND", "REGION", "INSTANCE", "RESOURCES", "PRICE", "AVAILABILITY")
        for number, offer in enumerate(job.offers[:_SHOWN], 1):
            rows.add_row(str(number), *_cells(offer))
        yield rows
    else:
        yield Text("There is no offer that fits.")
    if job.total_offers > _SHOWN:
        yield Text(f"Shown: {_SHOWN} of {job.total_offers} offers, the cheapest first.")
    for line in _who_ends_it(job.offers, server):
        yield Text(line)
    for note in job.notes:
        yield Text(f"  {note}")
    yield Text()


_ENDS = {
    "agent": "the machine ends itself, some minutes after its job is over",
    "cloud": "the cloud ends the machine when its time is over",
    "nobody": "nobody ends the machine: it costs money until a server is back",
}


def _who_ends_it(offers: Sequence[InstanceOffer], server: str) -> Iterator[str]:
    """Who sees to the end of what costs money if the server, perhaps this computer, is switched off."""
    for backend, who in sorted({(offer.backend, offer.terminates_itself) for offer in offers if offer.price}):
        yield f"If {server} is switched off ({backend}): {_ENDS.get(who, who)}."


def _cells(offer: InstanceOffer) -> Iterator[Text]:
    price = f"${offer.price:g}" if offer.price else "free"
    for value in (offer.backend, offer.region, offer.instance.name, offer.instance.resources.description, price):
        yield plain(value)
    state = offer.availability.value
    said = f" ({offer.reason})" if offer.reason else ""
    yield Text(state.replace("_", " ") + said, style=_AVAILABILITY.get(state, ""))
