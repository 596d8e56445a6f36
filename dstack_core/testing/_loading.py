"""From an entry point to a backend's object and its hooks, as the core goes, step by step."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dstack_core.plugin import BackendInfo

GROUP = "dstack.backends"
REQUIRED = (
    "dstack_list_offers",
    "dstack_create_instance",
    "dstack_get_instance",
    "dstack_list_instances",
    "dstack_terminate_instance",
)
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "dstack_list_offers": ("requirements", "backend"),
    "dstack_create_instance": ("request", "backend"),
    "dstack_get_instance": ("ref", "backend"),
    "dstack_list_instances": ("owner", "backend"),
    "dstack_terminate_instance": ("ref", "backend"),
    "dstack_check_config": ("backend",),
    "dstack_connect": ("instance", "backend"),
    "dstack_get_console": ("ref", "backend"),
    "dstack_list_all_instances": ("backend",),
}


class NotFound(Exception):
    """There is no such backend; the message says what there is and what to do."""


def find(backend: str) -> EntryPoint:
    """The entry point that brings a backend; its name is usually the backend's.

    Raises:
        NotFound: nothing installed brings it.
    """
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name != backend)
    for point in points:
        if point.name == backend or any(info.name == backend for info in _quietly(point)):
            return point
    known = ", ".join(sorted(f"{point.name} ({point.value})" for point in points)) or "none"
    raise NotFound(
        f"No installed package has an entry point for the backend '{backend}' in the group '{GROUP}'. "
        f"Installed: {known}. Install the package (pip install -e .); its pyproject.toml needs:"
        f' [project.entry-points."{GROUP}"] {backend} = "your_module"'
    )


def _quietly(point: EntryPoint) -> list[BackendInfo]:
    """What a package brings; nothing if it is broken, which is somebody else's problem."""
    try:
        return infos(point)
    except Exception:  # noqa: BLE001  # whatever it is, this package does not bring the backend that is looked for
        return []


def infos(point: EntryPoint) -> list[BackendInfo]:
    """What the entry point's module registers."""
    return list(point.load().dstack_register_backends())


def info(point: EntryPoint, backend: str) -> BackendInfo:
    """What is declared of a backend.

    Raises:
        NotFound: the package does not declare it.
    """
    found = infos(point)
    for one in found:
        if one.name == backend:
            return one
    names = ", ".join(one.name for one in found) or "none"
    raise NotFound(f"{point.value} registers {names}, and not '{backend}': compare `BackendInfo.name` with the test's.")


def factory(declared: BackendInfo) -> Callable[[Any], object]:
    """What makes the backend's object."""
    module, _, path = declared.factory.partition(":")
    made: Any = importlib.import_module(module)
    for attribute in path.split("."):
        made = getattr(made, attribute)
    return made  # type: ignore[no-any-return]  # checked by calling it


@dataclass(frozen=True)
class Hooks:
    """The hooks of a backend's object, called with as many arguments as each one takes."""

    found: Mapping[str, Callable[..., Any]]
    misspelt: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()

    def __contains__(self, hook: str) -> bool:
        return hook in self.found

    def call(self, hook: str, **arguments: object) -> Any:
        """Calls one, as the core does: an implementation may take any subset of the arguments."""
        function = self.found[hook]
        taken = inspect.signature(function).parameters
        return function(**{name: value for name, value in arguments.items() if name in taken})


def hooks_of(made: object) -> Hooks:
    """Those marked with `@hookimpl`."""
    found, misspelt, unmarked = {}, [], []
    for name in dir(made):
        # Looked at without running it: a property may well open a connection.
        static = inspect.getattr_static(made, name, None)
        if not (callable(static) or isinstance(static, staticmethod | classmethod)):
            continue
        function = getattr(made, name)
        options = getattr(function, "dstack_impl", None)
        if isinstance(options, dict):
            hook = options.get("specname") or name
            if hook in ARGUMENTS:
                found[hook] = function
            else:
                misspelt.append(hook)
        elif name in ARGUMENTS:
            unmarked.append(name)
    return Hooks(found, tuple(misspelt), tuple(unmarked))
