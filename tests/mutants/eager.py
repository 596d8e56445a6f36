"""Packages that do at their import what they must not: load an SDK, and ask the network."""

from __future__ import annotations

import contextlib
import socket

import httpx

from dstack_core.plugin import BackendInfo, hookimpl
from tests.mutants.plugins import info

assert httpx.__name__ == "httpx"

with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 9), timeout=1).close()


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """The backend itself is the reference backend."""
    return [info("Reference")]
