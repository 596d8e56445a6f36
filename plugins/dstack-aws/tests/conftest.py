"""Fixtures of this room: EC2 on this computer, and a home folder for what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ec2 import Ec2
from tests.support.homes import client, home
from tests.support.machines import fleet

__all__ = ["client", "ec2", "fleet", "home", "kept"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dozen long sequences, each with processes of its own that set the SDK up: minutes on a machine with load."""
    for item in items:
        if item.name == "test_any_sequence_of_calls" and "dstack-aws" in item.nodeid:
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this computer's own configuration is read, and nothing is kept."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "dstack"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in (
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def ec2() -> Iterator[Ec2]:
    """EC2, of which this test alone knows."""
    with Ec2() as cloud:
        yield cloud
