"""Lambda's own OpenAPI document, where it is at hand: what requests and answers must look like.

It is not part of this repository. It is read from the file that `DSTACK_LAMBDA_OPENAPI` names, or from
`../shared/specs/lambda-openapi-*.json` beside the checkout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

VARIABLE = "DSTACK_LAMBDA_OPENAPI"
_BESIDE = Path(__file__).parents[4] / "shared" / "specs"
_URI = "urn:lambda-openapi"


class Document:
    """The document.

    Args:
        path: the file.

    Attributes:
        version: of the API that it describes.
    """

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.version = str(content["info"]["version"])
        resource = Resource.from_contents(content, default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource(_URI, resource)
        self._operations = {
            operation["operationId"]: (location, method, operation)
            for location, methods in content["paths"].items()
            for method, operation in methods.items()
            if method in ("get", "post", "put", "patch", "delete")
        }
        self._schemas: dict[str, dict[str, Any]] = content["components"]["schemas"]
        self._validator = cache(self._made)
        self._remembered = lru_cache(10_000)(self._wrong_text)

    @staticmethod
    @cache
    def at_hand() -> Document | None:
        """The document; `None` where there is none.

        Raises:
            FileNotFoundError: a file was named, and it is not there.
        """
        named = os.environ.get(VARIABLE)
        if named:
            return Document(Path(named))
        found = sorted(_BESIDE.glob("lambda-openapi-*.json"))
        return Document(found[-1]) if found else None

    def operation(self, name: str) -> tuple[str, str]:
        """Path and method of an operation."""
        path, method, _ = self._operations[name]
        return path, method.upper()

    def codes(self) -> set[str]:
        """The codes of all errors that it knows, but those of what `dstack-lambda` has nothing to do with."""
        found = set()
        for schema in self._schemas.values():
            code = schema.get("properties", {}).get("code", {}).get("const", "")
            if code.startswith(("global/", "instance-operations/")):
                found.add(code)
        return found

    def wrong_request(self, name: str, body: Any) -> list[str]:
        """What is wrong with the body of a request; `None` for one without a body."""
        path, method, operation = self._operations[name]
        if "requestBody" not in operation:
            return [] if body is None else [f"{name} takes no body"]
        pointer = (path, method, "requestBody", "content", "application/json", "schema")
        return list(self._errors(pointer, body))

    def wrong_answer(self, name: str, status: int, body: Any) -> list[str]:
        """What is wrong with an answer. Of throttling and of the cloud's own failures the document says nothing."""
        path, method, operation = self._operations[name]
        if status == 429 or status >= 500:
            return []
        if str(status) not in operation["responses"]:
            return [f"{name} never answers with {status}"]
        pointer = (path, method, "responses", str(status), "content", "application/json", "schema")
        entries = body.get("data") if isinstance(body, dict) else None
        parts = [{**body, "data": [entry]} for entry in entries] if isinstance(entries, list) and entries else [body]
        # A listing is long and nearly the same each time: each entry is looked at once.
        return [wrong for part in parts for wrong in self._remembered(pointer, json.dumps(part))]

    def _errors(self, pointer: tuple[str, ...], value: Any) -> Iterator[str]:
        for error in self._validator(pointer).iter_errors(value):
            yield f"{'/'.join(map(str, error.absolute_path)) or 'the body'}: {error.message}"

    def _wrong_text(self, pointer: tuple[str, ...], text: str) -> list[str]:
        return list(self._errors(pointer, json.loads(text)))

    def _made(self, pointer: tuple[str, ...]) -> Draft202012Validator:
        steps = "/".join(step.replace("~", "~0").replace("/", "~1") for step in ("paths", *pointer))
        return Draft202012Validator({"$ref": f"{_URI}#/{steps}"}, registry=self._registry)
