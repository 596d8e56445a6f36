"""Nothing on the API page is without a test."""

from __future__ import annotations

import pytest

from dstack import api
from tests.api_table import UNUSED, Item, items, page_sections, table


def test_the_page_has_every_name_once() -> None:
    """Each public name has its section on the page, and no section is of another name."""
    assert sorted(name for _, name in page_sections() if "." not in name) == api.__all__


def test_the_page_begins_with_the_sections_of_old() -> None:
    """The first sections, in their order, are those that the API page always had."""
    first = ["Client", "Task", "Service", "Run", "RunCollection", "RepoCollection", "BackendCollection"]
    assert [name for _, name in page_sections()][: len(first)] == first


@pytest.mark.parametrize("item", items(), ids=str)
def test_every_row_has_a_test(item: Item) -> None:
    """Each class, method, argument and field is used by a test, or is on the list that only shrinks."""
    users = table()[item]
    if str(item) in UNUSED:
        assert users == [], f"{item} has tests now: take it off the list"
    else:
        assert users, f"no test uses {item}"


def test_the_list_of_exceptions_names_rows() -> None:
    """An exception for what is not on the page is a mistake."""
    assert sorted(UNUSED.keys() - set(map(str, items()))) == []
