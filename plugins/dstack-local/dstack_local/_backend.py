"""The hooks, over directories: `$DSTACK_HOME/local/<name>/` is an instance, and its agent's lock says that it lives."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from dstack_core.plugin import (
    Endpoint,
    Gpu,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    Requirements,
    StateReason,
    hookimpl,
)
from dstack_local import LocalConfig
from dstack_local._containers import Containers, remove_containers
from dstack_local._machine import look, nvidia_gpus
from dstack_local._processes import end, is_alive, processes_of, reap, start, was_started
from dstack_local._reservations import Reservation, ask, free, refusal, render

_PATIENCE = 4.0
_RECORDS_KNOWN = 2000
_GPUS_GOOD_FOR = 60.0
_START_LIMIT = 10.0
_KEPT_DEAD, _SWEEP_EVERY, _GRAVES_KEPT = 600.0, 60.0, 90 * 86400.0


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of one instance. `ending`: its end was asked for, and its record moved to `grave`."""

    name: str
    directory: Path
    file: Path
    grave: Path
    intent: UUID
    owner: UUID
    digest: str
    created_at: datetime
    reservation: Reservation
    ending: bool = False

    @classmethod
    def read(cls, name: str, directory: Path, grave: Path, values: dict[str, Any]) -> _Record:
        """From what `LocalBackend._new` wrote."""
        return cls(
            name=name,
            directory=directory,
            file=directory / "instance.json",
            grave=grave,
            intent=UUID(values["intent"]),
            owner=UUID(values["owner"]),
            digest=values["digest"],
            created_at=datetime.fromisoformat(values["created_at"]),
            reservation=Reservation.read(json.dumps(values["reservation"])),
        )

    @property
    def age(self) -> float:
        """Seconds since its creation."""
        return (datetime.now(UTC) - self.created_at).total_seconds()


