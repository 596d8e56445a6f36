"""Instances of the local backend: asked for, watched and ended; with a stand-in for the agent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from dstack_local._backend import LocalBackend

from dstack_core.plugin import Instance, InstanceRequest, InstanceState
from dstack_core.testing import wait_until

Requests = Callable[..., InstanceRequest]
"""Makes requests; see the fixture of that name."""

OWNER = UUID("00000000-0000-7000-8000-000000000002")

AGENT = """
import fcntl, json, os, signal, subprocess, sys
lock = os.open("agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(75)
try:
    os.close(os.open("agent.started", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
except FileExistsError:
    sys.exit(76)
with open("starts", "a") as starts:
    starts.write(str(os.getpid()) + chr(10))
exec(sys.argv[1])
with open("ready.new", "w") as ready:
    json.dump(dict(os.environ), ready)
os.rename("ready.new", "ready")
while True:
    signal.pause()
"""
"""Obeys the contract of the agent (lock, mark, its directory) and runs no job."""


def gone(backend: LocalBackend, instance: Instance) -> bool:
    """Terminates once more, and says whether the instance is gone."""
    backend.dstack_terminate_instance(instance.ref)
    return state(backend, instance) is InstanceState.TERMINATED


def state(backend: LocalBackend, instance: Instance) -> InstanceState:
    """What the backend says now."""
    known = backend.dstack_get_instance(instance.ref)
    assert known is not None
    return known.state


def ready(home: Path, instance: Instance) -> dict[str, str]:
    """Waits until the agent waits, and returns its environment."""
    file = home / "local" / instance.ref.id / "ready"
    wait_until(file.exists, what="the agent to be ready")
    return dict(json.loads(file.read_text()))
