"""YAML files that people write: what they hold, and on which line each key stands, for messages that say where.

Numbers are read as YAML 1.2 means them, so that `8022:22` is not a time in seconds, `0123` not 83, and a date a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

__all__ = ["Document", "KeyPath", "NotYamlError", "compose", "load_document", "parse_document", "unknown_key"]

KeyPath = tuple[str | int, ...]

M = TypeVar("M", bound="BaseModel")


class NotYamlError(Exception):
    """A text is no YAML: what the matter is, and where, if that is known (from 1)."""

    def __init__(self, problem: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(problem)
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Document:
    """What a file holds.

    Attributes:
        file: the file.
        value: all of it, as dictionaries, lists, texts, numbers and booleans.
        lines: on which line each key path stands.
        written: the numbers, as they were written.
    """

    file: Path
    value: Any
    lines: Mapping[KeyPath, int] = field(repr=False)
    written: Mapping[KeyPath, str] = field(default_factory=dict, repr=False)

    def place(self, path: KeyPath = ()) -> str:
        """`FILE, line 4, projects[0].name`: of a key, or of the nearest one around it."""
        return place(self.file, self.lines, path)

    def error(self, path: KeyPath, problem: str) -> ConfigurationError:
        """What is wrong at a key path."""
        return ConfigurationError(f"{self.place(path)}: {problem}")

    def mapping(self, value: Any, path: KeyPath, allowed: Iterable[str] | None = None) -> dict[str, Any]:
        """`value`, which stands at `path` and must be a mapping with text as keys: only `allowed` ones, if given.

        Raises:
            ConfigurationError: it is not.
        """
        if not isinstance(value, dict):
            raise self.error(path, "must have the form 'key: value'")
        for key in value:
            if not isinstance(key, str):
                raise self.error((*path, str(key)), f"the key must be text: put it in quotes, as '{key}'")
            if allowed is not None and key not in allowed:
                raise self.error((*path, key), unknown_key(key, tuple(allowed)))
        return value

    def list(self, value: Any, path: KeyPath) -> list[Any]:
        """`value`, which stands at `path` and must be a list; nothing at all is an empty one.

        Raises:
            ConfigurationError: it is not.
        """
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(path, "must be a list: start each entry with '- '")
        return value

    def read(self, model: type[M], value: dict[str, Any], path: KeyPath = ()) -> M:
        """`value`, which stands at `path`, as a model.

        Raises:
            ConfigurationError: it does not fit; one line for each problem, with file, line and key.
        """
        from pydantic import ValidationError

        from dstack_core._models._base import explain

        try:
            instance: M = model.__pydantic_validator__.validate_python(value)
        except ValidationError as error:
            missing = {details["loc"] for details in error.errors(include_url=False) if details["type"] == "missing"}

            def where(loc: KeyPath) -> str:
                return self.place(path + _path_of(loc, value) + (loc[-1:] if loc in missing else ()))

            problems = explain(error, model, where, "key").splitlines()
            raise ConfigurationError("\n".join(sorted(problems, key=_line_of))) from None
        return instance


def _line_of(problem: str) -> int:
    found = re.search(r", line ([0-9]+)", problem)
    return int(found[1]) if found else 0


def _path_of(loc: KeyPath, value: Any) -> KeyPath:
    """Where in a document a problem is. Leaves out what pydantic adds: the names of types that a value may have."""
    path: list[str | int] = []
    for step in loc:
        is_key = isinstance(value, dict) and step in value
        if is_key or (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            value = value[step]
            path.append(step)
    return tuple(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_document(file: Path) -> Document | None:
    """What a file holds; `None` if there is no such file.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or gives a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from None
    return parse_document(file, text)


def parse_document(file: Path, text: str) -> Document:
    """What a text holds that stands in a file. An empty one holds `None`.

    Raises:
        ConfigurationError: it is no YAML, or gives a key twice.
    """
    try:
        node = compose(text)
        value = None if node is None else _explained(lambda: _loader()("").construct_document(node))
    except NotYamlError as error:
        raise ConfigurationError(_not_yaml(file, error)) from None
    notes = _Notes(file)
    if node is not None:
        notes.add(node, ())
    return Document(file, value, notes.lines, notes.written)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, each with its place; `None` if there is nothing in it.

    Raises:
        NotYamlError: it is no YAML.
    """
    node: yaml.Node | None = _explained(lambda: _loader()(text).get_single_node())
    return node


def _explained(parse: Callable[[], Any]) -> Any:
    """The result of a step of the parser, or what it complains about in words for people."""
    import yaml

    try:
        return parse()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _complaint(error) from None


def _complaint(error: Exception) -> NotYamlError:
    import yaml

    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return NotYamlError(" ".join(str(error).split()))
    begun = error.context_mark
    # What was left open is often in an earlier line than the one where that is noticed.
    since = f" that begins in line {begun.line + 1}:" if begun and begun.line != mark.line else ""
    context = f"{error.context}{since}" if error.context else None
    return NotYamlError(" ".join(filter(None, (context, error.problem))), mark.line + 1, mark.column + 1)


def _not_yaml(file: Path, error: NotYamlError) -> str:
    if error.line is None:
        return f"{file}: not valid YAML: {error}"
    cure = "Check the indentation, and put a space after each colon."
    return f"{file}, line {error.line}, column {error.column}: not valid YAML: {error}. {cure}"


class _Notes:
    """On which line each key of a file stands, and how its numbers are written."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.lines: dict[KeyPath, int] = {}
        self.written: dict[KeyPath, str] = {}
        self._seen: set[int] = set()

    def add(self, node: yaml.Node, path: KeyPath) -> None:
        import yaml

        self.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag in _NUMBERS:
            self.written[path] = node.value
        # An alias leads to a node that was seen before; it may even lead to itself.
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._add_key(key, (*path, str(key.value)))
                self.add(value, (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self.add(value, (*path, index))

    def _add_key(self, key: yaml.Node, path: KeyPath) -> None:
        twice = path in self.lines
        self.lines[path] = key.start_mark.line + 1
        if twice:
            raise ConfigurationError(f"{place(self._file, self.lines, path)}: this key is given twice; keep one")


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_DATE = "tag:yaml.org,2002:timestamp"


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without the numbers and dates of YAML 1.1 that nobody means."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag not in (*_NUMBERS, _DATE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = list("-+0123456789.")
    Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), digits)
    Loader.add_implicit_resolver(_NUMBERS[1], re.compile(r"[-+]?(?:0|[1-9][0-9]*)?\.[0-9]+$"), digits)
    return Loader


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Says that a key is unknown, which one was probably meant, and which there are."""
    names = tuple(allowed)
    near = get_close_matches(key, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown key '{key}'.{hint} Allowed: {', '.join(names)}"


def dotted(path: KeyPath) -> str:
    """`projects[0].backends[1].regions`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def place(file: Path, lines: Mapping[KeyPath, int], path: KeyPath) -> str:
    """`FILE, line 4, projects[0].name`: of a key, or of the nearest one around it."""
    known = next((path[:length] for length in range(len(path), -1, -1) if path[:length] in lines), None)
    line = f", line {lines[known]}" if known is not None else ""
    return f"{file}{line}" + (f", {dotted(path)}" if path else "")
