"""Fixtures that all rooms share. They are documented where they are defined."""

from __future__ import annotations

import os

import pytest

from tests.support.homes import client, home
from tests.support.postgres import blank_store_url, postgres_server, postgres_url, store, store_url

__all__ = [
    "anyio_backend",
    "blank_store_url",
    "client",
    "home",
    "postgres_server",
    "postgres_url",
    "store",
    "store_url",
]


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the server does."""
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs a machine may have to wait until its image is built."""
    for item in items:
        if item.get_closest_marker("machines") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(590))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `root` skip with a reason for other users; with `DSTACK_REQUIRE_ROOT=1` they fail instead."""
    if item.get_closest_marker("root") is None or os.geteuid() == 0:
        return
    if os.environ.get("DSTACK_REQUIRE_ROOT") == "1":
        pytest.fail("needs root, and DSTACK_REQUIRE_ROOT=1 says that it must not be skipped", pytrace=False)
    pytest.skip("needs root")
