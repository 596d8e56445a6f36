"""How the reference shows our classes: a griffe extension, used by mkdocstrings.

Models get one table of fields with the type that may be written, the default as it would be written, and the fields of
their bases; enumerations get their values; names of the API become links. Whatever lacks a description is an error.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

import griffe
from pydantic import BaseModel

API, PLUGIN, TESTING = "dstack.api", "dstack_core.plugin", "dstack_core.testing"
DOORS = {"dstack": (API,), "dstack_core": (PLUGIN, "dstack_core._hookspecs", TESTING)}
"""Modules whose names are documented, by the package that is loaded."""

TITLES = {
    "ProfileParams": "Fields that a profile can say, too:",
    "BaseConfiguration": "Fields of every configuration:",
}
"""What stands above the fields that a model has from a base."""

CONFIGURATIONS = "dstack_core._models.configurations"
SERVICES = "dstack_core._models.services"
PROFILES = "dstack_core._models.profiles"
RUNS = "dstack_core._models.runs"
RENAMED = {"dstack_core._models.profiles": {"RetryPolicy": "ProfileRetryPolicy"}}
"""Classes with a second name, which is the public one."""

PARTS = {
    **dict.fromkeys(("PortMapping", "NodeGroup", "FilePathMapping", "RepoSpec"), CONFIGURATIONS),
    **dict.fromkeys(("VolumeMountPoint", "InstanceMountPoint"), CONFIGURATIONS),
    **dict.fromkeys(("OpenAIChatModel", "TGIChatModel", "ProbeConfig", "HttpHeader", "Scaling"), SERVICES),
    **dict.fromkeys(("RateLimit", "IPAddressPartitioningKey", "HeaderPartitioningKey"), SERVICES),
    **dict.fromkeys(("Retry", "RetryEvent", "UtilizationPolicy", "Schedule"), PROFILES),
    **dict.fromkeys(("CreationPolicy", "StartupOrder", "StopCriteria"), PROFILES),
    **dict.fromkeys(("RunPlan", "JobPlan", "InstanceOffer"), RUNS),
    **dict.fromkeys(("InstanceType", "InstanceResources", "InstanceGpu", "Reason"), RUNS),
    "ServiceModel": "dstack_core._client.run",
}
"""What the fields of the API's classes are made of, and where it is written. Nobody imports these by name: they are
written in a short form or as a mapping, or come as results. They have sections all the same, `#parts.NAME`."""

WIDER = {
    "Repo": "VirtualRepo | LocalRepo | RemoteRepo",
    "ProfileRetryPolicy": "RetryPolicy",
}
"""Names behind the doors, and what they are called in front of them."""

INNER = {"RunSpec", "JobSpec", "APIClient"}
"""Types that programs pass on without looking inside, so that they need no section."""


class Reference(griffe.Extension):
    """Prepares each documented class as soon as its package is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Griffe's hook: a package and all its modules are loaded."""
        for module, names in RENAMED.items() if pkg.name == "dstack_core" else ():
            for name, target in names.items():
                home = loader.modules_collection[module]
                home.set_member(name, griffe.Alias(name, f"{module}.{target}", parent=home))
        for path in DOORS.get(pkg.name, ()):
            door = loader.modules_collection[path]
            # What both doors offer is shown at the first one.
            elsewhere = _public(API) if path != API else []
            for name in set(_public(path)).difference(elsewhere):
                _prepare(door[name], path if path in (API, TESTING) else PLUGIN)
            _show_chapters(door)
        for found in _further(loader) if pkg.name == "dstack" else ():
            _prepare(found, API)


def _public(door: str) -> list[str]:
    names: list[str] = importlib.import_module(door).__all__
    return names


def _further(loader: griffe.GriffeLoader) -> Iterator[griffe.Object | griffe.Alias]:
    """What is shown besides the names of a door: those of its submodules, and the parts that its fields are made of."""
    for module in loader.modules_collection[API].modules.values():
        yield from (module[name] for name in _public(module.path))
    for name, path in PARTS.items():
        yield loader.modules_collection[f"{path}.{name}"]


def _prepare(found: griffe.Object | griffe.Alias, door: str) -> None:
    """Rewrites what will be shown of one public name."""
    target = found.final_target if isinstance(found, griffe.Alias) else found
    if not isinstance(target, griffe.Class | griffe.Function) or target.extra["dstack"].get("prepared"):
        return
    target.extra["dstack"]["prepared"] = True
    if isinstance(target, griffe.Class):
        _show_fields(target, door)
    for each in [target, *_shown_members(target)]:
        if isinstance(each, griffe.Function):
            _show_function(each, door)
        elif isinstance(each, griffe.Attribute) and "property" in each.labels:
            each.annotation = written_type(each.annotation, door)
        if each.docstring is not None:
            _link(each.docstring, target, door)


def _shown_members(target: griffe.Class | griffe.Function) -> Iterator[griffe.Object]:
    """The public members of a class, and its constructor if the class says what is passed to it."""
    if target.name in INNER:
        return
    for name, member in target.members.items():
        constructor = name == "__init__" and isinstance(target, griffe.Class) and _sections(target, "parameters")
        if isinstance(member, griffe.Object) and (constructor or not name.startswith("_")):
            yield member


