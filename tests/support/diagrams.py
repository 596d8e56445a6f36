"""Draws `docs/transitions.md` from the engine's tables: `python -m tests.support.diagrams`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from dstack_core._engine.transitions import INSTANCE_TRANSITIONS, JOB_TRANSITIONS, InstanceStatus
from dstack_core._models.runs import RunStatus

Status = TypeVar("Status", bound=Enum)
Event = TypeVar("Event", bound=Enum)

PAGE = Path(__file__).parents[2] / "docs" / "transitions.md"

TEXT = """\
# Transitions

Drawn from the tables in `dstack_core/_engine/transitions.py`; a test compares this page with them. What is not drawn
cannot happen: an observation without an arrow leaves the object as it is.

## An instance, from its intent to its confirmed end

{instances}

Only `failed` (it certainly never existed) and `terminated` (the cloud confirmed that it is gone) are ends.

## One attempt of a job

{jobs}

`terminated`, `aborted`, `failed` and `done` are final. Another attempt is another row, so nothing leaves them.
"""


def page() -> str:
    """The whole page."""
    instances = diagram(INSTANCE_TRANSITIONS, InstanceStatus.INTENT)
    return TEXT.format(instances=instances, jobs=diagram(JOB_TRANSITIONS, RunStatus.SUBMITTED))


def diagram(table: Mapping[tuple[Status, Event], Status], first: Enum) -> str:
    """A state diagram in mermaid; the events between the same two statuses share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (status, event), target in table.items():
        arrows.setdefault((status.value, target.value), []).append(event.value)
    lines = [f"    {source} --> {target}: {', '.join(events)}" for (source, target), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}", *lines, "```"])


if __name__ == "__main__":
    PAGE.write_text(page())
