"""Fixtures of this room: Google Cloud on this computer, and a home folder for what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gcp import Gcp
from tests.support.homes import client, home
from tests.support.machines import fleet

__all__ = ["client", "fleet", "gcp", "home", "kept"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dozen long sequences, each with processes of its own that set the SDK up: minutes on a machine with load."""
    for item in items:
        if item.name == "test_any_sequence_of_calls" and "dstack-gcp" in item.nodeid:
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this computer's own configuration is read, and nothing is kept."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "dstack"))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def gcp() -> Iterator[Gcp]:
    """Google Cloud, of which this test alone knows."""
    with Gcp() as cloud:
        yield cloud
