"""Fixtures of this room: Lambda's cloud on this computer, and a home folder for what processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import client, home
from tests.support.lambda_cloud import LambdaCloud
from tests.support.machines import fleet

__all__ = ["client", "fleet", "home", "kept", "lambda_cloud"]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this computer's own configuration is read, and nothing is kept."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "dstack"))
    return tmp_path


@pytest.fixture
def lambda_cloud() -> Iterator[LambdaCloud]:
    """Lambda's cloud, of which this test alone knows; all that was said was as its document wants it."""
    with LambdaCloud() as cloud:
        yield cloud
    assert cloud.wrong == []
