"""Offers of all regions: from memory, from a file, or from Azure; what is old is shown while it is read anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from dstack_azure._account import Account
from dstack_azure._config import AzureConfig, ClientSecret
from dstack_azure._market import Mood, Shelf, mood_from, read_mood, read_shelf, shelf_from, to_json
from dstack_azure._offers import offers_of
from dstack_core.plugin import Offer, Requirements

FORMAT = 1
"""Of the files. Those of another one are read anew."""

SHELF_AGE, MOOD_AGE = timedelta(hours=6), timedelta(minutes=10)
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
    """One of the two parts: how it is called, how old it may be, how it is read, and from a file."""

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
        config: AzureConfig,
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
        self._shelf = _Kind[Shelf]("shelf", SHELF_AGE, lambda region: read_shelf(account, config, region), shelf_from)
        self._mood = _Kind[Mood]("mood", MOOD_AGE, lambda region: read_mood(account, region), mood_from)

    def offers(self, requirements: Requirements, regions: Iterable[str]) -> list[Offer]:
        """What is sold in these regions.

        Raises:
            BackendError: a region that nothing is known of cannot be read.
        """
        wanted = [region for region in regions if not requirements.regions or region in requirements.regions]
        parts = self._parts([(kind, region) for region in wanted for kind in (self._shelf, self._mood)])
        return [
            offer
            for region in wanted
            for offer in offers_of(
                region,
                parts[self._shelf.name, region],
                parts[self._mood.name, region],
                requirements,
                public=self._config.public_ips,
            )
        ]

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
                    target=self._read, args=(kind, region, future), name=f"dstack-azure-{region}", daemon=True
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
    """`cache/azure` of dstack's home folder."""
    home = os.environ.get("DSTACK_HOME")
    return (Path(home) if home else Path.home() / ".dstack") / "cache" / "azure"


def _account_key(config: AzureConfig) -> str:
    """A name for whose quotas these are, and where they were read. Holds no secret."""
    who = config.creds.client_id if isinstance(config.creds, ClientSecret) else "default"
    where = f"{config.base_url} {config.prices_url}"
    return hashlib.sha256(f"{who} {config.subscription_id} {where}".encode()).hexdigest()[:16]
