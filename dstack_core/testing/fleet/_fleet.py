"""The fleet: where machines come from, and where they all end."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

from dstack_core.testing.fleet import _reaper
from dstack_core.testing.fleet._daemon import Daemon, FleetUnavailable, find_or_start
from dstack_core.testing.fleet._docker import EngineError
from dstack_core.testing.fleet._image import CAPABLE, image
from dstack_core.testing.fleet._machine import Machine, OnShutdown
from dstack_core.testing.fleet._network import Network

__all__ = ["Fleet"]

_SEED = "var/lib/cloud/seed/nocloud"
_SSH = 22


class Fleet:
    """Real machines on this computer: containers that boot with systemd, cloud-init and sshd. A context manager.

    Made by `Fleet.open` or `Fleet.open_or_skip`. All machines end with it, also if this process is killed. Safe to use
    from several threads.

    Attributes:
        LABEL: label of all containers that any fleet makes.
    """

    LABEL: ClassVar[str] = _reaper.LABEL

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._engine = daemon.engine
        self._id = uuid.uuid4().hex[:12]
        folder = Path(tempfile.gettempdir()) / f"dstack-fleet-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._lock_file = folder / self._id
        self._lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._labels = _reaper.labels(self._id, self._lock_file)
        self._network = Network(self._engine, self._labels, self._note_cut)
        self._reaper = self._start_reaper()
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._machines: list[Machine] = []

    @classmethod
    def open(cls) -> Self:
        """A fleet without machines. Starts a container engine if none runs, and removes what killed processes left.

        Raises:
            FleetUnavailable: there can be no machines here; the message says what is missing.
        """
        daemon = find_or_start()
        try:
            _reaper.reap_others(daemon.engine)
            image(daemon.engine)
            return cls(daemon)
        except BaseException:
            _let_go(daemon.holder)
            raise

    @classmethod
    def open_or_skip(cls) -> Self:
        """The same for a fixture of pytest: where there can be no machines, the test is skipped with the reason.

        With `DSTACK_REQUIRE_MACHINES=1` in the environment it fails instead.
        """
        try:
            return cls.open()
        except FleetUnavailable as unavailable:
            _skip(str(unavailable))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def machines(self) -> list[Machine]:
        """All that are not terminated, oldest first."""
        with self._guard:
            return list(self._machines)

    def boot(
        self,
        user_data: str | bytes = b"",
        *,
        name: str = "",
        on_shutdown: OnShutdown = "terminate",
        container_engine: bool = False,
        meta_data: Mapping[str, Any] | None = None,
    ) -> Machine:
        """Orders a machine, and returns as soon as that is accepted. It boots by itself.

        Args:
            user_data: what cloud-init gets, as a backend passed it to its cloud.
            name: its instance id and host name: letters, digits, dots and hyphens; `machine-N` if not set.
            on_shutdown: what becomes of it when it powers itself off.
            container_engine: with Docker inside, which is started when it boots.
            meta_data: more of what cloud-init gets as meta-data (`public-keys`, for example).

        Raises:
            FleetUnavailable: there is no free address, or no image.
            ValueError: the fleet is closed.
        """
        name = name or f"machine-{next(self._numbers)}"
        known = {"instance-id": name, "local-hostname": name, **(meta_data or {})}
        content = user_data.encode() if isinstance(user_data, str) else user_data
        seed = {"user-data": content, "meta-data": json.dumps(known).encode()}
        container, address = self._create(name, image(self._engine, container_engine=container_engine))
        try:
            self._engine.put(container, {f"{_SEED}/{key}": (value, 0o600) for key, value in seed.items()})
            return self._begin(
                Machine(
                    self._engine,
                    container,
                    name,
                    address,
                    on_shutdown=on_shutdown,
                    network=self._network,
                    ended=self._forget,
                )
            )
        except BaseException:
            self._engine.remove(container)
            raise

    def close(self) -> None:
        """Terminates all machines. May be repeated."""
        machines = self.machines
        try:
            with ThreadPoolExecutor(max(1, len(machines))) as pool:
                list(pool.map(Machine.terminate, machines))
        finally:
            self._release()

    # ---------------------------------------------------------------------------------------------------------------

    def _begin(self, machine: Machine) -> Machine:
        """The machine is one of the fleet's, unless that was closed meanwhile."""
        with self._guard:
            if self._lock < 0:
                raise ValueError("This fleet is closed, so nothing can be booted")
            self._machines.append(machine)
        machine.begin()
        return machine

    def _release(self) -> None:
        """Lets the reaper look for what is left, and the engine end."""
        with self._guard:
            lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
            self._reaper.wait()
            _let_go(self._daemon.holder)

    def _create(self, name: str, image_name: str) -> tuple[str, str]:
        """A container with an address: its name says which, and nobody else can have a container of that name."""
        for address in _addresses():
            with contextlib.suppress(Conflict):
                return self._create_at(address, name, image_name), address
        raise FleetUnavailable(
            f"no address of 127.0.1.0/24 has a free port {_SSH}; a program that listens there on every address, like "
            "the sshd of this computer, has to be told which ones are its own (sshd_config: ListenAddress)"
        )

    def _create_at(self, address: str, name: str, image_name: str) -> str:
        spec = {
            "Image": image_name,
            "Cmd": ["/usr/lib/fleet/boot"],
            "Hostname": name[:63],
            "Env": ["container=docker", "TERM=dumb"],
            "Tty": True,
            "Labels": {**self._labels, _reaper.ADDRESS: address},
            "ExposedPorts": {f"{_SSH}/tcp": {}},
            "Volumes": {"/var/lib/docker": {}} if image_name.endswith("-engine") else {},
            "HostConfig": {
                **CAPABLE,
                "CgroupnsMode": "private",
                "Tmpfs": {"/run": "", "/run/lock": ""},
                "PortBindings": {f"{_SSH}/tcp": [{"HostIp": address, "HostPort": str(_SSH)}]},
            },
        }
        try:
            return self._engine.create(f"dstack-machine-{address}", spec)
        except EngineError as error:
            raise Conflict if error.status == 409 else error from error

    def _forget(self, machine: Machine) -> None:
        with self._guard:
            self._machines.remove(machine)

    def _note_cut(self, addresses: list[str]) -> None:
        """For the reaper: what is cut, should this process be killed now."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, " ".join(addresses).encode(), 0)

    def _start_reaper(self) -> subprocess.Popen[bytes]:
        holder = self._daemon.holder
        return subprocess.Popen(
            [sys.executable, "-m", _reaper.__name__, str(self._lock_file), self._id, self._engine.path],
            pass_fds=() if holder is None else (holder,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


class Conflict(Exception):
    """Somebody else has this address."""


def _addresses() -> Iterator[str]:
    """Those where nothing listens now, in an order in which one seldom comes upon those of others, or of late."""
    numbers = list(range(2, 255))
    random.shuffle(numbers)
    return (address for number in numbers if _is_free(address := f"127.0.1.{number}"))


def _is_free(address: str) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, _SSH)) != 0


def _skip(reason: str) -> NoReturn:
    import pytest

    if os.environ.get("DSTACK_REQUIRE_MACHINES"):
        pytest.fail(f"DSTACK_REQUIRE_MACHINES is set, and {reason}")
    pytest.skip(f"needs real machines: {reason}")


def _let_go(holder: int | None) -> None:
    if holder is not None:
        os.close(holder)
