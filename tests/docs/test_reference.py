"""The reference for authors of backends has a heading for each hook, and the pages agree with what they describe."""

from __future__ import annotations

import inspect
import re

import pytest

from dstack_core import _hookspecs
from tests.support.blocks import ROOT

PLUGIN_PAGE = (ROOT / "docs" / "reference" / "plugin.md").read_text(encoding="utf-8")
HOOKS = [name for name in _hookspecs.__all__ if name.startswith("dstack_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_a_heading_with_its_exact_signature(hook: str) -> None:
    """The heading shows arguments, types and result as they are, and the contract is rendered below it."""
    signature = str(inspect.signature(getattr(_hookspecs, hook))).replace("'", "")
    heading = rf"^### `{re.escape(hook + signature)}` {{ #dstack_core\.plugin\.{hook} .*}}\n\n"
    assert re.search(rf"{heading}::: dstack_core\._hookspecs\.{hook}$", PLUGIN_PAGE, re.MULTILINE)


def test_the_page_of_hooks_has_no_other_ones() -> None:
    """A hook that is gone leaves no heading behind."""
    assert sorted(re.findall(r"^### `(dstack_\w+)\(", PLUGIN_PAGE, re.MULTILINE)) == sorted(HOOKS)


def test_the_usage_example_is_that_of_old() -> None:
    """The program of the API page is the one that the API page always had, word for word."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    example = page.partition("#### Usage example\n")[2].partition("```python\n")[2].partition("```")[0]
    program = (ROOT / "tests" / "e2e" / "test_page_program.py").read_text(encoding="utf-8")
    assert example in program


def test_architecture_is_written_once() -> None:
    """The page is the file at the root of the repository."""
    assert (ROOT / "docs" / "concepts" / "architecture.md").read_text() == '--8<-- "ARCHITECTURE.md"\n'