class LocalBackend:
    """This computer."""

    def __init__(self, config: LocalConfig) -> None:  # noqa: ARG002  # the contract of a factory; there is nothing in it
        home = Path(os.environ.get("DSTACK_HOME") or "~/.dstack").expanduser().absolute()
        self._root = home / "local"
        self._graves = self._root / ".ended"
        self._containers = Containers()
        self._gpus: tuple[float, dict[str, Gpu]] = (0.0, {})
        self._gpu_lock = threading.Lock()
        self._sweep_again = 0.0
        self._known: dict[str, _Record] = {}

    # --------------------------------------------------------------------------------------------------------- hooks --

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """One offer: what is asked of this computer, or the whole of it when that is too much."""
        self._ensure_root()
        machine = look(self._root, self._known_gpus())
        problem = self._containers.problem() if requirements.container else None
        return [render(ask(requirements, machine), requirements, machine, self._reserved(), problem)]

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """Makes the directory, then starts the agent in it; whatever of this is done already is not done again."""
        self._ensure_root()
        with self._locked():
            record = self._record(request.name) or self._new(request)
            if record.digest != _digest(request):
                raise InvalidRequestError(f"Instance '{request.name}' exists, for another request of the same intent.")
            if not record.ending and not was_started(record.directory):
                self._start(request, record)
        return self._described(record)

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Reads the directory, the lock and the process list."""
        record = self._record(ref.id)
        return self._described(record) if record else None

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All instances that still have a directory."""
        return [self._described(record) for record in self._records() if record.owner == owner]

    @hookimpl
    def dstack_list_all_instances(self) -> list[Instance]:
        """Those of this home, which may have had another database before."""
        return [self._described(record) for record in self._records()]

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Writes the end down, so that no replay starts it again; then ends processes, containers and directory."""
        with self._locked():
            record = self._record(ref.id)
            if record is None:
                return
            self._bury(record)
        self._clean(record)

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Whether jobs with an image can run here."""
        problem = self._containers.problem()
        return [problem] if problem else []

    # ----------------------------------------------------------------------------------------------------- creating --

    def _new(self, request: InstanceRequest) -> _Record:
        """Reserves and writes the instance down; `NoCapacityError` if it does not fit."""
        self._sweep()
        wanted = Reservation.read(request.offer.data)
        machine = look(self._root, self._known_gpus())
        left = free(machine, self._reserved())
        lacking = refusal(wanted, left)
        if lacking:
            raise NoCapacityError(f"This computer has not enough left: {lacking}.", scope="region")
        values = {
            "intent": str(request.intent),
            "owner": str(request.owner),
            "digest": _digest(request),
            "created_at": datetime.now(UTC).isoformat(),
            "reservation": wanted.assigned(left).as_json(),
        }
        directory = self._root / request.name
        directory.mkdir(mode=0o700, exist_ok=True)
        _write(directory / "instance.json", json.dumps(values))
        return _Record.read(request.name, directory, self._graves / f"{request.name}.json", values)

    def _start(self, request: InstanceRequest, record: _Record) -> None:
        try:
            start(request.agent_command, record.directory, record.name, list(record.reservation.gpu_ids))
        except (OSError, ValueError, IndexError) as error:
            self._bury(record)
            self._clean(record)
            raise InvalidRequestError(f"The agent cannot be started: {error}") from error

    # ------------------------------------------------------------------------------------------------------- ending --

    def _bury(self, record: _Record) -> None:
        """Keeps the record of an ended instance, so that a replay of its request never starts a second one."""
        self._graves.mkdir(mode=0o700, exist_ok=True)
        if not record.grave.exists():
            _write(record.grave, record.file.read_text())

    def _clean(self, record: _Record) -> None:
        if not end(record.directory, record.name, _PATIENCE):
            return
        reap()
        if record.reservation.container and not remove_containers(f"dstack.instance={record.name}"):
            return
        # A container may have left files that this user cannot delete; they must not keep the instance from ending.
        with contextlib.suppress(FileNotFoundError):
            record.directory.rename(self._graves / record.name)
        shutil.rmtree(self._graves / record.name, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what agents left that ended by themselves, after a while in which a person may look at it."""
        if time.monotonic() < self._sweep_again:
            return
        self._sweep_again = time.monotonic() + _SWEEP_EVERY
        for record in list(self._records()):
            if record.age > _KEPT_DEAD and self._state(record)[0] is InstanceState.TERMINATED:
                self._bury(record)
                self._clean(record)
        unfinished = [path for path in self._root.glob("[a-z]*") if self._record(path.name) is None]
        for path in (*unfinished, *filter(Path.is_dir, self._graves.glob("*"))):
            shutil.rmtree(path, ignore_errors=True)
        for grave in self._graves.glob("*.json"):
            if time.time() - grave.stat().st_mtime > _GRAVES_KEPT:
                grave.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------ reading --

    def _record(self, name: str) -> _Record | None:
        if "/" in name or name.startswith("."):
            return None
        # What is written down never changes, so it is read once.
        known = self._known.get(name) or self._load(name)
        if known is None:
            return None
        if known.grave.exists():
            return replace(known, ending=True)
        return known if known.file.exists() else None

    def _load(self, name: str) -> _Record | None:
        directory, grave = self._root / name, self._graves / f"{name}.json"
        for file in (directory / "instance.json", grave):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                values = json.loads(file.read_text())
                if len(self._known) > _RECORDS_KNOWN:
                    self._known.clear()
                self._known[name] = record = _Record.read(name, directory, grave, values)
                return record
        return None

    def _records(self) -> Iterator[_Record]:
        with contextlib.suppress(FileNotFoundError):
            for directory in self._root.iterdir():
                record = self._record(directory.name)
                if record is not None:
                    yield record

    def _reserved(self) -> list[Reservation]:
        """What the instances hold that are not known to be over."""
        reap()
        holding = [record for record in self._records() if record.reservation.holds_something]
        return [one.reservation for one in holding if self._state(one)[0] is not InstanceState.TERMINATED]

    def _described(self, record: _Record) -> Instance:
        reap()
        state, reason = self._state(record)
        return Instance(
            ref=InstanceRef(backend="local", id=record.name, region="local"),
            intent=record.intent,
            owner=record.owner,
            state=state,
            reason=reason,
            created_at=record.created_at,
            endpoint=Endpoint(unix_socket=record.directory / "agent.sock"),
        )

    def _state(self, record: _Record) -> tuple[InstanceState, StateReason | None]:
        started = was_started(record.directory)
        if started and is_alive(record.directory):
            return (InstanceState.STOPPING, StateReason.REQUESTED) if record.ending else (InstanceState.RUNNING, None)
        if not started and not record.ending and (record.age < _START_LIMIT or processes_of(record.name)):
            return InstanceState.PENDING, None
        if record.ending:
            # The directory goes last.
            state = InstanceState.STOPPING if record.directory.exists() else InstanceState.TERMINATED
            return state, StateReason.REQUESTED
        return InstanceState.STOPPING if processes_of(record.name) else InstanceState.TERMINATED, StateReason.FAILURE

    def _known_gpus(self) -> dict[str, Gpu]:
        with self._gpu_lock:
            if time.monotonic() >= self._gpus[0]:
                self._gpus = (time.monotonic() + _GPUS_GOOD_FOR, nvidia_gpus())
            return self._gpus[1]

    def _ensure_root(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, whichever process makes it."""
        self._ensure_root()
        lock = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _digest(request: InstanceRequest) -> str:
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    """Atomically: a reader finds all of it or nothing."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    fresh.replace(file)
