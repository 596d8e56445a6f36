"""Importing the models of a task is cheap, since every program pays for it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from dstack_core._models.configurations import Task
from dstack_core._models.resources import GPU, Resources
heavy = {"asyncio", "difflib", "httpx", "pluggy", "sqlalchemy", "fastapi", "yaml", "subprocess", "tarfile", "ssl"}
print(sorted(heavy & set(sys.modules)), sorted(name for name in sys.modules if name.startswith("dstack_core")))
print([model.__name__ for model in (Task, GPU, Resources) if model.__pydantic_complete__])
Task(commands=["x"])
from dstack_core._models.configurations import AnyConfiguration, DevEnvironment, Service
print(Service.__name__, DevEnvironment.__name__)
"""


def test_the_models_of_a_task_load_little() -> None:
    """No heavy module is loaded, services stay away until asked for, and no schema is built before its first use."""
    answer = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    models = ["_base", "configurations", "profiles", "resources"]
    expected = ["dstack_core", "dstack_core._models", *(f"dstack_core._models.{name}" for name in models)]
    assert answer == [f"[] {[*expected, 'dstack_core.errors']}", "[]", "Service DevEnvironment"]
