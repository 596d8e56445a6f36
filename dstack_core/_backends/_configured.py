"""What is installed, matched with what is configured: one `Backend` a name, usable or with the reason why not."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from dstack_core._backends import _checks
from dstack_core._backends._plugins import Implementation, Plugin, in_words
from dstack_core._hookspecs import BackendConfig, BackendInfo
from dstack_core._models.documents import unknown_key
from dstack_core._models.server_config import BackendEntry
from dstack_core._models.wire import BackendStatus
from dstack_core.errors import BackendNotInstalledError, ConfigurationError, PluginBug

State = Literal["configured", "not_configured", "not_installed", "failed"]


@dataclass(slots=True, eq=False)
class Backend:
    """One backend that is known by name.

    Attributes:
        state: as in `BackendStatus`.
        problem: why it cannot be used; `None` when it can.
        warning: something a person should know although it works.
        config: validated; `None` when it cannot be used.
        retired: no longer in the configuration; instances that it made are still looked after.
        implementation: the object with its hooks, made at first use under `lock`.
    """

    name: str
    info: BackendInfo
    plugin: Plugin | None
    state: State
    problem: Exception | None = None
    warning: str | None = None
    config: BackendConfig | None = None
    retired: bool = False
    implementation: Implementation | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def usable(self) -> bool:
        """Whether it can be given new work."""
        return self.config is not None and not self.retired

    @property
    def version(self) -> str:
        """Distribution and version, for messages."""
        return self.plugin.described if self.plugin else "unknown version"

    def bug(self, hook: str, problem: str) -> PluginBug:
        """A bug of this backend."""
        return PluginBug(self.name, self.version, hook, problem)

    def status(self, problems: tuple[str, ...]) -> BackendStatus:
        """As `dstack backends` shows it."""
        reason = self.problem or self.warning
        return _status(self.plugin, self.name, self.info.title, self.state, reason and str(reason), problems)


def match(plugins: Sequence[Plugin], entries: Mapping[str, BackendEntry]) -> dict[str, Backend]:
    """The backends that the plugins bring and the entries ask for, by name."""
    brought = _by_name(plugins)
    found = {name: _installed(name, claims, entries.get(name)) for name, claims in brought.items()}
    for name in entries.keys() - brought.keys():
        found[name] = _missing(name, plugins)
    return found


def succeed(old: Backend, new: Backend | None) -> Backend:
    """Which of two of one name goes on: an unchanged one keeps its object, a removed one retires."""
    if old.config is None or (new is not None and new.config is not None and not _same(old, new)):
        return new or old
    # Nothing changed, or it is gone while instances may be left that only this object can terminate.
    old.retired = new is None or new.config is None
    old.state = new.state if new else "not_installed"
    old.problem = new.problem if new else BackendNotInstalledError(old.name)
    old.warning = new.warning if new else None
    return old


def failed(plugins: Iterable[Plugin], backends: Mapping[str, Backend]) -> Iterator[BackendStatus]:
    """What could not be loaded and is not shown under the name of a configured backend."""
    shown = {id(backend.plugin) for backend in backends.values()}
    for plugin in plugins:
        if plugin.reason is not None and id(plugin) not in shown:
            yield _status(plugin, plugin.name, plugin.name, "failed", plugin.reason, ())


def unknown_info(name: str) -> BackendInfo:
    """Stands in for what a backend that is not there would declare."""
    return BackendInfo(name=name, title=name, config=BackendConfig, factory="")


def not_configured(name: str) -> ConfigurationError:
    """The refusal of a backend that is installed only."""
    return ConfigurationError(
        f"Backend '{name}' is not configured. Add it to the project's `backends:` in server/config.yml: - type: {name}"
    )


def _same(old: Backend, new: Backend) -> bool:
    return (new.config, new.info) == (old.config, old.info)


def _by_name(plugins: Iterable[Plugin]) -> dict[str, list[tuple[BackendInfo, Plugin]]]:
    """Who brings which backend. The package named after the backend comes first, then the alphabet."""
    found: dict[str, list[tuple[BackendInfo, Plugin]]] = {}
    for plugin in plugins:
        for info in plugin.infos:
            found.setdefault(info.name, []).append((info, plugin))
    for name, claims in found.items():
        claims.sort(key=lambda claim: (claim[1].distribution != f"dstack-{name}", claim[1].described, claim[1].name))
    return found


def _installed(name: str, claims: Sequence[tuple[BackendInfo, Plugin]], entry: BackendEntry | None) -> Backend:
    (info, plugin), *others = claims
    backend = Backend(name, info, plugin, "configured", warning=_claimed_twice(name, plugin, others))
    other_api = _checks.other_api(info.plugin_api)
    if other_api:
        backend.state, backend.problem = "failed", backend.bug("loading", other_api)
        return backend
    try:
        backend.config = info.default_config if entry is None else _validated(info, entry)
    except ConfigurationError as error:
        backend.state, backend.problem = "failed", error
        return backend
    if backend.config is None:
        backend.state, backend.problem = "not_configured", not_configured(name)
    return backend


def _missing(name: str, plugins: Iterable[Plugin]) -> Backend:
    """A configured backend that no package brings: not installed, or its package failed to load."""
    for plugin in plugins:
        if plugin.reason is not None and name in (plugin.name, (plugin.distribution or "").removeprefix("dstack-")):
            return Backend(name, unknown_info(name), plugin, "failed", ConfigurationError(plugin.reason))
    return Backend(name, unknown_info(name), None, "not_installed", BackendNotInstalledError(name))


def _validated(info: BackendInfo, entry: BackendEntry) -> BackendConfig:
    try:
        return info.config.model_validate(dict(entry.values))
    except ValidationError as error:
        problems = [_problem(details, info, entry) for details in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(problems)) from None
    except Exception as error:
        # A validator of the plugin's own.
        raise ConfigurationError(f"{entry.where()}: {in_words(error)}") from error


def _problem(details: Any, info: BackendInfo, entry: BackendEntry) -> str:
    """One thing that is wrong with an entry, without the value, which may be a secret."""
    key = tuple(details["loc"])
    if details["type"] == "extra_forbidden":
        allowed = list(info.config.model_fields) if len(key) == 1 else []
        return f"{entry.where(key)}: {unknown_key(str(key[-1]), allowed)}"
    if details["type"] == "missing":
        return f"{entry.where(key)}: '{key[-1]}' is required by the backend '{info.name}'; add it"
    message = details["msg"].removeprefix("Value error, ")
    return f"{entry.where(key)}: {message[:1].lower()}{message[1:]}"


def _claimed_twice(name: str, plugin: Plugin, others: Sequence[tuple[BackendInfo, Plugin]]) -> str | None:
    if not others:
        return None
    names = ", ".join(f"{other.described} (entry point '{other.name}')" for _, other in others)
    used = f"{plugin.described} (entry point '{plugin.name}')"
    return f"More than one package brings a backend '{name}': {used} is used, and not {names}. Uninstall one."


def _status(
    plugin: Plugin | None, name: str, title: str, state: State, reason: str | None, problems: tuple[str, ...]
) -> BackendStatus:
    return BackendStatus(
        name=name,
        title=title,
        state=state,
        distribution=plugin.distribution if plugin else None,
        version=plugin.version if plugin else None,
        path=plugin.path if plugin else None,
        reason=reason,
        problems=problems,
    )
