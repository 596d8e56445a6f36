"""`~/.ssh/config` and dstack's own file beside it: kept, whole, and as it was afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dstack_core._client.ssh.config import Entry
from dstack_core._client.ssh.login import Login
from dstack_core.errors import ConfigurationError
from dstack_core.testing import wait_until
from tests.support.homes import ROOT

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBZHRQbd3DhjyUlC1L0aYHTGsdlBBZOUWnnJP1kL5UHy"
MINE = b"# mine\r\nHost *\n    ForwardAgent yes\n\nHost work\n  Port 23"


def login(name: str = "one", **more: object) -> Login:
    """A machine."""
    fields = {"alias": f"dstack-{name}", "host": "192.0.2.7", "port": 2222, "user": "root", "host_key": KEY}
    return Login(**{"name": name, "identity": "/keys/id", **fields, **more})  # type: ignore[arg-type]  # fields by name


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Where dstack's own files are; its name is not the simplest."""
    path = tmp_path / "a home" / "ssh"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """The user's own folder, which has a configuration."""
    path = tmp_path / "dot-ssh"
    path.mkdir(mode=0o700)
    (path / "config").write_bytes(MINE)
    (path / "config").chmod(0o640)
    return path


def attached(ours: Path, users: Path, name: str = "one", **more: object) -> Entry:
    """One attach."""
    entry = Entry(ours, users, login(name, **more))
    entry.publish()
    return entry


def understood(config: Path, host: str) -> dict[str, str]:
    """What OpenSSH reads there for a host."""
    done = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_openssh_understands_it(ours: Path, users: Path) -> None:
    """The user's settings hold as well, and none of them overrides whom the machine must be."""
    entry = attached(ours, users)
    (users / "config").write_bytes((users / "config").read_bytes().replace(b"yes", b"yes\n StrictHostKeyChecking no"))
    for host in ("one", "one.machine"):
        said = understood(users / "config", host)
        assert said["stricthostkeychecking"] == "true"
        assert said["hostkeyalias"] == "dstack-one"
        assert said["userknownhostsfile"] == str(ours / "known_hosts")
        assert said["identityfile"] == "/keys/id"
        assert said["user"] == "root"
        assert said["forwardagent"] == "yes"
    machine = understood(users / "config", "one.machine")
    assert (machine["hostname"], machine["port"]) == ("192.0.2.7", "2222")
    through = understood(users / "config", "one")["proxycommand"]
    assert through.startswith("ssh -F ")
    assert through.endswith("one.machine /usr/local/lib/dstack/inside sshd")
    assert understood(users / "config", "work")["port"] == "23"
    assert (ours / "known_hosts").read_text() == f"dstack-one {KEY}\n"
    entry.withdraw()


def test_all_is_as_it_was(ours: Path, users: Path) -> None:
    """One line comes at the top and goes again; content and mode stay, and nothing else is left there."""
    entry = attached(ours, users)
    first, rest = (users / "config").read_bytes().split(b"\n", 1)
    assert first == f'Include "{ours / "config"}"'.encode()
    assert rest == MINE
    assert (users / "config").stat().st_mode & 0o777 == 0o640
    entry.withdraw()
    entry.withdraw()
    assert (users / "config").read_bytes() == MINE
    assert (users / "config").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in users.iterdir()] == ["config"]
    assert [path.name for path in ours.rglob("*")] == ["attached"]


@pytest.mark.parametrize("before", [b"", b"\n", b"Host a\n", b"\xff\xfe\n"])
def test_whatever_was_in_it(ours: Path, users: Path, before: bytes) -> None:
    """An empty file stays an empty file."""
    (users / "config").write_bytes(before)
    attached(ours, users).withdraw()
    assert (users / "config").read_bytes() == before


def test_where_nothing_was_nothing_is_left(ours: Path, tmp_path: Path) -> None:
    """Folder and file are made for this user alone, and removed."""
    entry = attached(ours, tmp_path / "none")
    assert (tmp_path / "none").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "none" / "config").stat().st_mode & 0o777 == 0o600
    entry.withdraw()
    assert not (tmp_path / "none").exists()


def test_what_others_wrote_meanwhile_stays(ours: Path, tmp_path: Path) -> None:
    """Only our line is taken away."""
    entry = attached(ours, tmp_path / "none")
    with (tmp_path / "none" / "config").open("ab") as file:
        file.write(b"Host new\n")
    entry.withdraw()
    assert (tmp_path / "none" / "config").read_bytes() == b"Host new\n"


def test_a_symbolic_link_stays_one(ours: Path, users: Path, tmp_path: Path) -> None:
    """The file it leads to is written, beside which a new one is made."""
    (tmp_path / "dotfiles").mkdir()
    (users / "config").rename(tmp_path / "dotfiles" / "ssh")
    (users / "config").symlink_to("../dotfiles/ssh")
    entry = attached(ours, users)
    assert (users / "config").is_symlink()
    assert (tmp_path / "dotfiles" / "ssh").read_bytes().endswith(MINE)
    assert understood(users / "config", "one")["hostkeyalias"] == "dstack-one"
    entry.withdraw()
    assert (users / "config").is_symlink()
    assert (tmp_path / "dotfiles" / "ssh").read_bytes() == MINE


