"""The connection by the command `ssh`, to a real SSH server of this computer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dstack.api import AttachError
from dstack_core._client.ssh.login import Login
from dstack_core._client.ssh.tunnel import Tunnel
from dstack_core.testing import wait_until
from tests.support.git_hosts import SshServer, ssh_server

__all__ = ["ssh_server"]
pytestmark = pytest.mark.root


@pytest.fixture
def login(ssh_server: SshServer, tmp_path: Path) -> Login:
    """That server, as it is known."""
    folder = tmp_path / "sshd"
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    return Login("one", "dstack-one", "127.0.0.1", ssh_server.port, "root", host_key, str(folder / "key"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the sockets; its name means something in an option of ssh, and is too long for an address."""
    path = tmp_path / "a:b" / ("c" * 100)
    path.mkdir(parents=True)
    return path


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that says hello."""
    with subprocess.Popen(
        ["python3", "-c", _HELLO], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.kill()


_HELLO = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(b"hello")
        connection.close()
"""


def said(place: str) -> bytes:
    """What is heard at a socket, to its end."""
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(place)
        return there.makefile("rb").read()


def children() -> list[int]:
    """The processes of `ssh` that this one started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            stat = (entry / "stat").read_text()
            if "(ssh)" in stat and int(stat.rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def test_a_socket_leads_to_a_port(login: Login, folder: Path, echo: int) -> None:
    """As soon as it is made, and any number of times; nothing is left when it is closed."""
    broken: list[str] = []
    tunnel = Tunnel(login, {80: echo}, folder, broken.append)
    assert [said(tunnel.place(80)) for _ in range(3)] == [b"hello"] * 3
    tunnel.close()
    tunnel.close()
    assert children() == []
    assert broken == []


def test_a_port_at_which_nobody_listens(login: Login, folder: Path, echo: int) -> None:
    """A connection to it just ends, and all else goes on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = int(free.getsockname()[1])
    tunnel = Tunnel(login, {80: nobody, 81: echo}, folder, lambda _: None)
    assert said(tunnel.place(80)) == b""
    assert said(tunnel.place(81)) == b"hello"
    tunnel.close()


def test_a_break_is_told(login: Login, folder: Path, echo: int) -> None:
    """Once, with where and why."""
    broken: list[str] = []
    tunnel = Tunnel(login, {80: echo}, folder, broken.append)
    (ssh,) = children()
    os.kill(ssh, signal.SIGKILL)
    wait_until(lambda: broken, what="the news")
    tunnel.close()
    assert len(broken) == 1
    assert broken[0].startswith(f"The connection to root@127.0.0.1:{login.port} broke (")


def test_another_host_key(login: Login, folder: Path, tmp_path: Path) -> None:
    """It is not let pass, and nothing is left."""
    key = " ".join((tmp_path / "sshd" / "key.pub").read_text().split()[:2])
    other = Login("one", "dstack-one", "127.0.0.1", login.port, "root", key, login.identity)
    with pytest.raises(AttachError, match="host key is not the one that was pinned"):
        Tunnel(other, {}, folder, lambda _: None)
    assert children() == []


def test_a_key_that_is_not_let_in(login: Login, folder: Path, tmp_path: Path) -> None:
    """The error names it."""
    other = str(tmp_path / "sshd" / "other")
    with pytest.raises(AttachError, match=f"does not let in the key {other}"):
        Tunnel(Login("one", "a", "127.0.0.1", login.port, "root", login.host_key, other), {}, folder, lambda _: None)


def test_a_server_that_does_not_answer(login: Login, folder: Path) -> None:
    """The error has ssh's own words."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = int(nobody.getsockname()[1])
        gone = Login("one", "a", "127.0.0.1", port, "root", login.host_key, login.identity)
        with pytest.raises(AttachError, match=r"cannot be reached over SSH .*refused"):
            Tunnel(gone, {}, folder, lambda _: None)


def test_without_ssh(login: Login, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(AttachError, match="Install the OpenSSH client"):
        Tunnel(login, {}, folder, lambda _: None)
