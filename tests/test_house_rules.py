"""The rules of the house that a machine can check. Lists of exceptions only shrink: a needless entry fails, too.

`python tests/test_house_rules.py` prints every name of `dstack.api` with the tests that use it; `python -m
tests.api_table` does so for every row of the API page.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest

from dstack_core import errors
from dstack_core.plugin import hookimpl

ROOT = Path(__file__).parents[1]
DOORS = ("dstack.api", "dstack_core.errors", "dstack_core.plugin", "dstack_core.testing")

# Functions longer than 60 lines, each with its reason.
TOO_LONG = {
    "dstack_core/_store/migrations/versions/0001_the_first_tables.py::upgrade": "a list of tables, written once",
}
# Test modules that replace foreign code by `unittest.mock`, each with what it replaces.
MOCKS: dict[str, str] = {}
# Tests that let real time pass, each with the reason.
SLEEPS = {
    "tests/e2e/test_survival.py": "lets the clock move on between two lines of a log",
    "tests/server/test_process.py": "measures what a server does in two seconds without a request: nothing",
}
# Files whose comments silence one and the same thing over and over, with the reason that all of them share.
SHARED_REASONS = {"dstack_core/_hookspecs.py": "a hook's specification has a docstring instead of a body"}

SERVER_ONLY = (
    "pluggy", "sqlalchemy", "alembic", "asyncssh", "fastapi", "starlette", "uvicorn", "httpx", "typer", "rich"
)  # fmt: skip
SDKS = ("boto3", "botocore", "google.cloud", "googleapiclient", "azure", "msal", "oci", "docker", "kubernetes")


# ---------------------------------------------------------------------------------------------------- sources --


def sources(*folders: str) -> Iterator[Path]:
    """Python files of the repository in these folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts):
                yield path


def shipped() -> list[Path]:
    """What users install: the core and the plugins, without tests."""
    return [path for path in sources("dstack", "dstack_core", "plugins") if "tests" not in path.relative_to(ROOT).parts]


def suites() -> list[Path]:
    """Every file of a test-suite."""
    plugins = [path for path in sources("plugins", "examples") if "tests" in path.relative_to(ROOT).parts]
    return [*sources("tests", "docs"), *plugins]


def name_of(path: Path) -> str:
    """Path inside the repository."""
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, inner ones included."""
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def cases(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All tests of a file."""
    return (node for node in functions(path) if node.name.startswith("test_") and path.name.startswith("test_"))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


# ------------------------------------------------------------------------------------------------------ doors --