# -------------------------------------------------------------------------------------------------------- fields --


def _show_fields(target: griffe.Class, door: str) -> None:
    real = _real(target)
    if issubclass(real, BaseModel) or is_dataclass(real):
        tables = _tables(target, real, door)
    elif issubclass(real, Enum):
        tables = [_values(target, real)]
    else:
        tables = [section for base in (target, *target.mro()) for section in _sections(base, "attributes")]
    if target.docstring is None:
        raise ValueError(f"{target.path} has no docstring")
    sections = [s for s in target.docstring.parsed if s.kind.value != "attributes"]
    after = next((i for i, s in enumerate(sections) if s.kind.value in ("raises", "examples")), len(sections))
    target.docstring.parsed[:] = [*sections[:after], *tables, *sections[after:]]


def _real(target: griffe.Class) -> type:
    """The class itself, found where it is written: the door would change what it says its module is."""
    found: type = getattr(importlib.import_module(target.module.path), target.name)
    return found


def _sections(target: griffe.Object, kind: str) -> list[griffe.DocstringSection]:
    parsed = target.docstring.parsed if target.docstring else []
    return [section for section in parsed if section.kind.value == kind]


def _tables(target: griffe.Class, real: type, door: str) -> list[griffe.DocstringSection]:
    """The own fields first, then those of the bases, the most special base first."""
    tables: list[griffe.DocstringSection] = []
    for owner in (target, *target.mro()):
        rows = [_row(attribute, owner, real, door) for attribute in _fields_of(owner, real)]
        if rows:
            title = "Fields:" if owner is target else TITLES.get(owner.name, "Further fields:")
            tables.append(griffe.DocstringSectionParameters(rows, title=title))
    return tables


def _fields_of(owner: griffe.Class, real: type) -> list[griffe.Attribute]:
    names = real.model_fields if issubclass(real, BaseModel) else {field.name for field in fields(real)}  # type: ignore[arg-type]  # a dataclass
    return [attribute for name, attribute in owner.attributes.items() if name in names and not attribute.is_alias]


def _row(attribute: griffe.Attribute, owner: griffe.Class, real: type, door: str) -> griffe.DocstringParameter:
    described = {item.name: item.description for s in _sections(owner, "attributes") for item in s.value}
    if attribute.name not in described:
        raise ValueError(f"{owner.path} does not describe its field '{attribute.name}' under 'Attributes:'")
    return griffe.DocstringParameter(
        attribute.name,
        annotation=written_type(attribute.annotation, door),
        description=described[attribute.name],
        value=_default(real, attribute.name),
    )


def _values(target: griffe.Class, real: type[Enum]) -> griffe.DocstringSection:
    described = {item.name: item.description for s in _sections(target, "attributes") for item in s.value}
    if described.keys() != set(real.__members__):
        raise ValueError(f"{target.path} does not describe each of its values under 'Attributes:'")
    rows = [
        griffe.DocstringParameter(name, annotation=written_value(member), description=described[name])
        for name, member in real.__members__.items()
    ]
    return griffe.DocstringSectionParameters(rows, title="Values:")


# ------------------------------------------------------------------------------------------------------ defaults --


def _default(real: type, name: str) -> str | None:
    """The default as one would write it; `None` for a field that must be set."""
    if issubclass(real, BaseModel):
        field = real.model_fields[name]
        return None if field.is_required() else written_value(field.get_default(call_default_factory=True))
    declared = next(field for field in fields(real) if field.name == name)  # type: ignore[arg-type]  # a dataclass
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return None if default is MISSING else written_value(default)


def written_value(value: Any) -> str:
    """A value in its short form, as a person would write it."""
    if isinstance(value, Enum):
        return f'"{value.value}"'
    if isinstance(value, BaseModel):
        return _written_model(value)
    if isinstance(value, tuple) and any(isinstance(item, Enum) for item in value):
        return f"({', '.join(written_value(item) for item in value)})"
    if isinstance(value, str) or type(value).__name__ in ("Memory", "Range"):
        return f'"{value}"'
    return repr(value)


def _written_model(value: BaseModel) -> str:
    name = type(value).__name__
    short = {"CPU": "count", "Disk": "size"}.get(name)
    return written_value(getattr(value, short)) if short else f"{name}()"


# --------------------------------------------------------------------------------------------------------- types --


def _show_function(function: griffe.Function, door: str) -> None:
    for parameter in function.parameters:
        parameter.annotation = written_type(parameter.annotation, door)
    function.returns = written_type(function.returns, door)


def written_type(annotation: str | griffe.Expr | None, door: str) -> str | griffe.Expr | None:
    """A type with all that may be given, names in front of the door, and `None` last."""
    if annotation is None:
        return None
    members = list({str(member): member for member in _members(annotation, door)}.values())
    members.sort(key=lambda member: str(member) == "None")
    joined: str | griffe.Expr = members[0]
    for member in members[1:]:
        joined = griffe.ExprBinOp(joined, "|", member)
    return joined


