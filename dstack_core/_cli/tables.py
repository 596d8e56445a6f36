"""What the commands show, for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dstack_core._client.backends import Backend
    from dstack_core._models.runs import Run

_COLOURS = {
    "running": "bold cyan",
    "done": "green",
    "configured": "green",
    "failed": "red",
    "not_installed": "red",
    "terminating": "yellow",
}
_UNREAD = 240
"""Columns where nobody looks: in a file or a pipe."""


def console(stderr: bool = False) -> Console:
    """Standard output or error: as wide as the terminal, or wide enough for programs."""
    found = Console(highlight=False, stderr=stderr)
    return found if found.is_terminal else Console(highlight=False, stderr=stderr, width=_UNREAD)


def table(*columns: str) -> Table:
    """A table without lines, whose last column folds."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns[:-1]:
        made.add_column(column, no_wrap=True)
    made.add_column(columns[-1], overflow="fold")
    return made


def _state(value: str) -> Text:
    return Text(value.replace("_", " "), style=_COLOURS.get(value, ""))


def plain(value: object) -> Text:
    """A cell with a value, or with a dash for none."""
    # As it is: brackets in a message are no markup.
    return Text("-" if value in (None, "") else str(value))


def show_backends(backends: Sequence[Backend]) -> None:
    """One line for each backend, with what is wrong with it."""
    if not backends:
        print("No backend is installed. Start with: pip install dstack-local")
        return
    rows = table("NAME", "BACKEND", "VERSION", "STATE", "REASON")
    for backend in backends:
        what = "\n".join([*([backend.reason] if backend.reason else []), *backend.problems])
        cells = (
            plain(backend.name),
            plain(backend.title),
            plain(backend.version),
            _state(backend.state),
            plain(what),
        )
        rows.add_row(*cells)
    console().print(rows)


def show_runs(runs: Sequence[Run], published: str | None = None) -> None:
    """One line for each run; `published` is the address under which the server publishes services."""
    if not runs:
        print("There are no runs yet.")
        return
    rows = table("NAME", "BACKEND", "PRICE", "STATUS", "SUBMITTED", "MESSAGE")
    for run in runs:
        latest = run.latest_job_submission
        data = latest.job_provisioning_data if latest else None
        rows.add_row(
            plain(run.run_name),
            plain(f"{data.backend} ({data.region})" if data else None),
            plain(f"${data.price:g}" if data else None),
            _state(run.status.value),
            plain(ago(run.submitted_at)),
            plain(_about(run, published)),
        )
    console().print(rows)


def _about(run: Run, published: str | None) -> str | None:
    """What there is to say about a run: of a service where it is, and what is wrong with its replicas."""
    service = run.service
    if service is None:
        return run.message
    state = f"{service.ready} of {service.replicas} ready"
    where = f"{published}{service.path} ({state})" if published else state
    return "\n".join(filter(None, (where, run.message, service.problem)))


def ago(when: datetime, now: datetime | None = None) -> str:
    """How long ago, as people say it."""
    seconds = int(((now or datetime.now(UTC)) - when).total_seconds())
    for name, size in (("day", 86400), ("hour", 3600), ("min", 60), ("sec", 1)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "now"
