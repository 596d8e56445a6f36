"""What type checkers accept runs, and what they refuse is refused at run time as well."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from dstack import api
from dstack.api import ConfigurationError

FOLDER = Path(__file__).parents[2] / "typing_tests"
# Needs a git repository with a remote.
ELSEWHERE = {"working_copy"}
# What is taken at run time, although a type checker wants it written as it is meant.
TAKEN = {"Task(commands=['true'], max_price='1.5')", "RetryPolicy(retry='yes')", "Range[int](min='1')"}


def programs() -> list[Callable[[], None]]:
    """The functions of `typing_tests` that need nothing but the API."""
    names = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "mistakes"]
    found = [function for name in names for function in own(importlib.import_module(f"typing_tests.{name}"))]
    return [function for function in found if function.__name__ not in ELSEWHERE]


def own(module: ModuleType) -> list[Callable[[], None]]:
    """Its own functions without arguments."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [f for _, f in functions if f.__module__ == module.__name__ and not inspect.signature(f).parameters]


@pytest.mark.parametrize("program", programs(), ids=lambda program: f"{program.__module__}.{program.__name__}")
def test_programs_that_are_typed_run(program: Callable[[], None]) -> None:
    """A program that type checkers accept does not fail on the values that it writes."""
    program()


def mistakes() -> list[str]:
    """The lines of `mistakes.py` that make a value."""
    tree = ast.parse((FOLDER / "mistakes.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    lines = [line for f in functions if f.name in ("configurations", "resources") for line in f.body[1:]]
    return [ast.unparse(line) for line in lines]


@pytest.mark.parametrize("line", mistakes())
def test_mistakes_are_refused_at_run_time(line: str) -> None:
    """What a type checker refuses raises an error as well, unless it is one of the few that are taken."""
    names = {name: getattr(api, name) for name in api.__all__}
    if line in TAKEN:
        assert eval(line, names)  # noqa: S307  # a line of our own
        return
    with pytest.raises((ConfigurationError, TypeError)):
        eval(line, names)  # noqa: S307  # a line of our own
