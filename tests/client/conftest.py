"""A server that does what a test says, and the real one in a home folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack.api.server import APIClient
from tests.client.scripted import TOKEN, ScriptedServer
from tests.support.homes import client, home

__all__ = ["api", "client", "home", "own_home", "server"]


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user who has nothing yet: a key that a submit makes is not for the one who runs the tests."""
    path = tmp_path / "user"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    return path


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server on TCP."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def api(server: ScriptedServer) -> Iterator[APIClient]:
    """A low-level client of `server`."""
    api = APIClient(server.url, TOKEN)
    yield api
    api.close()


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder for this process, in which no server may be started."""
    path = tmp_path / "home"
    monkeypatch.setenv("DSTACK_HOME", str(path))
    return path