def _members(annotation: str | griffe.Expr, door: str) -> Iterator[str | griffe.Expr]:
    """The alternatives that a type stands for."""
    if isinstance(annotation, griffe.ExprBinOp):
        yield from _members(annotation.left, door)
        yield from _members(annotation.right, door)
    elif isinstance(annotation, griffe.ExprSubscript):
        yield from _subscript(annotation, door)
    elif isinstance(annotation, griffe.ExprName | griffe.ExprAttribute):
        yield from _name(annotation, door)
    elif isinstance(annotation, str) and annotation[:1] in "\"'":
        # A forward reference in quotes.
        yield annotation.strip("\"'")
    else:
        yield annotation


def _subscript(annotation: griffe.ExprSubscript, door: str) -> Iterator[str | griffe.Expr]:
    inner = annotation.slice.elements if isinstance(annotation.slice, griffe.ExprTuple) else [annotation.slice]
    match str(annotation.left):
        case "Annotated":
            yield from _members(inner[0], door)
        case "Accepts":
            for part in inner:
                yield from _members(part, door)
        case "Items":
            yield griffe.ExprSubscript("list", written_type(inner[0], door) or "")
        case "Literal":
            yield from (str(part).replace("'", '"') for part in inner)
        case _:
            shown = [written_type(part, door) or "" for part in inner]
            yield griffe.ExprSubscript(next(_members(annotation.left, door)), _joined(shown))


def _joined(parts: list[str | griffe.Expr]) -> str | griffe.Expr:
    return parts[0] if len(parts) == 1 else griffe.ExprTuple(parts, implicit=True)


def _name(annotation: griffe.ExprName | griffe.ExprAttribute, door: str) -> Iterator[str | griffe.Expr]:
    name = str(annotation).rpartition(".")[2]
    if name in WIDER and door == API:
        yield from (griffe.ExprName(part, parent=door) for part in WIDER[name].split(" | "))
    elif name in _public(door):
        yield griffe.ExprName(name, parent=door)
    elif name in PARTS and door == API:
        yield griffe.ExprName(name, parent="parts")
    elif name in _public(PLUGIN):
        yield griffe.ExprName(name, parent=PLUGIN)
    elif (alias := _alias_of(annotation)) is not None:
        yield from _members(alias, door)
    elif door == API and annotation.canonical_path.startswith("dstack_core.") and name not in INNER:
        raise ValueError(f"{name} is shown as a type: give it a section on the page, and a line in PARTS")
    else:
        yield name if str(annotation).startswith("builtins.") else annotation


def _alias_of(annotation: griffe.ExprName | griffe.ExprAttribute) -> griffe.Expr | None:
    """What a name of ours stands for, if it is a type that was given a name."""
    path = annotation.canonical_path
    last = annotation.last if isinstance(annotation, griffe.ExprAttribute) else annotation
    scope = getattr(last, "parent", None)
    if not path.startswith("dstack_core.") or not isinstance(scope, griffe.Object):
        return None
    try:
        found = scope.modules_collection[path]
    except KeyError:
        return None
    found = found.final_target if found.is_alias else found
    value = found.value if found.is_attribute else None
    return value if isinstance(value, griffe.Expr) else None


# ------------------------------------------------------------------------------------------------- docstrings --

CHAPTER = re.compile(r"^(?P<title>[A-Z][\w ]+)\n(?P<text>(?: {4}\S.*\n?)+)", re.MULTILINE)


def _show_chapters(module: griffe.Module) -> None:
    """A module's docstring may have chapters: a title on a line of its own, with the text below it, indented."""
    if module.docstring is not None:
        module.docstring.value = CHAPTER.sub(
            lambda match: f"# {match['title']}\n\n{textwrap.dedent(match['text'])}\n", module.docstring.value
        )


CODE = re.compile(r"(?<![`\[])`(?P<name>[A-Za-z_]+)(?P<call>\(\))?`(?![`\]])")


def _link(docstring: griffe.Docstring, owner: griffe.Class | griffe.Function, door: str) -> None:
    """Makes links of the names in code that are documented, and sentences of descriptions."""

    def linked(text: str) -> str:
        return CODE.sub(lambda match: _reference(match, owner, door), text)

    for section in docstring.parsed:
        if section.kind.value == "text":
            section.value = "\n".join(
                line if line.startswith("    ") else linked(line) for line in section.value.splitlines()
            )
        elif isinstance(section.value, list):
            for item in section.value:
                if hasattr(item, "description"):
                    item.description = linked(_capital(item.description))
                if section.kind.value == "raises":
                    item.annotation = written_type(item.annotation, door)


def _reference(match: re.Match[str], owner: griffe.Class | griffe.Function, door: str) -> str:
    name = match["name"]
    member = owner.members.get(name)
    if member is not None and (member.is_function or "property" in member.labels):
        place = f"{PARTS[owner.name]}.{owner.name}" if owner.name in PARTS else f"{door}.{owner.name}"
        return f"[{match[0]}][{place}.{name}]"
    return f"[{match[0]}][{door}.{name}]" if name in _public(door) and name != owner.name else match[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if inspect.cleandoc(text)[:2].isalpha() or text[:2] == "a " else text
