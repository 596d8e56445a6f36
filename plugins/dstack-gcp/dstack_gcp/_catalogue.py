"""Offers of all regions: from memory, from a file, or from Google; what is old is shown while it is read anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from dstack_core.plugin import Offer, Requirements
from dstack_gcp._account import Account
from dstack_gcp._config import GcpConfig
from dstack_gcp._market import (
    ALL,
    Mood,
    Shelf,
    mood_from,
    prices_from,
    read_mood,
    read_prices,
    read_shelf,
    shelf_from,
    to_json,
)
from dstack_gcp._offers import Table, offers_of, table_of
from dstack_gcp._prices import Prices

FORMAT = 1
"""Of the files. Those of another one are read anew."""

SHELF_AGE, MOOD_AGE = timedelta(hours=24), timedelta(minutes=10)
"""What is older is read anew, in the background."""

OLDEST = timedelta(days=7)
"""What is older than this is not shown any more: whoever asks waits for the new one."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Dated(Generic[T]):
    at: datetime
    part: T


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """One of the three parts: how it is called, how old it may be, how it is read, and from a file."""

    name: str
    age: timedelta
    read: Callable[[str], T]
    parse: Callable[[dict[str, Any]], T]


class Catalogue:
    """The offers of one account. Safe to use from several threads.

    Args:
        account: whom to ask.
        config: which regions, whose account.
        folder: where the files are; shared by all processes of this user.
        clock: now, as an aware datetime.
    """

    def __init__(
        self,
        account: Account,
        config: GcpConfig,
        folder: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._account = account
        self._config = config
        self._folder = folder / _account_key(config)
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], _Dated[Any]] = {}
        self._reading: dict[tuple[str, str], Future[_Dated[Any]]] = {}
        self._tables: dict[str, tuple[Shelf, Prices, tuple[Table, Table]]] = {}
        self._prices = _Kind[Prices]("prices", SHELF_AGE, lambda _: read_prices(account), prices_from)
        self._mood = _Kind[Mood]("mood", MOOD_AGE, lambda _: read_mood(account), mood_from)
        self._shelf = _Kind[Shelf]("shelf", SHELF_AGE, self._read_shelf, shelf_from)

    def offers(self, requirements: Requirements) -> list[Offer]:
        """What is sold in the configured regions.

        Raises:
            BackendError: a region that nothing is known of, or the price list, cannot be read.
        """
        common = self._parts([(self._mood, ALL), (self._prices, ALL)])
        mood, prices = common[self._mood.name, ALL], common[self._prices.name, ALL]
        wanted = self._wanted(requirements, mood)
        shelves = self._parts([(self._shelf, region) for region in wanted])
        return [
            offer
            for region in wanted
            for offer in self._of_region(region, shelves[self._shelf.name, region], prices, mood, requirements)
        ]

    def regions(self) -> Mood:
        """The regions of the project, their zones and quotas."""
        mood: Mood = self._parts([(self._mood, ALL)])[self._mood.name, ALL]
        return mood

    def _wanted(self, requirements: Requirements, mood: Mood) -> list[str]:
        """Of the configured regions, those that are there and asked for."""
        configured = [region for region in self._config.regions or sorted(mood.zones) if region in mood.zones]
        return [region for region in configured if not requirements.regions or region in requirements.regions]

    def _of_region(
        self, region: str, shelf: Shelf, prices: Prices, mood: Mood, requirements: Requirements
    ) -> Iterator[Offer]:
        """Offers, whose prices are added up once for each price list."""
        known = self._tables.get(region)
        if known is None or known[0] is not shelf or known[1] is not prices:
            tables = (table_of(region, shelf, prices, spot=False), table_of(region, shelf, prices, spot=True))
            known = self._tables[region] = (shelf, prices, tables)
        return offers_of(region, shelf, known[2], prices, mood, requirements, self._config.public_ips)

    def _read_shelf(self, region: str) -> Shelf:
        return read_shelf(self._account, self.regions().zones.get(region, ()))

    def wait(self) -> None:
        """Until nothing is being read any more."""
        while True:
            with self._lock:
                reading = list(self._reading.values())
            if not reading:
                return
            for one in reading:
                one.exception()

    def _parts(self, wanted: list[tuple[_Kind[Any], str]]) -> dict[tuple[str, str], Any]:
        """Each part, from wherever it can be had at once; otherwise all that are missing are read side by side."""
        found: dict[tuple[str, str], Any] = {}
        missing: list[tuple[tuple[str, str], Future[_Dated[Any]]]] = []
        for kind, region in wanted:
            key = (kind.name, region)
            known = self._at_hand(kind, region)
            age = self._clock() - known.at if known else OLDEST
            if known is not None and age < OLDEST:
                found[key] = known.part
            if known is None or age >= kind.age:
                future = self._begin(kind, region)
                if key not in found:
                    missing.append((key, future))
        for key, future in missing:
            found[key] = future.result().part
        return found

    def _at_hand(self, kind: _Kind[T], region: str) -> _Dated[T] | None:
        key = (kind.name, region)
        if key not in self._known:
            stored = self._from_file(kind, region)
            if stored is not None:
                self._known.setdefault(key, stored)
        return self._known.get(key)

    def _begin(self, kind: _Kind[T], region: str) -> Future[_Dated[T]]:
        """Reads a part in the background, unless that is under way."""
        key = (kind.name, region)
        with self._lock:
            if key not in self._reading:
                future: Future[_Dated[T]] = Future()
                self._reading[key] = future
                # A daemon: nobody's exit waits for a price list.
                threading.Thread(
                    target=self._read, args=(kind, region, future), name=f"dstack-gcp-{region}", daemon=True
                ).start()
            return self._reading[key]

    def _read(self, kind: _Kind[T], region: str, future: Future[_Dated[T]]) -> None:
        key = (kind.name, region)
        try:
            dated = _Dated(self._clock(), kind.read(region))
        except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
            self._done(key)
            future.set_exception(error)
            return
        self._known[key] = dated
        self._to_file(kind, region, dated)
        self._done(key)
        future.set_result(dated)

    def _done(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._reading.pop(key, None)

    # -- files -------------------------------------------------------------------------------------------------------

    def _path(self, kind: _Kind[Any], region: str) -> Path:
        return self._folder / f"{region}.{kind.name}.json"

    def _from_file(self, kind: _Kind[T], region: str) -> _Dated[T] | None:
        """What another process read. A file that is broken or of another format is as good as none."""
        try:
            values = json.loads(self._path(kind, region).read_bytes())
            if values["format"] != FORMAT:
                return None
            return _Dated(datetime.fromisoformat(values["at"]), kind.parse(values["part"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _to_file(self, kind: _Kind[T], region: str, dated: _Dated[Any]) -> None:
        """Whole or not at all. Without room or permission it works all the same, only slower the next time."""
        values = {"format": FORMAT, "at": dated.at.isoformat(), "part": to_json(dated.part)}
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(values, file)
                Path(name).replace(self._path(kind, region))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def cache_folder() -> Path:
    """`cache/gcp` of dstack's home folder."""
    home = os.environ.get("DSTACK_HOME")
    return (Path(home) if home else Path.home() / ".dstack") / "cache" / "gcp"


def _account_key(config: GcpConfig) -> str:
    """A name for whose quotas these are, and where they were read. Holds no secret."""
    return hashlib.sha256(f"{config.project} {config.endpoint_url or ''}".encode()).hexdigest()[:16]
