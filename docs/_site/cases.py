"""The cases of the conformance suite as a table: what each one asks is its docstring, and nobody writes it twice."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from dstack_core.testing import _suite


def table(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """The cases of one group, by the name of its class; the arguments are those of a superfence."""
    group = getattr(_suite, source.strip())
    rows = "".join(_row(name, case) for name, case in cases(group))
    head = "<thead><tr><th>Case</th><th>What it asks</th><th>Needs</th></tr></thead>"
    return f'<div class="{escape(css_class)}"><table>{head}<tbody>{rows}</tbody></table></div>'


def cases(group: type) -> Iterator[tuple[str, Any]]:
    """Name and function of each case, in the order in which they are written."""
    return ((name, case) for name, case in vars(group).items() if name.startswith("test_"))


def _row(name: str, case: Any) -> str:
    asked = _inline(" ".join((inspect.getdoc(case) or "").split()))
    tries = sum(1 for _ in _parameters(case))
    times = f" &times; {tries}" if tries > 1 else ""
    needs = ", ".join(f"<code>{escape(need.label)}</code>" for need in getattr(case, "needs", ()))
    return f"<tr><td><code>{escape(name)}</code>{times}</td><td>{asked}</td><td>{needs}</td></tr>"


def _parameters(case: Any) -> Iterator[tuple[Any, ...]]:
    """Each combination that a case is tried with."""
    combined: list[tuple[Any, ...]] = [()]
    for mark in getattr(case, "pytestmark", ()):
        if mark.name == "parametrize":
            combined = [(*others, value) for others in combined for value in mark.args[1]]
    return iter(combined)


def _inline(text: str) -> str:
    """A docstring's line: what stands between back-ticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