def public(module: ModuleType) -> set[str]:
    """Our classes and functions that can be seen in a module under a public name."""
    seen = {name for name, value in vars(module).items() if module_of(value).startswith("dstack")}
    return {name for name in seen if not name.startswith("_")}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_lists_its_public_names_sorted(door: str) -> None:
    """What a door offers is exactly what its `__all__` says, in order."""
    module = importlib.import_module(door)
    assert module.__all__ == sorted(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert sorted(public(module) - set(module.__all__)) == []


@pytest.mark.parametrize("door", DOORS)
def test_what_a_door_offers_names_a_door_as_its_module(door: str) -> None:
    """Tracebacks and documentation show the public path of a class or function, not the room where it is written."""
    module = importlib.import_module(door)
    wrong = {name: module_of(getattr(module, name)) for name in module.__all__ if needs_a_door(getattr(module, name))}
    assert {name: where for name, where in wrong.items() if where not in DOORS} == {}


def needs_a_door(value: Any) -> bool:
    """Classes and functions of ours; a model keeps its module, where pydantic looks up the names in its annotations."""
    if not (inspect.isclass(value) or inspect.isfunction(value)) or not module_of(value).startswith("dstack"):
        return False
    return not (inspect.isclass(value) and (issubclass(value, pydantic.BaseModel) or hasattr(value, "__slots__")))


def module_of(value: Any) -> str:
    """Where a class or function says it comes from."""
    return str(getattr(value, "__module__", "") or "")


def test_everything_but_the_doors_is_underscored() -> None:
    """A public-looking module that is no door would be taken for one."""
    modules = {path.stem for path in (ROOT / "dstack_core").iterdir() if path.suffix == ".py" or path.is_dir()}
    doors = {door.partition(".")[2] for door in DOORS if door.startswith("dstack_core")}
    assert {name for name in modules if not name.startswith("_")} - {"py"} - {"py.typed"} == doors


def names_and_tests() -> dict[str, list[str]]:
    """Each name of `dstack.api`, with the tests that use it."""
    api = importlib.import_module("dstack.api")
    users: dict[str, list[str]] = {name: [] for name in api.__all__}
    for path in suites():
        for function in cases(path):
            for name in with_constants(used_names(function), path) & users.keys():
                users[name].append(f"{name_of(path)}::{function.name}")
    return users


def with_constants(names: set[str], path: Path) -> set[str]:
    """The names, and those in the tables of the same file that they refer to."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and used_names(node) & names:
            names |= used_names(node)
    return names


def used_names(tree: ast.AST) -> set[str]:
    """Every name and attribute that a piece of code mentions."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_name_of_the_api_has_a_test() -> None:
    """A name nobody tests is a promise nobody keeps."""
    assert [name for name, users in names_and_tests().items() if not users] == []


# ----------------------------------------------------------------------------------------------------- errors --


def drawn_tree() -> dict[str, str]:
    """Parent of each error, as drawn at the top of `errors.py`."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^([ │├└─]*)([A-Z]\w+(?:Error|Bug))\b", line):
            indent, name = len(match[1]), match[2]
            while stack and stack[-1][0] >= indent:
                stack.pop()
            parents[name] = stack[-1][1] if stack else "Exception"
            stack.append((indent, name))
    return parents


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    """The tree drawn at the top of `errors.py` shows every class under its parent."""
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    real = {name: value.__bases__[0].__name__ for name, value in classes.items() if issubclass(value, Exception)}
    assert drawn_tree() == real


def test_every_error_is_public_and_says_what_it_asks_for() -> None:
    """Each error is listed, and explained in its docstring."""
    for name in drawn_tree():
        assert name in errors.__all__
        assert (getattr(errors, name).__doc__ or "").strip()


# ------------------------------------------------------------------------------------------------------ hooks --


def hooks() -> list[str]:
    """Names of the hooks."""
    specs = importlib.import_module("dstack_core._hookspecs")
    return [name for name in specs.__all__ if name.startswith("dstack_")]


@pytest.mark.parametrize("hook", hooks())
def test_a_hook_has_its_contract_and_a_test(hook: str) -> None:
    """Every hook says since when it exists, and is implemented and exercised somewhere in the tests."""
    specs = importlib.import_module("dstack_core._hookspecs")
    assert re.search(r"Since \d+\.\d+", getattr(specs, hook).__doc__)
    assert [path for path in suites() if path != Path(__file__) and hook in path.read_text(encoding="utf-8")]


def test_hooks_are_few() -> None:
    """At most a dozen hooks: each one is a promise to every backend."""
    assert len(hooks()) <= 12


def test_hooks_are_marked_for_this_project() -> None:
    """The marker that plugins use is the one the specification uses."""
    specs = importlib.import_module("dstack_core._hookspecs")
    assert hookimpl.project_name == specs.PROJECT


# ------------------------------------------------------------------------------------------------------- size --


def test_functions_are_small() -> None:
    """Median body at most 8 lines, nine in ten at most 30."""
    sizes = sorted(body_lines(function) for path in shipped() for function in functions(path))
    assert statistics.median(sizes) <= 8
    assert sizes[len(sizes) * 9 // 10] <= 30


def test_no_function_is_longer_than_sixty_lines() -> None:
    """None is over 60 lines but the listed ones, and the list has no entry too many."""
    long = {f"{name_of(path)}::{f.name}" for path in shipped() for f in functions(path) if body_lines(f) > 60}
    assert long == TOO_LONG.keys()


# --------------------------------------------------------------------------------------------------- silencing --


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each comment."""
    with io.BytesIO(path.read_bytes()) as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


SILENCED = re.compile(r"# ?(?:noqa|type: ?ignore|pyright: ?ignore|nosec|pragma: ?no cover)\b", re.IGNORECASE)
CODES = r"# (?:noqa: [A-Z]+\d+(?:, ?[A-Z]+\d+)*|(?:type|pyright): ignore\[[A-Za-z-]+(?:, ?[A-Za-z-]+)*\])"
WITH_CODE = re.compile(CODES + r"(?P<reason>\s+[#-] \S+.*)?$")


def test_what_is_silenced_has_a_code_and_a_reason() -> None:
    """No bare `noqa` or `type: ignore`: which rule, and why it does not apply here."""
    folders = ("dstack", "dstack_core", "plugins", "tests", "typing_tests", "docs", "examples", "benchmarks")
    assert [place for path in sources(*folders) for place in silenced_without_reason(path)] == []


def silenced_without_reason(path: Path) -> Iterator[str]:
    """`# noqa: X123  # why` is fine; the reason may be on the line above, or one that the whole file shares."""
    found = dict(comments(path))
    for line, text in found.items():
        if at := SILENCED.search(text):
            match = WITH_CODE.match(text[at.start() :])
            above = line - 1 in found and not SILENCED.search(found[line - 1])
            if not match or not (match["reason"] or above or name_of(path) in SHARED_REASONS):
                yield f"{name_of(path)}:{line}: {text}"


# ------------------------------------------------------------------------------------------------------- tests --


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, at any depth: modules, and `module.name` for names."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_foreign_code_is_mocked() -> None:
    """`unittest.mock` is for foreign code, in the listed files alone."""
    assert {name_of(path) for path in suites() if "unittest.mock" in imported(path)} == MOCKS.keys()


def test_no_test_waits_for_a_time() -> None:
    """Tests wait for a condition with a deadline, never for a time to pass."""
    assert {name_of(path) for path in suites() if path.name.startswith("test_") and sleeps(path)} == SLEEPS.keys()


def sleeps(path: Path) -> list[int]:
    """Lines that call a real `sleep` with anything but zero, unless it is the pause of a loop over a condition."""
    loops = [loop for loop in ast.walk(parsed(path)) if isinstance(loop, ast.While)]
    pauses = {node for loop in loops if not isinstance(loop.test, ast.Constant) for node in ast.walk(loop)}
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and node not in pauses]
    real = [call for call in calls if callee(call) in {"time.sleep", "asyncio.sleep", "anyio.sleep", "sleep"}]
    return [call.lineno for call in real if [ast.unparse(arg) for arg in call.args] != ["0"]]


