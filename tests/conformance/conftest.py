"""The reference backend for Nimbus is installed for these tests, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest

NIMBUS = Path(__file__).parents[1] / "support" / "nimbus"


@pytest.fixture(autouse=True)
def _nimbus_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NIMBUS)
