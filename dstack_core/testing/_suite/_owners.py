"""Owners that may have instances in a live account: written down before the first call, in case pytest is killed."""

from __future__ import annotations

import os
import time
from typing import Any
from uuid import UUID

import pytest

from dstack_core.testing._suite._rig import Rig, end_all

_PATIENCE = 600.0


class Owners:
    """The list in pytest's cache; each worker of pytest-xdist has its own.

    Args:
        config: pytest's; without its cache nothing is noted.
        backend: whose.
    """

    def __init__(self, config: pytest.Config, backend: str) -> None:
        self._cache: Any = getattr(config, "cache", None)
        self._key = f"dstack/{backend}/{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"

    def noted(self) -> list[str]:
        """Those that were not confirmed to have nothing any more."""
        return list(self._cache.get(self._key, [])) if self._cache is not None else []

    def note(self, rig: Rig) -> None:
        """Ends what a killed run left, then writes this case's owner down."""
        for owner in self.noted():
            end_all(rig.backend, UUID(owner), [], time.monotonic() + _PATIENCE)
        self._write([str(rig.owner)])

    def forget(self) -> None:
        """All is confirmed gone."""
        self._write([])

    def _write(self, owners: list[str]) -> None:
        if self._cache is not None:
            self._cache.set(self._key, owners)
