"""A home folder, a backend in it, and stand-ins for the programs it talks to."""

from __future__ import annotations

import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from dstack_local import LocalConfig
from dstack_local._backend import LocalBackend
from dstack_local._processes import processes_of

from dstack_core.plugin import InstanceRequest, Offer, Requirements
from dstack_core.testing import wait_until
from tests.support.local import AGENT, OWNER, Requests, gone


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that does not exist yet."""
    path = tmp_path / "home"
    monkeypatch.setenv("DSTACK_HOME", str(path))
    return path


@pytest.fixture
def backend(home: Path) -> Iterator[LocalBackend]:
    """A backend. Whatever it started is ended, and nothing may be left."""
    local = LocalBackend(LocalConfig())
    yield local
    names = []
    for instance in local.dstack_list_instances(OWNER):
        names.append(instance.ref.id)
        wait_until(partial(gone, local, instance), what=f"{instance.ref.id} to end")
    assert [name for name in names if processes_of(name)] == []


@pytest.fixture
def requests(backend: LocalBackend) -> Requests:
    """Makes requests for what is offered for some requirements; `does` is what the agent does before it waits."""
    numbers = itertools.count(1)

    def make(does: str = "", offer: Offer | None = None, **wanted: object) -> InstanceRequest:
        if offer is None:
            (offer,) = backend.dstack_list_offers(Requirements(**wanted))  # type: ignore[arg-type]  # as the test says
        return InstanceRequest(
            intent=uuid4(),
            owner=OWNER,
            name=f"t-{os.getpid()}-{next(numbers)}-{uuid4().hex[:8]}",
            token="0" * 64,
            request_id=uuid4(),
            offer=offer,
            tags={},
            agent_command=(sys.executable, "-I", "-S", "-c", AGENT, does),
        )

    return make


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script on the PATH, where only those and the shell's own tools are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cat", "sh", "sleep", "true"):
        found = next(Path(part, tool) for part in os.defpath.split(":") if Path(part or ".", tool).exists())
        (folder / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> Path:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return file

    return put
