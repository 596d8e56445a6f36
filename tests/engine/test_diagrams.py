"""The docs show what the tables say."""

from __future__ import annotations

from tests.support.diagrams import PAGE, page


def test_the_page_is_drawn_from_the_tables() -> None:
    """Out of date: run `python -m tests.support.diagrams`."""
    assert PAGE.read_text() == page()
