"""The hub: what the engine and the server use of the backends."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import UUID

from dstack_core._backends import _checks
from dstack_core._backends._calls import Busy, Caller, ThreadCaller
from dstack_core._backends._configured import Backend, failed, match, not_configured, succeed, unknown_info
from dstack_core._backends._listings import OLDEST, Fetched, Key, Listing, Listings
from dstack_core._backends._plugins import LOAD_TIMEOUT, EntryPoint, Implementation, Plugins, in_words
from dstack_core._hookspecs import ENTRY_POINT_GROUP, BackendInfo
from dstack_core._models.instances import Endpoint, Instance, InstanceRef, InstanceRequest
from dstack_core._models.offer_index import OfferIndex
from dstack_core._models.offers import Requirements
from dstack_core._models.server_config import DEFAULT_PROJECT, BackendEntry, load_server_config
from dstack_core._models.wire import BackendStatus
from dstack_core.errors import (
    AuthenticationError,
    BackendError,
    BackendNotInstalledError,
    ConfigurationError,
    InvalidRequestError,
    NoCapacityError,
    PluginBug,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

_Errors = tuple[type[BackendError], ...]
_READS: _Errors = (PluginBug, AuthenticationError, RateLimitedError, UnknownOutcomeError)
_REFUSES: _Errors = (*_READS, InvalidRequestError)
_CREATES: _Errors = (*_REFUSES, NoCapacityError, QuotaExceededError)


@dataclass(frozen=True, slots=True)
class _Question(Generic[T]):
    """One call of one hook.

    Attributes:
        hook: its name.
        arguments: by name.
        check: holds the answer against the contract.
        allowed: what the hook may raise.
        absent: the answer, alone in a tuple, for a backend that does not have this hook.
    """

    hook: str
    arguments: Mapping[str, object]
    check: Callable[[object], T]
    allowed: _Errors = _READS
    absent: tuple[T] | None = None


UNMARKED_VARIABLE = "DSTACK_ALLOW_UNMARKED"
"""Set to `1` for the server, it admits backends that cannot mark an instance as ours."""


def _unmarked(name: str) -> str:
    return (
        f"Backend '{name}' cannot mark its instances as ours, so one that is lost in a crash could not be found again. "
        f"If you will look after them yourself, set {UNMARKED_VARIABLE}=1 for the server."
    )


class BackendHub:
    """All backends of one project. Made by `discover` or `open`; belongs to one event loop.

    The methods that talk to a backend raise subclasses of `BackendError` and nothing else. What a plugin did wrong is a
    `PluginBug`; a call that took too long is an `UnknownOutcomeError` where it may have changed something.
    """

    def __init__(
        self,
        plugins: Plugins,
        entry_points: Callable[..., Iterable[EntryPoint]],
        source: Callable[[], Sequence[BackendEntry]],
        watched: Callable[[], object],
        call: Caller,
        clock: Callable[[], float],
    ) -> None:
        self._plugins = plugins
        self._entry_points = entry_points
        self._source = source
        self._watched = watched
        self._call = call
        self._listings = Listings(clock)
        self._backends: dict[str, Backend] = {}
        self._config_problem: ConfigurationError | None = None
        self._loading = threading.Lock()
        self._seen = watched()
        self._reload()

    @classmethod
    def discover(
        cls,
        configs: Sequence[BackendEntry] = (),
        *,
        file: Path | None = None,
        project: str = DEFAULT_PROJECT,
        entry_points: Callable[..., Iterable[EntryPoint]] = importlib.metadata.entry_points,
        call: Caller | None = None,
        clock: Callable[[], float] = time.monotonic,
        load_timeout: float | None = LOAD_TIMEOUT,
    ) -> BackendHub:
        """Loads every installed plugin and matches it with the configuration. Never raises for what a plugin does.

        Args:
            configs: the project's entries, when there is no `file`.
            file: the server's configuration file; followed by `refresh`.
            project: whose entries of the file.
            entry_points: called with `group=`.
            call: how hooks are run; in threads, unless a simulator says otherwise.
            clock: monotonic seconds, for the age of listings.
            load_timeout: seconds for loading all plugins; `None` loads them in this thread, however long it takes.

        Raises:
            ConfigurationError: the file is not what it should be.
        """

        def source() -> Sequence[BackendEntry]:
            return configs if file is None else load_server_config(file).projects.get(project, ())

        def watched() -> object:
            return None if file is None else (_stamp(file), *map(_stamp, sys.path))

        hub = cls(Plugins(load_timeout), entry_points, source, watched, call or ThreadCaller(), clock)
        hub._raise_config_problem()
        return hub

    @classmethod
    def open(cls, file: Path, project: str = DEFAULT_PROJECT, **options: Any) -> BackendHub:
        """The hub of a project of the server's configuration file, which need not exist. Options as of `discover`."""
        return cls.discover(file=file, project=project, **options)

    # -- what there is -----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The backends that can be used, in alphabetical order."""
        return sorted(name for name, backend in self._backends.items() if backend.usable)

    def reachable(self) -> list[str]:
        """The backends whose instances can be asked about, those that were taken out of the configuration included."""
        return sorted(name for name, backend in self._backends.items() if backend.config is not None)

    def info(self, backend: str) -> BackendInfo:
        """What a backend declares. One that is not there any more has the defaults, so its rows can be handled."""
        known = self._backends.get(backend)
        return known.info if known else unknown_info(backend)

    def problem(self, backend: str) -> Exception | None:
        """Why a backend cannot be used (not installed, not configured, a bug), with the cure; `None` if it can."""
        known = self._backends.get(backend)
        if known is None:
            return BackendNotInstalledError(backend)
        return None if known.usable else known.problem

    def was_removed(self, backend: str) -> bool:
        """Whether a person took it away: out of the configuration, or its package."""
        known = self._backends.get(backend)
        return known is None or known.retired or known.state in ("not_configured", "not_installed")

    async def status(self, *, check: bool = False) -> list[BackendStatus]:
        """Everything that is installed or configured, with the reason where it cannot be used.

        Args:
            check: let each backend check its configuration, too.
        """
        backends = [self._backends[name] for name in sorted(self._backends)]
        checked = [backend.name for backend in backends if check and backend.usable]
        problems = dict(zip(checked, await asyncio.gather(*map(self._problems, checked)), strict=True))
        statuses = [backend.status(tuple(problems.get(backend.name, ()))) for backend in backends]
        return [*statuses, *failed(self._plugins.found.values(), self._backends)]

    async def refresh(self) -> None:
        """Notices a changed configuration and packages installed since, without a restart. Cheap when nothing changed.

        Raises:
            ConfigurationError: the file is not what it should be; everything stays as it was until it is repaired.
        """
        seen = self._watched()
        if seen != self._seen:
            self._seen = seen
            await asyncio.to_thread(self._reload)
        self._raise_config_problem()

    # -- the hooks ---------------------------------------------------------------------------------------------------

    async def list_offers(
        self, requirements: Requirements, *, timeout: float, only: Sequence[str] | None = None
    ) -> list[Listing]:
        """Asks all backends at once; one listing for each, in the order of names.

        Args:
            requirements: what is needed.
            timeout: seconds after which a backend counts as late. Its answer, when it comes, serves the next call.
            only: names of the backends to ask, in this order. One that cannot be used says why; without `only`, that
                is each one that is configured, or that failed to load.
        """
        names = self._wanted() if only is None else list(dict.fromkeys(only))
        listings = await asyncio.gather(*(self._listing(name, requirements, timeout) for name in names))
        return [*listings, *(self._unloaded() if only is None else ())]

    async def create_instance(self, backend: str, request: InstanceRequest) -> Instance:
        """See `dstack_create_instance`. A backend that is not there refuses for certain."""
        known = self._new_work(backend)
        question = _Question(
            "dstack_create_instance", {"request": request}, _checks.created(backend, request), _CREATES
        )
        return await self._ask(known, question)

    async def get_instance(self, ref: InstanceRef) -> Instance | None:
        """See `dstack_get_instance`."""
        known = self._old_work(ref.backend)
        return await self._ask(known, _Question("dstack_get_instance", {"ref": ref}, _checks.found(ref)))

    async def list_instances(self, backend: str, owner: UUID) -> list[Instance]:
        """See `dstack_list_instances`."""
        known = self._old_work(backend)
        check = _checks.owned(backend, owner)
        return await self._ask(known, _Question("dstack_list_instances", {"owner": owner}, check))

    async def list_all_instances(self, backend: str) -> list[Instance] | None:
        """See `dstack_list_all_instances`; `None` for a backend without it."""
        question: _Question[list[Instance] | None] = _Question(
            "dstack_list_all_instances", {}, _checks.whoever_s(backend), absent=(None,)
        )
        return await self._ask(self._old_work(backend), question)

    async def terminate_instance(self, ref: InstanceRef) -> None:
        """See `dstack_terminate_instance`."""
        known = self._old_work(ref.backend)
        await self._ask(known, _Question("dstack_terminate_instance", {"ref": ref}, _checks.anything))

    async def check_config(self, backend: str) -> list[str]:
        """See `dstack_check_config`; empty for a backend that has no such check."""
        question: _Question[list[str]] = _Question("dstack_check_config", {}, _checks.sentences, _REFUSES, absent=([],))
        return await self._ask(self._new_work(backend), question)

    async def connect(self, instance: Instance) -> Endpoint | None:
        """See `dstack_connect`; for a backend without it, the endpoint that the instance has."""
        known = self._old_work(instance.ref.backend)
        there = (instance.endpoint,)
        question = _Question("dstack_connect", {"instance": instance}, _checks.endpoint, absent=there)
        return await self._ask(known, question)

    async def get_console(self, ref: InstanceRef) -> str | None:
        """See `dstack_get_console`; `None` for a backend without it."""
        question: _Question[str | None] = _Question("dstack_get_console", {"ref": ref}, _checks.text, absent=(None,))
        return await self._ask(self._old_work(ref.backend), question)

    # -- one call ----------------------------------------------------------------------------------------------------

    def _new_work(self, name: str) -> Backend:
        """The backend of that name, if it is installed and configured."""
        known = self._backends.get(name)
        if known is not None and known.usable:
            if known.info.ownership == "none" and os.environ.get(UNMARKED_VARIABLE) != "1":
                raise InvalidRequestError(_unmarked(name))
            return known
        problem = self.problem(name) or not_configured(name)
        raise problem if isinstance(problem, BackendError) else InvalidRequestError(str(problem))

    def _old_work(self, name: str) -> Backend:
        """The backend of that name, if it can be asked at all; nothing is concluded about its instances if not."""
        known = self._backends.get(name)
        if known is not None and known.config is not None:
            return known
        raise UnknownOutcomeError(str(self.problem(name)))

    async def _ask(self, backend: Backend, question: _Question[T]) -> T:
        limit, timeout = backend.info.max_concurrency, backend.info.hook_timeout
        try:
            return await self._call(backend.name, limit, timeout, lambda: self._answer(backend, question))
        except Busy:
            raise RateLimitedError(
                f"Backend '{backend.name}' has {limit} calls under way, and none of them ended within {timeout:g} s"
            ) from None
        except TimeoutError:
            raise _too_late(backend, question.hook, timeout) from None

    def _answer(self, backend: Backend, question: _Question[T]) -> T:
        """Runs in a worker thread. Raises only what the question allows."""
        hook = question.hook
        try:
            implementation = self._implementation(backend)
            if question.absent is not None and hook not in implementation:
                return question.absent[0]
            arguments = {**question.arguments, "backend": backend.name}
            return question.check(self._plugins.call(hook, implementation, arguments))
        except _checks.Broken as problem:
            raise backend.bug(hook, str(problem)) from None
        except question.allowed:
            raise
        except BaseException as error:
            log.warning("Backend '%s' failed in %s", backend.name, hook, exc_info=True)
            culprit = self._plugins.blame(error, backend.name, backend.version)
            raise PluginBug(*culprit, hook, f"raised {in_words(error)}") from error

    def _implementation(self, backend: Backend) -> Implementation:
        """The object with the backend's hooks, made at first use."""
        with backend.lock:
            if backend.implementation is None:
                made = _made(backend)
                backend.implementation = self._plugins.admit_backend(made, backend.name, backend.version)
            return backend.implementation

    async def _problems(self, name: str) -> list[str]:
        try:
            return await self.check_config(name)
        except BackendError as error:
            return [str(error)]

    # -- listings ----------------------------------------------------------------------------------------------------

    def _wanted(self) -> list[str]:
        """The backends that are meant to be used, whether they can be or not, in alphabetical order."""
        return sorted(name for name, backend in self._backends.items() if backend.state != "not_configured")

    def _unloaded(self) -> list[Listing]:
        """One that says why, for each package that could not be loaded."""
        found = failed(self._plugins.found.values(), self._backends)
        return [Listing(one.name, OfferIndex(), InvalidRequestError(one.reason or "")) for one in found]

    async def _listing(self, name: str, requirements: Requirements, timeout: float) -> Listing:
        try:
            backend = self._new_work(name)
        except BackendError as error:
            return Listing(name, OfferIndex(), error)
        existing, ttl = backend.info.existing_machines, backend.info.offers_ttl
        key = (backend, requirements.for_existing_machine() if existing else requirements)
        offers = self._listings.younger_than(key, ttl)
        if offers is not None:
            return Listing(name, offers, existing=existing)
        fetch = partial(self._fetch, key)
        task = self._listings.shared(key, fetch) if ttl > 0 else self._listings.unshared(fetch)
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            late = backend.bug("dstack_list_offers", f"did not answer within {timeout:g} s")
            return self._stand_in(key, late, late=True)
        fetched = task.result()
        if isinstance(fetched, BackendError):
            return self._stand_in(key, fetched, late=False)
        return Listing(name, fetched, existing=existing)

    def _stand_in(self, key: Key, error: BackendError, *, late: bool) -> Listing:
        """An older listing where that will do, else none and the reason."""
        name, existing = key[0].name, key[0].info.existing_machines
        older = self._listings.younger_than(key, OLDEST) if late or isinstance(error, RateLimitedError) else None
        if older is not None:
            return Listing(name, older, late=late, existing=existing)
        return Listing(name, OfferIndex(), error, late=late, existing=existing)

    async def _fetch(self, key: Key) -> Fetched:
        backend, requirements = key
        check = _checks.offers(backend.name)

        def index(result: object) -> OfferIndex:
            # In the worker thread as well: sorting a hundred thousand offers takes a while.
            return OfferIndex(check(result))

        try:
            offers = await self._ask(
                backend, _Question("dstack_list_offers", {"requirements": requirements}, index, _REFUSES)
            )
        except BackendError as error:
            return error
        if backend.info.offers_ttl > 0:
            self._listings.keep(key, offers)
        return offers

    # -- loading -----------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        with self._loading:
            importlib.invalidate_caches()
            self._plugins.load(self._entry_points(group=ENTRY_POINT_GROUP))
            try:
                entries = {entry.type: entry for entry in self._source()}
            except ConfigurationError as error:
                self._config_problem = error
                return
            self._config_problem = None
            self._replace(match(list(self._plugins.found.values()), entries))

    def _replace(self, fresh: dict[str, Backend]) -> None:
        """Puts the new table in place; backends that did not change keep their object."""
        for name, old in self._backends.items():
            fresh[name] = kept = succeed(old, fresh.get(name))
            if kept is not old and old.implementation is not None:
                self._plugins.remove(old.implementation)
        self._backends = fresh

    def _raise_config_problem(self) -> None:
        if self._config_problem is not None:
            raise ConfigurationError(str(self._config_problem))


def _made(backend: Backend) -> object:
    """What the factory makes of the configuration."""
    module, _, path = backend.info.factory.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for attribute in path.split("."):
            factory = getattr(factory, attribute)
        return factory(backend.config)
    except BackendError:
        raise
    except ConfigurationError as error:
        raise AuthenticationError(str(error)) from error
    except BaseException as error:
        log.warning("The factory of backend '%s' failed", backend.name, exc_info=True)
        raise backend.bug(backend.info.factory, f"raised {in_words(error)}") from error


def _too_late(backend: Backend, hook: str, timeout: float) -> BackendError:
    if hook in ("dstack_create_instance", "dstack_terminate_instance"):
        return UnknownOutcomeError(f"Backend '{backend.name}' did not return from {hook} within {timeout:g} s")
    return backend.bug(hook, f"did not return within {timeout:g} s")


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """Changes when a file is written, or a package is installed into a directory."""
    try:
        stat = Path(path or ".").stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
