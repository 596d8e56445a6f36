"""Each section, class, method and argument of the API page, and the tests that use it: `python -m tests.api_table`.

A test uses what it calls, itself or through helpers, fixtures and tables of its own file. An argument is used where it
is passed, by name or by its place; a field of a model where it is given by name, or is a key of a document. Programs
of README and the pages count where they are run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from pydantic import BaseModel

from dstack import api
from dstack_core._models._base import UserModel
from dstack_core._models.configurations import BaseConfiguration
from dstack_core._models.profiles import ProfileParams
from tests.support.blocks import ROOT

PAGE = ROOT / "docs" / "reference" / "api.md"

# What no test uses yet, each with the reason. The list only shrinks: an entry that a test uses is an error, too.
UNUSED: dict[str, str] = {}

# Tests that look at names and signatures, and use nothing.
MERELY_NAME = ("test_house_rules.py", "test_signatures.py", "test_site.py")

# What programs pass on without looking inside.
PASSED_ON = ("server.APIClient",)

COLLECTIONS = {"RunCollection": "runs", "RepoCollection": "repos", "BackendCollection": "backends"}
# Classes that nobody makes or names: where they come from.
ATTRIBUTES = COLLECTIONS | {"Backend": "backends"}
SHARED = {BaseConfiguration: "every configuration", ProfileParams: "every configuration and profile"}


# ----------------------------------------------------------------------------------------------------- the page --


@dataclass(frozen=True)
class Item:
    """One row: what the page documents.

    Attributes:
        section: heading of the page.
        owner: the class, as `Client`; for shared fields, who shares them.
        member: method, property or field; empty for the class itself.
        argument: of the method; empty for the method itself.
    """

    section: str
    owner: str
    member: str = ""
    argument: str = ""

    def __str__(self) -> str:
        call = f"({self.argument})" if self.argument else ""
        return f"{self.owner}.{self.member}{call}" if self.member else f"{self.owner}{call}"


def page_sections() -> Iterator[tuple[str, str]]:
    """Each class of `dstack.api` on the page, with the heading that it stands under."""
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"##+ `?([\w. ]+)`?", line):
            heading = match[1].strip()
        elif match := re.match(r"::: dstack\.api\.([\w.]+)$", line):
            yield heading, match[1]


def items() -> list[Item]:
    """All rows, in the order of the page."""
    rows: list[Item] = []
    for section, name in page_sections():
        value = value_of(name)
        rows.append(Item(section, name))
        if isinstance(value, FunctionType):
            rows += [Item(section, name, argument=argument) for argument in arguments(value)]
        elif name not in PASSED_ON:
            rows += [*members(section, name, value), *values(section, name, value)]
    # What several classes share has one row.
    return list(dict.fromkeys(rows))


def value_of(name: str) -> Any:
    """What `dstack.api` or a module in it offers under this name."""
    module, _, last = f"dstack.api.{name}".rpartition(".")
    return getattr(importlib.import_module(module), last)


def values(section: str, name: str, value: type) -> Iterator[Item]:
    """The fields of a model, the values of an enumeration, the arguments of any other class."""
    if issubclass(value, BaseModel):
        for field_name in value.model_fields:
            owner = next((base for base in SHARED if field_name in base.__annotations__), None)
            yield Item(section, name, field_name) if owner is None else Item("Fields", SHARED[owner], field_name)
    elif issubclass(value, Enum):
        yield from (Item(section, name, member) for member in value.__members__)
    elif "Args:" in (value.__doc__ or ""):
        yield from (Item(section, name, argument=argument) for argument in arguments(value))


def members(section: str, name: str, value: type) -> Iterator[Item]:
    """The public methods and properties that a class adds to its public bases, each method with its arguments."""
    public = {getattr(api, other) for other in api.__all__} - {value} | {UserModel}
    for base in value.__mro__:
        if base in public or not base.__module__.startswith("dstack"):
            continue
        for member, found in vars(base).items():
            if member.startswith("_") or not isinstance(found, (property, staticmethod, classmethod, FunctionType)):
                continue
            yield Item(section, name, member)
            if not isinstance(found, property):
                yield from (Item(section, name, member, each) for each in arguments(getattr(value, member)))


def arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a caller passes."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


# ---------------------------------------------------------------------------------------------------- the tests --


@dataclass
class Uses:
    """What a piece of code does with the API.

    Attributes:
        names: every name and attribute that it mentions.
        calls: for each callee, as written, what is passed: names, and how many by place.
        texts: every text in it that could name a field.
    """

    names: set[str] = field(default_factory=set)
    calls: dict[str, list[tuple[int, set[str]]]] = field(default_factory=lambda: defaultdict(list))
    texts: set[str] = field(default_factory=set)


def uses_of(nodes: list[ast.AST]) -> Uses:
    """What these pieces of code do with the API."""
    uses = Uses()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            uses.names.add(node.id)
        elif isinstance(node, ast.Attribute):
            uses.names.add(node.attr)
            uses.names.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A key of a dictionary, or of a document in YAML.
            uses.texts |= {node.value, *re.findall(r"^[ -]*(\w+):", node.value, re.MULTILINE)}
        elif isinstance(node, ast.Call):
            note_call(uses, node)
    return uses


def note_call(uses: Uses, call: ast.Call) -> None:
    """Notes one call, and the dictionaries that are passed as its arguments."""
    passed = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    uses.calls[ast.unparse(call.func)].append((len(call.args), passed))


@cache
def programs() -> dict[str, Uses]:
    """Each test, and each program of the pages that is run, with what it uses."""
    from tests.docs.test_blocks import EXAMPLES
    from tests.test_house_rules import cases, name_of, suites

    found: dict[str, Uses] = {}
    for path in suites():
        if path.name not in MERELY_NAME:
            found |= {f"{name_of(path)}::{case.name}": uses_of(reached(path, case)) for case in cases(path)}
    for block in EXAMPLES:
        found[f"tests/docs/test_blocks.py::test_programs_run[{block}]"] = uses_of([ast.parse(block.text)])
    return found


def reached(path: Path, case: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.AST]:
    """A test, and what it names of its own file: helpers, fixtures and tables, and what those name."""
    from tests.test_house_rules import parsed

    top = {name: node for node in parsed(path).body for name in defined(node)}
    found: dict[str, ast.AST] = {case.name: case}
    new = [case.name]
    while new:
        mentioned = mentions(found[new.pop()])
        new += [name for name in mentioned if name in top and name not in found]
        found |= {name: top[name] for name in new}
    return list(found.values())


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module gives to something of its own."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def mentions(tree: ast.AST) -> set[str]:
    """Every name in a piece of code, fixtures among its arguments included."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


