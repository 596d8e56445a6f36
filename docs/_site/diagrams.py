"""Diagrams as tables: the site loads no program from elsewhere that could draw them."""

from __future__ import annotations

import re
from html import escape
from typing import Any

ARROW = re.compile(r"\s*(?P<before>\S+) --> (?P<after>[^:\s]+)(?:: (?P<events>.+))?")


def table(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A Mermaid state diagram as a table, in the order of its arrows; the arguments are those of a superfence."""
    header, *lines = filter(None, map(str.strip, source.splitlines()))
    arrows = [ARROW.fullmatch(line) for line in lines]
    if header != "stateDiagram-v2" or not all(arrows):
        raise ValueError("only state diagrams made of arrows can be shown as a table")
    rows = "".join(_row(arrow) for arrow in arrows if arrow)
    head = "<thead><tr><th>From</th><th>When</th><th>To</th></tr></thead>"
    return f'<div class="{escape(css_class)}"><table>{head}<tbody>{rows}</tbody></table></div>'


def _row(arrow: re.Match[str]) -> str:
    before, events = arrow["before"], arrow["events"] or ""
    start = "<em>start</em>" if before == "[*]" else _code(before)
    when = ", ".join(_code(event.strip()) for event in events.split(",") if event.strip())
    return f"<tr><td>{start}</td><td>{when}</td><td>{_code(arrow['after'])}</td></tr>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
