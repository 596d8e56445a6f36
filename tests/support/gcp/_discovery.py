"""Google's discovery documents: which method a request is meant for, and whether requests and answers are right."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_WHOLE = {"int32": 32, "uint32": 32, "int64": 64, "uint64": 64}


@dataclass(frozen=True)
class Method:
    """One method of an API.

    Attributes:
        values: as the document has it.
        api: whose it is.
    """

    values: dict[str, Any]
    api: Api

    @property
    def id(self) -> str:
        """`compute.instances.insert`."""
        return str(self.values["id"])

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its paths look like."""
        path = re.escape(self.api.prefix + self.values.get("flatPath", self.values["path"]))
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+?)", path))

    def problems_of_request(self, path: Mapping[str, str], query: Mapping[str, str], body: Any) -> Iterator[str]:
        """What is wrong with a request."""
        known = {**self.api.document["parameters"], **self.values.get("parameters", {})}
        for name, value in {**path, **query}.items():
            if name.startswith("$"):
                continue
            if name not in known and name in query:
                yield f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.'
            elif name in known:
                yield from _text_problems(known[name], value, name)
        for name, parameter in self.values.get("parameters", {}).items():
            if parameter.get("required") and parameter["location"] == "query" and name not in query:
                yield f"Required field '{name}' not specified"
        if "request" in self.values:
            yield from self.api.problems(self.values["request"]["$ref"], body, "resource", asked_by=self.id)
        elif body is not None:
            yield "Invalid JSON payload received. There is no body."

    def problems_of_answer(self, body: Any) -> Iterator[str]:
        """What is wrong with an answer."""
        if "response" in self.values:
            yield from self.api.problems(self.values["response"]["$ref"], body, self.id)


class Api:
    """One document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.prefix = f"/{document['servicePath']}"
        self._schemas: dict[str, Any] = document["schemas"]

    def methods(self) -> Iterator[Method]:
        """All of them."""
        yield from (Method(values, self) for values in _methods(self.document))

    def problems(self, schema: str, value: Any, where: str, *, asked_by: str | None = None) -> Iterator[str]:
        """What is wrong with a value, by the name of its schema.

        Args:
            schema: its name.
            value: what came.
            where: how it is called in messages.
            asked_by: the method whose request it is; an answer if not set.
        """
        yield from self._problems({"$ref": schema}, value, where, asked_by)

    def _problems(self, schema: dict[str, Any], value: Any, where: str, asked_by: str | None) -> Iterator[str]:
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"]]
        kind = schema.get("type", "any")
        if kind == "object":
            yield from self._object_problems(schema, value, where, asked_by)
        elif kind == "array":
            if not isinstance(value, list):
                yield f"Invalid value for field '{where}': not a list"
                return
            for number, entry in enumerate(value):
                yield from self._problems(schema["items"], entry, f"{where}[{number}]", asked_by)
        elif kind == "boolean" and not isinstance(value, bool):
            yield f"Invalid value for field '{where}': {value!r} is not true or false"
        elif kind in ("string", "integer", "number"):
            yield from _scalar_problems(schema, value, where)

    def _object_problems(self, schema: dict[str, Any], value: Any, where: str, asked_by: str | None) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"Invalid value for field '{where}': not an object"
            return
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            place = f"{where}.{name}"
            if name in properties:
                if asked_by is not None and properties[name].get("readOnly"):
                    yield f"Invalid value for field '{place}': only the answer has it"
                yield from self._problems(properties[name], inner, place, asked_by)
            elif more is not None:
                yield from self._problems(more, inner, place, asked_by)
            else:
                yield f"Invalid JSON payload received. Unknown name \"{name}\" at '{where}': Cannot find field."
        for name, inner in properties.items():
            if asked_by in inner.get("annotations", {}).get("required", ()) and name not in value:
                yield f"Required field '{where}.{name}' not specified"


def _methods(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from part.get("methods", {}).values()
    for inner in part.get("resources", {}).values():
        yield from _methods(inner)


def _scalar_problems(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    size = schema.get("format", "")
    if schema["type"] == "string" and size not in _WHOLE:
        if not isinstance(value, str):
            yield f"Invalid value for field '{where}': {value!r} is no text"
        else:
            yield from _text_problems(schema, value, where)
    elif isinstance(value, bool) or not re.fullmatch(r"-?\d+(\.\d+)?", str(value)):
        yield f"Invalid value for field '{where}': {value!r} is no number"
    elif size in _WHOLE:
        yield from _size_problems(size, value, where)


def _size_problems(size: str, value: Any, where: str) -> Iterator[str]:
    low, high = -(1 << (_WHOLE[size] - 1)), 1 << (_WHOLE[size] - 1)
    if size.startswith("u"):
        low, high = 0, 1 << _WHOLE[size]
    if float(value) != int(float(value)) or not low <= int(value) < high:
        yield f"Invalid value for field '{where}': {value!r} is no {size}"


def _text_problems(schema: dict[str, Any], value: str, where: str) -> Iterator[str]:
    """Also for parameters, all of which are text on the wire."""
    if schema.get("type") == "boolean" and value not in ("true", "false"):
        yield f"Invalid value for field '{where}': {value!r} is not true or false"
    if schema.get("format") in _WHOLE:
        if re.fullmatch(r"-?\d+", value):
            yield from _size_problems(schema["format"], value, where)
        else:
            yield f"Invalid value for field '{where}': {value!r} is no number"
    if "enum" in schema and value not in schema["enum"]:
        yield f"Invalid value for field '{where}': '{value}'. Must be one of {', '.join(schema['enum'])}"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        yield f"Invalid value for field '{where}': '{value}'. Must be a match of regex '{schema['pattern']}'"


class Apis:
    """Several documents: whom a request is meant for."""

    def __init__(self, apis: list[Api]) -> None:
        self._methods: dict[tuple[str, int], list[Method]] = defaultdict(list)
        self.count = 0
        for api in apis:
            for method in api.methods():
                path = api.prefix + method.values.get("flatPath", method.values["path"])
                self._methods[method.values["httpMethod"], path.count("/")].append(method)
                self.count += 1

    def find(self, verb: str, path: str) -> tuple[Method, dict[str, str]] | None:
        """The method, and the parameters in the path."""
        for method in self._methods[verb, path.count("/")]:
            found = method.pattern.fullmatch(path)
            if found is not None:
                return method, {name: unquote(value) for name, value in found.groupdict().items()}
        return None


@lru_cache
def google() -> Apis:
    """Compute Engine, Cloud Billing and the part of the resource manager that knows permissions."""
    return Apis([_read(name) for name in ("compute.v1", "cloudbilling.v1", "cloudresourcemanager.v1")])


def _read(name: str) -> Api:
    spec = find_spec("googleapiclient")
    assert spec is not None, "google-api-python-client is not installed"
    assert spec.origin is not None
    path = Path(spec.origin).parent / "discovery_cache" / "documents" / f"{name}.json"
    return Api(json.loads(path.read_bytes()))
