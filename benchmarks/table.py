"""A figure, what it is held against, and the table of all of them."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of ours.

    Attributes:
        what: what was measured, with the statistic.
        ours: the figure.
        unit: of every number in the row.
        floor: what it must reach; `None` when nothing is promised.
        aim: where the field's limit lies.
        because: where floor and aim come from, for example `"1/5 of dstack"`.
        peers: the same figure of others.
        more_is_better: rates, not durations.
    """

    what: str
    ours: float
    unit: str
    floor: float | None = None
    aim: float | None = None
    because: str = ""
    peers: dict[str, float] = field(default_factory=dict)
    more_is_better: bool = False

    @property
    def holds(self) -> bool:
        """True when the floor is reached."""
        return self.floor is None or self.reaches(self.floor)

    def reaches(self, limit: float) -> bool:
        """True when the figure is as good as `limit`."""
        return self.ours >= limit if self.more_is_better else self.ours <= limit

    @property
    def verdict(self) -> str:
        """`aim`, `floor` or `MISSED`: the best that was reached."""
        if not self.holds:
            return "MISSED"
        if self.aim is not None and self.reaches(self.aim):
            return "aim"
        return "floor" if self.floor is not None else ""

    def ratios(self) -> str:
        """Each peer's figure, and how many times better ours is."""
        return "\n".join(
            f"{name} {number(figure)} ({self.times_better(figure)})" for name, figure in self.peers.items()
        )

    def times_better(self, figure: float) -> str:
        """How ours compares with a peer's figure; both are measured, so either can be too small to see."""
        better, worse = (self.ours, figure) if self.more_is_better else (figure, self.ours)
        return f"{better / worse:.1f}x" if worse else "ours is too small to measure"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(rows: list[Row]) -> None:
    """Prints all rows for people."""
    title = f"Python {platform.python_version()}, {platform.machine()}, {platform.system()}"
    table = Table(title=title, show_lines=True)
    for heading in ("what", "ours", "unit", "floor", "aim", "from", "reached", "peers (ours is better by)"):
        table.add_column(heading, justify="right" if heading in {"ours", "floor", "aim"} else "left")
    for row in rows:
        figures = (number(row.ours), row.unit, number(row.floor), number(row.aim))
        table.add_row(row.what, *figures, row.because, row.verdict, row.ratios())
    Console(width=170).print(table)


def write_json(rows: list[Row], path: Path) -> None:
    """Keeps all rows for machines."""
    path.write_text(json.dumps([asdict(row) | {"holds": row.holds} for row in rows], indent=2) + "\n")
