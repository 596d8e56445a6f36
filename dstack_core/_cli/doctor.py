"""What `dstack doctor` shows: instances, backends, what is passed over, and what needs a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from dstack_core._cli.tables import ago, console, plain, table
from dstack_core._models.wire import InstanceId

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from dstack_core._models.wire import (
        DoctorBackend,
        DoctorInstance,
        DoctorReport,
        DoctorShortage,
        FixReport,
    )

_STYLES = {
    "ours": "green",
    "arriving": "cyan",
    "young": "yellow",
    "missing": "yellow",
    "over": "bold red",
    "double": "bold red",
    "unknown": "bold red",
    "lost": "bold red",
    "strange": "bold red",
}


def show_report(report: DoctorReport, *, stderr: bool = False) -> None:
    """Everything, the verdict last; where nothing is to be said, nothing is."""
    console(stderr=stderr).print(*_parts(report), sep="\n")


def _parts(report: DoctorReport) -> Iterator[RenderableType]:
    yield from _section(f"Instances of this server ({report.owner})", _instances(report.instances, report.at))
    if any(backend.lists_others for backend in report.backends):
        yield from _section("Instances of other owners, which are never touched", _others(report.others))
    yield from _section("Backends", _backends(report.backends, report.at))
    if report.shortages:
        yield from _section("Passed over for a while", _shortages(report.shortages))
    if report.report_only:
        yield Text("This server only reports what should not be there (DSTACK_SWEEPER=report).\n")
    yield from _verdict(report)


def _section(title: str, body: RenderableType) -> Iterator[RenderableType]:
    yield Text(title, style="bold underline")
    yield body
    yield Text()


def _instances(instances: Sequence[DoctorInstance], now: datetime) -> RenderableType:
    if not instances:
        return Text("none", style="dim")
    rows = table("BACKEND", "ID", "REGION", "STATE", "RUN", "AGE", "PRICE", "COST", "WHAT")
    for one in instances:
        rows.add_row(
            plain(one.backend),
            plain(one.id),
            plain(one.zone or one.region),
            plain(one.state or one.status),
            plain(one.run_name),
            plain(_age(one.created_at, now)),
            plain(_dollars(one.price)),
            plain(_dollars(one.cost)),
            Text(_what(one), style=_STYLES.get(one.verdict, "")),
        )
    return rows


def _what(one: DoctorInstance) -> str:
    said = f": {one.message}" if one.message else ""
    return f"is being ended{said}" if one.ending else one.reason + said


def _age(since: datetime, now: datetime) -> str:
    return ago(since, now).removesuffix(" ago")


def _dollars(amount: float | None) -> str | None:
    if amount is None:
        return None
    return f"${amount:.2f}" if amount else "free"


def _others(others: Sequence[DoctorInstance]) -> RenderableType:
    if not others:
        return Text("none", style="dim")
    rows = table("BACKEND", "ID", "REGION", "STATE", "OWNER")
    for one in others:
        cells = (one.backend, one.id, one.zone or one.region, one.state, one.owner)
        rows.add_row(*map(plain, cells))
    return rows


def _backends(backends: Sequence[DoctorBackend], now: datetime) -> RenderableType:
    if not backends:
        return Text("none", style="dim")
    rows = table("NAME", "INSTANCES", "LOOKED THROUGH", "PROBLEM")
    for one in backends:
        looked = ago(one.swept_at, now) if one.swept_at else "not yet"
        problem = Text(one.problem, style="bold red") if one.problem else plain(None)
        rows.add_row(plain(one.name), plain(one.instances), plain(looked), problem)
    return rows


def _shortages(shortages: Sequence[DoctorShortage]) -> RenderableType:
    rows = table("BACKEND", "WHERE", "WHAT", "MARKET", "UNTIL", "REASON")
    for one in shortages:
        what = one.machine or "everything"
        family = f"quota of {what}" if one.kind == "quota" else what
        until = f"{one.until:%H:%M:%S} UTC"
        cells = (one.backend, one.zone or one.region or "everywhere", family, one.market or "all", until, one.message)
        rows.add_row(*map(plain, cells))
    return rows


def _verdict(report: DoctorReport) -> Iterator[RenderableType]:
    orphans = [one for one in report.instances if one.is_orphan and not one.ending]
    for problem in report.problems:
        yield Text.assemble(("! ", "bold red"), problem)
    if orphans:
        many = len(orphans) > 1
        which = f"{len(orphans)} instances" if many else "1 instance"
        yield Text(
            f"{which} should not be there and {'are' if many else 'is'} ended when seen again; "
            f"`dstack doctor --fix` ends {'them' if many else 'it'} now."
        )
    elif not report.problems:
        yield Text("Nothing needs a person.", style="green")


def ask_for(orphans: Sequence[DoctorInstance]) -> str:
    """The question before the end of instances."""
    return f"End {len(orphans)} instance{'s' if len(orphans) > 1 else ''} that should not be there?"


def ids_of(orphans: Sequence[DoctorInstance]) -> list[InstanceId]:
    """What to send to the server."""
    return [InstanceId(backend=one.backend, id=one.id) for one in orphans if one.id is not None]


def show_fixed(report: FixReport) -> None:
    """What came of each."""
    shown = console(stderr=True)
    for one in report.ended:
        said = f"is asked for, again and again: {one.problem}" if one.problem else "is confirmed"
        shown.print(Text(f"The end of {one.id} ({one.backend}) {said}"))
    for left in report.left:
        shown.print(Text(f"{left.id} ({left.backend}) is left alone: it is not what it seemed"))
