"""Finding, loading and calling plugins. One that is broken stays outside, with a reason; the others notice nothing."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import Distribution
from inspect import getattr_static
from types import TracebackType
from typing import Any, Protocol, TypeVar

import pluggy

from dstack_core import _hookspecs
from dstack_core._backends import _checks
from dstack_core._backends._calls import in_time
from dstack_core._hookspecs import PROJECT, BackendInfo
from dstack_core.errors import PluginBug

T = TypeVar("T")

log = logging.getLogger(__name__)

LOAD_TIMEOUT = 20.0
"""Seconds that all plugins together may take to be imported and to register."""

DISABLE_VARIABLE = "DSTACK_DISABLE_PLUGINS"
"""Names of entry points, separated by commas, that are left out."""

REGISTER = "dstack_register_backends"
REQUIRED = (
    "dstack_list_offers",
    "dstack_create_instance",
    "dstack_get_instance",
    "dstack_list_instances",
    "dstack_terminate_instance",
)
OPTIONAL = ("dstack_check_config", "dstack_connect", "dstack_get_console", "dstack_list_all_instances")
HOOKS = (REGISTER, *REQUIRED, *OPTIONAL)
_METHODS = (staticmethod, classmethod)


class EntryPoint(Protocol):
    """What is used of `importlib.metadata.EntryPoint`."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def dist(self) -> Distribution | None: ...
    def load(self) -> Any: ...


@dataclass(slots=True)
class Plugin:
    """One entry point and what became of it.

    Attributes:
        name: the entry point's name.
        distribution: the name of the package that brings it.
        version: of that package.
        path: where the package is installed.
        infos: the backends it brings.
        reason: why it is not used; `None` when it is.
    """

    name: str
    value: str
    distribution: str | None = None
    version: str | None = None
    path: str | None = None
    infos: tuple[BackendInfo, ...] = ()
    reason: str | None = None

    @property
    def described(self) -> str:
        """`dstack-aws 1.2.0`."""
        return f"{self.distribution} {self.version}" if self.distribution else "unknown version"

    @property
    def key(self) -> tuple[str | None, ...]:
        """The same for the same entry point of the same version of a package."""
        return (self.name, self.value, self.distribution, self.version)


class Implementation:
    """The hook implementations of one plugin or backend, gathered into an object that pluggy can hold.

    Compared by identity, whatever the plugin's own class says about equality and hashing.
    """

    def __init__(self, hooks: Mapping[str, Any]) -> None:
        self.__dict__.update(hooks)

    def __contains__(self, hook: str) -> bool:
        return hook in self.__dict__


