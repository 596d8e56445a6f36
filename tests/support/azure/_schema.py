"""Bodies held against the SDK's own description of them: unknown names, wrong types, values that no list has."""

from __future__ import annotations

import sys
import typing
from enum import Enum
from functools import cache
from typing import Any

from tests.support.azure._wire import Refused

_OPEN = frozenset({"VirtualMachineSizeTypes"})
"""Lists of values that the SDK itself calls out of date."""


def check(kind: type[Any], value: Any) -> None:
    """Refuses what does not fit.

    Args:
        kind: a TypedDict of the SDK.
        value: the body.

    Raises:
        Refused: with the place and what is wrong there.
    """
    problem = next(_problems(kind, value, ""), None)
    if problem is not None:
        raise Refused(400, "InvalidRequestContent", f"The request content was invalid: {problem}")


def _problems(kind: Any, value: Any, at: str) -> typing.Iterator[str]:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_required(kind):
        yield from _problems(args[0], value, at)
    elif origin is typing.Union:
        yield from _of_union(args, value, at)
    elif origin is list:
        yield from _of_list(args[0], value, at)
    elif origin is dict:
        yield from _of_map(args[1], value, at)
    elif isinstance(kind, type) and hasattr(kind, "__total__"):
        yield from _of_object(kind, value, at)
    elif kind is not Any and not _is_of(kind, value):
        yield f"{at} is {type(value).__name__}, and has to be {getattr(kind, '__name__', kind)}"


def _is_required(kind: Any) -> bool:
    return getattr(typing.get_origin(kind), "_name", None) == "Required"


def _is_of(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _of_union(args: tuple[Any, ...], value: Any, at: str) -> typing.Iterator[str]:
    """Text of a list of values, or one of several kinds."""
    lists = [one for one in args if isinstance(one, type) and issubclass(one, Enum)]
    if lists and isinstance(value, str):
        known = {one.value.lower() for enum in lists for one in enum}
        if value.lower() not in known and lists[0].__name__ not in _OPEN:
            yield f"{at} is '{value}', and may be {', '.join(sorted(known))}"
        return
    if value is None and type(None) in args:
        return
    if all(next(_problems(one, value, at), None) is not None for one in args):
        yield from _problems(args[0], value, at)


def _of_list(kind: Any, value: Any, at: str) -> typing.Iterator[str]:
    if not isinstance(value, list):
        yield f"{at} has to be a list"
        return
    for number, one in enumerate(value):
        yield from _problems(kind, one, f"{at}[{number}]")


def _of_map(kind: Any, value: Any, at: str) -> typing.Iterator[str]:
    if not isinstance(value, dict):
        yield f"{at} has to be an object"
        return
    for name, one in value.items():
        yield from _problems(kind, one, f"{at}.{name}")


def _of_object(kind: Any, value: Any, at: str) -> typing.Iterator[str]:
    if not isinstance(value, dict):
        yield f"{at} has to be an object"
        return
    hints = _hints(kind)
    for name, one in value.items():
        if name not in hints:
            yield f"could not find member '{name}' on object {at or kind.__name__}"
        else:
            yield from _problems(hints[name], one, f"{at}.{name}".lstrip("."))
    for name, hint in hints.items():
        if _is_required(hint) and name not in value:
            yield f"required property '{name}' is missing at {at or kind.__name__}"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The names and kinds of an object, with the lists of values of the SDK's models."""
    module = sys.modules[kind.__module__]
    models = __import__(kind.__module__.rpartition(".")[0] + ".models", fromlist=["models"])
    from typing_extensions import get_type_hints

    return get_type_hints(kind, {**vars(models), **vars(module)}, include_extras=True)
