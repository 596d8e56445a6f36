"""Fixtures of this room: Azure on this computer, and a home folder for what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.azure import Azure
from tests.support.homes import client, home
from tests.support.machines import fleet

__all__ = ["azure", "client", "fleet", "home", "kept"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dozen long sequences, each with processes of its own that set the SDK up: minutes on a machine with load."""
    for item in items:
        if item.name == "test_any_sequence_of_calls" and "dstack-azure" in item.nodeid:
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this computer's own configuration is read, and nothing is kept."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "dstack"))
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path / "az"))
    for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_AUTHORITY_HOST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def azure() -> Iterator[Azure]:
    """Azure, of which this test alone knows."""
    with Azure() as cloud:
        yield cloud