# ----------------------------------------------------------------------------------------------------- matching --


def is_used(item: Item, uses: Uses) -> bool:
    """Whether a program uses what a row stands for."""
    if item.owner in SHARED.values():
        return any(gives(name, item.member, uses) for name in ("Task", "Service", "DevEnvironment", "Profile"))
    value, last = value_of(item.owner), item.owner.rpartition(".")[2]
    if not item.member:
        named = not uses.names.isdisjoint({last, ATTRIBUTES.get(last)})
        return passes(item, uses, [last]) if item.argument else named
    if issubclass(value, BaseModel) and item.member in value.model_fields:
        return gives(item.owner, item.member, uses)
    return is_member_used(item, uses)


def gives(name: str, member: str, uses: Uses) -> bool:
    """Whether a field is given to a class of this name: as an argument, or as a key of what it is made of."""
    calls = [call for callee, found in uses.calls.items() if callee.rpartition(".")[2] == name for call in found]
    return any(member in passed for _, passed in calls) or (name in uses.names and member in uses.texts)


def is_member_used(item: Item, uses: Uses) -> bool:
    """Whether a method is called, a property read, a value named; or an argument of the method passed."""
    owner = COLLECTIONS.get(item.owner)
    callees = [callee for callee in uses.calls if re.search(rf"(^|\b{owner or ''}\.){item.member}$", callee)]
    callees = callees if owner else [callee for callee in uses.calls if callee.rpartition(".")[2] == item.member]
    if item.argument:
        return passes(item, uses, callees)
    mentioned = (
        item.member in uses.names
        if owner is None
        else any(
            name.endswith(f"{owner}.{item.member}") or name == f"{item.owner}.{item.member}" for name in uses.names
        )
    )
    return bool(callees) or mentioned


def passes(item: Item, uses: Uses, callees: list[str]) -> bool:
    """Whether one of these calls passes the argument, by name or by its place."""
    value = value_of(item.owner)
    place = arguments(getattr(value, item.member) if item.member else value).index(item.argument)
    calls = [call for callee in callees for call in uses.calls.get(callee, [])]
    return any(item.argument in passed or count > place for count, passed in calls)


@cache
def table() -> dict[Item, list[str]]:
    """Each row with the tests that use it."""
    return {item: [name for name, uses in programs().items() if is_used(item, uses)] for item in items()}


if __name__ == "__main__":
    section = ""
    for row, users in table().items():
        if row.section != section:
            section = row.section
            print(f"\n{section}\n{'-' * len(section)}")  # noqa: T201  # for people
        first = users[0] if users else UNUSED.get(str(row), "-")
        print(f"{textwrap.shorten(str(row), 60):60} {len(users):4}  {first}")  # noqa: T201  # for people
