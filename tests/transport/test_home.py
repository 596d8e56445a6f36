"""The home folder, and short addresses for sockets with long paths."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core import _home
from dstack_core._home import LONGEST_ADDRESS, ensure_home, home, socket_address
from dstack_core.errors import ConfigurationError


@pytest.fixture(autouse=True)
def links(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where short links go during the test: a short folder that is removed afterwards."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="d"))
    monkeypatch.setattr(_home, "_SHORT_ROOT", folder)
    yield folder
    shutil.rmtree(folder)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`$DSTACK_HOME`, else `~/.dstack`; always absolute, never created by asking."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DSTACK_HOME", raising=False)
    assert home() == tmp_path / ".dstack"
    monkeypatch.setenv("DSTACK_HOME", "~/elsewhere")
    assert home() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTACK_HOME", "here")
    assert home() == tmp_path / "here"
    assert list(tmp_path.iterdir()) == []


def test_ensure_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made for its owner alone, with all folders above it."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "a/b"))
    assert ensure_home() == tmp_path / "a/b"
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    assert ensure_home() == tmp_path / "a/b"


def test_a_home_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the path and the cure."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "file/home"))
    with pytest.raises(ConfigurationError, match=f"{tmp_path}/file/home.*DSTACK_HOME"):
        ensure_home()


def test_short_paths_are_their_own_address(tmp_path: Path) -> None:
    """Nothing is made for them."""
    path = Path("/run/x/agent.sock")
    assert socket_address(path) == str(path)


def test_long_paths_work(tmp_path: Path) -> None:
    """Bind and connect through the short address; it is the same for everyone, however the path is spelt."""
    place = tmp_path / ("long" * 40)
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    address = socket_address(place / "agent.sock")
    assert len(os.fsencode(address)) <= LONGEST_ADDRESS
    assert socket_address(place / ".." / place.name / "agent.sock") == address
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(address)
        server.listen()
        client.connect(socket_address(place / "agent.sock"))
    assert (place / "agent.sock").exists()


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """Said plainly."""
    with pytest.raises(ConfigurationError, match="too long"):
        socket_address(tmp_path / ("x" * 120))


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_link_folder_that_is_not_safe(links: Path, tmp_path: Path, kind: str) -> None:
    """Somebody else could have made it: refused, with the cure."""
    root = links / f"dstack-{os.getuid()}"
    if kind == "a link":
        root.symlink_to(tmp_path)
    else:
        root.mkdir()
        root.chmod(0o777)
    with pytest.raises(ConfigurationError, match="DSTACK_HOME"):
        socket_address(tmp_path / ("long" * 40) / "agent.sock")


def test_links_to_folders_that_are_gone(links: Path, tmp_path: Path) -> None:
    """Removed some time later, when another one is made."""
    first = Path(socket_address(tmp_path / ("old" * 40) / "agent.sock")).parent
    os.utime(first, (0, 0), follow_symlinks=False)
    second = Path(socket_address(tmp_path / ("new" * 40) / "agent.sock")).parent
    assert not first.is_symlink()
    assert second.is_symlink()