def test_the_users_own_line_stays(ours: Path, users: Path) -> None:
    """Who put it there himself keeps it, and gets no second one."""
    before = f'include "{ours / "config"}"\n'.encode() + MINE
    (users / "config").write_bytes(before)
    entry = attached(ours, users)
    assert (users / "config").read_bytes() == before
    entry.withdraw()
    assert (users / "config").read_bytes() == before


def test_a_line_in_a_section_does_not_count(ours: Path, users: Path) -> None:
    """There it would hold for that section alone."""
    before = f'Host work\n  Include "{ours / "config"}"\n'.encode()
    (users / "config").write_bytes(before)
    entry = attached(ours, users)
    assert understood(users / "config", "one")["hostkeyalias"] == "dstack-one"
    entry.withdraw()
    assert (users / "config").read_bytes() == before


def test_several_runs(ours: Path, users: Path) -> None:
    """Each has its entries until its own end, and the line stays until the last one's."""
    one, two = attached(ours, users), attached(ours, users, "two", host="192.0.2.8")
    assert understood(users / "config", "one.machine")["hostname"] == "192.0.2.7"
    assert understood(users / "config", "two.machine")["hostname"] == "192.0.2.8"
    one.withdraw()
    assert understood(users / "config", "one.machine")["hostname"] == "one.machine"
    assert understood(users / "config", "two.machine")["hostname"] == "192.0.2.8"
    two.withdraw()
    assert (users / "config").read_bytes() == MINE


def test_several_attaches_to_one_run(ours: Path, users: Path) -> None:
    """The latest wins, and when it goes, the one before it is there again."""
    first, second = attached(ours, users), attached(ours, users, identity="/keys/other")
    assert understood(users / "config", "one")["identityfile"] == "/keys/other"
    assert (ours / "config").read_text().count("Host one\n") == 1
    second.withdraw()
    assert understood(users / "config", "one")["identityfile"] == "/keys/id"
    first.withdraw()
    assert (users / "config").read_bytes() == MINE


_ATTACH = """
import sys
from pathlib import Path
from dstack_core._client.ssh.config import Entry
from dstack_core._client.ssh.login import Login
ours, users, name, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for _ in range(rounds):
    entry = Entry(ours, users, Login(name, name, "192.0.2.9", 22, "root", "ssh-ed25519 AAAA", "/keys/id"))
    entry.publish()
    if rounds > 1:
        entry.withdraw()
print("done", flush=True)
sys.stdin.read()
"""


def _other(ours: Path, users: Path, name: str, rounds: int = 1) -> subprocess.Popen[bytes]:
    """Another program that attaches."""
    return subprocess.Popen(
        [sys.executable, "-c", _ATTACH, str(ours), str(users), name, str(rounds)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_what_a_killed_program_left_goes_with_the_next(ours: Path, users: Path) -> None:
    """Its entry is gone as soon as another one comes or goes, and with the last one all is as it was."""
    with _other(ours, users, "dead") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"done\n"
        assert b"Host dead\n" in (ours / "config").read_bytes()
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    entry = attached(ours, users)
    assert b"Host dead\n" not in (ours / "config").read_bytes()
    entry.withdraw()
    assert (users / "config").read_bytes() == MINE
    assert [path.name for path in ours.rglob("*")] == ["attached"]


def test_many_programs_and_threads_at_once(ours: Path, users: Path) -> None:
    """None sees or leaves half of anything, whoever comes and goes."""
    others = [_other(ours, users, f"run-{number}", 20) for number in range(3)]
    kept = attached(ours, users, "kept")

    def come_and_go() -> None:
        for _ in range(10):
            attached(ours, users, "mine").withdraw()

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert (users / "config").read_bytes().endswith(b"\n" + MINE)
        assert b"Host kept\n" in (ours / "config").read_bytes()
    for thread in threads:
        thread.join()
    for other in others:
        assert other.communicate(timeout=60)[0] == b"done\n"
    assert (ours / "config").read_text().count("Host ") == 2
    kept.withdraw()
    assert (users / "config").read_bytes() == MINE


def test_a_folder_that_cannot_be_written_is_left_alone(ours: Path, tmp_path: Path) -> None:
    """It is said, and what was there is as it was."""
    (tmp_path / "file").write_text("no folder")
    entry = Entry(ours, tmp_path / "file", login())
    with pytest.raises(OSError, match="file"):
        entry.publish()
    entry.withdraw()
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("path", ['a"b', "a$HOME", "a*", "a\nb", "100%"])
def test_a_path_that_cannot_be_written_there(ours: Path, users: Path, path: str) -> None:
    """The error says which, and nothing is changed."""
    entry = Entry(ours, users, login(identity=f"/{path}"))
    with pytest.raises(ConfigurationError, match="DSTACK_HOME"):
        entry.publish()
    entry.withdraw()
    assert (users / "config").read_bytes() == MINE


def test_the_folder_of_an_attach_is_gone_with_it(ours: Path, users: Path) -> None:
    """Whatever was put there."""
    entry = attached(ours, users)
    (entry.folder / "80").write_text("")
    entry.withdraw()
    wait_until(lambda: not entry.folder.exists())
