"""`dstack.api`: its names, and what importing it costs."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import dstack.api
import dstack_core
from dstack.api import RunStatus, Task

HEAVY = ["httpx", "httpcore", "pluggy", "sqlalchemy", "fastapi", "starlette", "uvicorn", "yaml", "typer", "rich"]


def test_every_name_is_there_and_listed_in_order() -> None:
    """`__all__` is sorted, and each of its names can be had."""
    assert dstack.api.__all__ == sorted(dstack.api.__all__)
    assert set(dstack.api.__all__) <= set(dir(dstack.api))
    for name in dstack.api.__all__:
        assert getattr(dstack.api, name)


def test_classes_show_the_door() -> None:
    """Tracebacks and help name the public path; errors have a door of their own."""
    for name in dstack.api.__all__:
        assert getattr(dstack.api, name).__module__ in {"dstack.api", "dstack_core.errors"}, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name says so, as for any module."""
    with pytest.raises(AttributeError, match="Tusk"):
        dstack.api.Tusk  # type: ignore[attr-defined]  # noqa: B018  # the misspelling is the test


def test_what_the_door_shows_can_be_pickled() -> None:
    """The public path leads back to the same class."""
    task = Task(commands=["true"], ports=["*:80"])
    for value in (task, RunStatus.DONE):
        assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301  # its own bytes


@pytest.mark.parametrize("names", ["Client, Task", "*"])
def test_importing_loads_nothing_heavy(names: str) -> None:
    """What only the server, the first request or the command line needs is not loaded."""
    code = f"from dstack.api import {names}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_version_is_that_of_the_distribution() -> None:
    """Client and server compare it, so it must be right."""
    from importlib.metadata import version

    assert dstack_core.__version__ == version("dstack-core")