def callee(call: ast.Call) -> str:
    """What is called, as written."""
    return ast.unparse(call.func)


def test_every_test_says_what_must_hold() -> None:
    """Each test has a docstring of one sentence."""
    bad = [f"{name_of(path)}::{f.name}" for path in suites() for f in cases(path) if not one_sentence(f)]
    assert bad == []


def one_sentence(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One paragraph that ends like a sentence."""
    text = ast.get_docstring(function) or ""
    return text.endswith((".", "!", "?")) and "\n\n" not in text


# ----------------------------------------------------------------------------------------------------- imports --


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_api_loads_neither_server_nor_http() -> None:
    """`import dstack.api` costs pydantic, and nothing that only a server or a first request needs."""
    loaded = modules_after("from dstack.api import Client, Task")
    assert sorted(loaded.intersection(SERVER_ONLY)) == []


def test_importing_the_doors_for_plugins_loads_no_sdk() -> None:
    """Loading every installed backend's entry point loads no cloud SDK."""
    load = "[e.load() for e in importlib.metadata.entry_points(group='dstack.backends')]"
    loaded = modules_after(f"import importlib.metadata; {load}")
    assert sorted(loaded.intersection(SDKS)) == []


def test_the_agent_imports_the_standard_library_alone() -> None:
    """The agent runs on any machine that has a Python, back to 3.8."""
    for path in sources("dstack_core/_agent"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
        roots = {name.partition(".")[0] for name in imported(path)} - {"_agent", "__future__", ""}
        foreign = roots - sys.stdlib_module_names
        assert not foreign, f"{name_of(path)} imports {sorted(foreign)}"


def test_plugins_import_the_doors_alone() -> None:
    """A backend has no back door into the core, the first-party ones included."""
    doors = {"dstack_core", "dstack_core.plugin", "dstack_core.errors", "dstack_core.testing"}
    core_tests = {path for path in suites() if path.is_relative_to(ROOT / "examples")}
    for path in {*sources("plugins", "examples")} - core_tests:
        ours = {name for name in imported(path) if name == "dstack_core" or name.startswith("dstack_core.")}
        behind = {name for name in ours if name not in doors and name.rpartition(".")[0] not in doors - {"dstack_core"}}
        assert not behind, f"{name_of(path)} imports {sorted(behind)}"


if __name__ == "__main__":
    for public_name, users in names_and_tests().items():
        print(f"{public_name:20} {len(users):4}  {users[0] if users else '-'}")  # noqa: T201  # for people