@dataclass
class Plugins:
    """All plugins that were found, and the manager that calls them."""

    load_timeout: float | None = LOAD_TIMEOUT
    found: dict[tuple[str | None, ...], Plugin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(_hookspecs)
        # pluggy's lists change while other threads call hooks.
        self._lock = threading.RLock()
        self._owners: dict[Any, tuple[str, str]] = {}
        self._backends: set[Implementation] = set()
        self._wrappers: dict[tuple[str | None, ...], Implementation] = {}

    # ------------------------------------------------------------------------------------------------------ loading --

    def load(self, entry_points: Iterable[EntryPoint]) -> None:
        """Loads what is new, tries again what failed, and forgets what is no longer installed."""
        disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
        wanted = {(plugin := _described(point)).key: (plugin, point) for point in _in_order(entry_points)}
        for key in self.found.keys() - wanted.keys():
            self._forget(key)
        loads = []
        for key, (plugin, point) in wanted.items():
            if key in self.found and self.found[key].reason is None:
                continue
            self.found[key] = plugin
            if plugin.name in disabled:
                plugin.reason = f"it is left out, as {DISABLE_VARIABLE} says"
            else:
                loads.append(_Load(self, plugin, point))
        for load, ended in zip(loads, in_time([load.run for load in loads], self.load_timeout), strict=True):
            load.settle(ended=ended)

    def _forget(self, key: tuple[str | None, ...]) -> None:
        del self.found[key]
        wrappers = self._wrappers.pop(key, None)
        if wrappers is not None:
            self.remove(wrappers)

    def admit_wrappers(self, plugin: Plugin, hooks: Mapping[str, Any]) -> None:
        """Lets a plain plugin wrap the hooks of all backends."""
        implementation = Implementation(hooks)
        self._register(implementation, plugin.name, plugin.described)
        self._wrappers[plugin.key] = implementation

    # ---------------------------------------------------------------------------------------------------- backends --

    def admit_backend(self, backend: object, name: str, version: str) -> Implementation:
        """Makes a backend's object callable; `Broken` if it does not keep the contract."""
        hooks = marked_hooks(backend)
        missing = [hook for hook in REQUIRED if hook not in hooks]
        if missing:
            raise _checks.Broken(f"does not implement {', '.join(missing)}")
        implementation = Implementation(hooks)
        self._register(implementation, name, version)
        with self._lock:
            self._backends.add(implementation)
        return implementation

    def remove(self, implementation: Implementation) -> None:
        """Takes a backend or wrapper out. Calls under way end as they would."""
        with self._lock:
            self._backends.discard(implementation)
            if self._manager.is_registered(implementation):
                self._manager.unregister(implementation)

    def call(self, hook: str, implementation: Implementation, arguments: Mapping[str, object]) -> object:
        """Calls one hook of one backend, through all the wrappers."""
        with self._lock:
            others = self._backends - {implementation}
            caller = self._manager.subset_hook_caller(hook, others)
        return caller(**arguments)

    def blame(self, error: BaseException, plugin: str, version: str) -> tuple[str, str]:
        """Whose code raised: the innermost frame that is a hook implementation tells."""
        culprit = (plugin, version)
        for frame in _frames(error.__traceback__):
            culprit = self._owners.get(frame, culprit)
        return culprit

    def _register(self, implementation: Implementation, name: str, version: str) -> None:
        # The same name may be there twice (an entry point and its backend), so pluggy's own is made unique.
        unique = f"{name}@{id(implementation):x}"
        with self._lock:
            try:
                self._manager.register(implementation, unique)
            except pluggy.PluginValidationError as error:
                if self._manager.is_registered(implementation):
                    self._manager.unregister(implementation)
                raise _checks.Broken(" ".join(str(error).replace(unique, name).split())) from None
        for function in implementation.__dict__.values():
            self._owners[getattr(function, "__code__", None)] = (name, version)


class _Load:
    """One attempt to load one entry point, possibly abandoned."""

    def __init__(self, plugins: Plugins, plugin: Plugin, point: EntryPoint) -> None:
        self._plugins = plugins
        self._plugin = plugin
        self._point = point
        self._infos: tuple[BackendInfo, ...] = ()
        self._hooks: dict[str, Any] = {}
        self._problem: str | None = None

    def run(self) -> None:
        """Imports and registers; leaves nothing behind in the shared state, since it may end too late."""
        try:
            loaded = self._point.load()
        except BaseException as error:  # noqa: BLE001  # whatever a plugin raises stays with the plugin
            self._problem = f"importing {self._point.value} failed: {in_words(error)}"
            return
        try:
            self._examine(loaded)
        except _checks.Broken as problem:
            self._problem = str(problem)
        except BaseException as error:  # noqa: BLE001  # as above
            self._problem = f"{REGISTER} failed: {in_words(error)}"

    def _examine(self, loaded: object) -> None:
        problem = _checks.other_api(getattr(loaded, "DSTACK_PLUGIN_API", _hookspecs.PLUGIN_API))
        if problem:
            raise _checks.Broken(problem)
        hooks = marked_hooks(loaded)
        register = hooks.pop(REGISTER, None)
        for name, function in hooks.items():
            if not getattr(function, f"{PROJECT}_impl").get("wrapper"):
                raise _checks.Broken(
                    f"it implements {name} for every backend; a plugin may wrap it (@hookimpl(wrapper=True)), "
                    "and a backend implements it in the object that its factory makes"
                )
        if register is None and not hooks:
            raise _checks.Broken(f"{self._point.value} has neither {REGISTER} nor a wrapper, marked with @hookimpl")
        if register is not None:
            self._infos = tuple(_checks.infos(register()))
        self._hooks = hooks

    def settle(self, *, ended: bool) -> None:
        """Puts the outcome where everybody sees it."""
        plugin = self._plugin
        if not ended:
            self._problem = f"it did not load within {self._plugins.load_timeout:g} s"
        elif self._problem is None and self._hooks:
            try:
                self._plugins.admit_wrappers(plugin, self._hooks)
            except _checks.Broken as problem:
                self._problem = str(problem)
        if self._problem is not None:
            plugin.reason = str(PluginBug(plugin.name, plugin.described, "loading", self._problem))
            log.warning("%s", plugin.reason)
            return
        plugin.infos = self._infos


def marked_hooks(plugin: object) -> dict[str, Any]:
    """The hook implementations of a module or object, by hook name; `Broken` says what is misspelt or unmarked."""
    found: dict[str, Any] = {}
    for attribute in dir(plugin):
        # Looked at without running it: a property may well open a connection.
        static = getattr_static(plugin, attribute, None)
        function = getattr(plugin, attribute) if callable(static) or isinstance(static, _METHODS) else None
        options = getattr(function, f"{PROJECT}_impl", None)
        if isinstance(options, dict):
            hook = options.get("specname") or attribute
            if hook in HOOKS:
                found[hook] = function
            elif not options.get("optionalhook"):
                raise _checks.Broken(_unknown_hook(hook))
        elif attribute in HOOKS and callable(function):
            raise _checks.Broken(f"{attribute} is not marked with @hookimpl")
    return found


def in_words(error: BaseException) -> str:
    """Type, message and place of an exception, on one line."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})" if last is not None else ""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text}" if text else "") + place


def _unknown_hook(name: str) -> str:
    near = get_close_matches(name, HOOKS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"there is no hook '{name}'.{hint} Known hooks: {', '.join(HOOKS)}"


def _frames(traceback: TracebackType | None) -> Iterator[object]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def _in_order(entry_points: Iterable[EntryPoint]) -> Sequence[EntryPoint]:
    return sorted(entry_points, key=lambda point: (point.name, _name(point.dist) or "", point.value))


def _described(point: EntryPoint) -> Plugin:
    plugin = Plugin(point.name, point.value)
    if point.dist is not None:
        plugin.distribution, plugin.version = _name(point.dist), _quietly(lambda dist: dist.version, point.dist)
        plugin.path = _quietly(lambda dist: str(dist.locate_file("")), point.dist)
    return plugin


def _name(dist: Distribution | None) -> str | None:
    return _quietly(lambda known: known.metadata["Name"], dist) if dist is not None else None


def _quietly(read: Callable[[Distribution], T], dist: Distribution) -> T | None:
    """Damaged metadata of one package must not hide the others."""
    try:
        return read(dist)
    except Exception:  # noqa: BLE001  # whatever is wrong with the metadata, the name alone is lost
        return None
