"""Keys: what OpenSSH makes of them, and who else can."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dstack_core._transport.keys import key_pair, server_key
from dstack_core.errors import ConfigurationError


@pytest.mark.parametrize("seed", [bytes(32), bytes(range(32)), bytes([255]) * 32], ids=["zeros", "numbers", "ones"])
def test_openssh_reads_a_pair(tmp_path: Path, seed: bytes) -> None:
    """OpenSSH finds the same public key in the private one, and what is made of the same seed is the same text."""
    pair = key_pair(seed)
    assert key_pair(seed) == pair
    file = tmp_path / "key"
    file.write_text(pair.private)
    file.chmod(0o600)
    shown = subprocess.run(["ssh-keygen", "-y", "-f", str(file)], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == pair.public.split()
    assert pair.private not in repr(pair)


def test_the_servers_key_is_made_once_and_for_its_user(tmp_path: Path) -> None:
    """Who asks first makes it; whoever asks at the same time or later gets the same, and nobody else can read it."""
    path = tmp_path / "ssh" / "id_ed25519"
    with ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(lambda _: server_key(path), range(8)))
    assert len({pair.public for pair in pairs}) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["id_ed25519"]
    assert server_key(path) == pairs[0]


def test_a_key_of_ones_own(tmp_path: Path) -> None:
    """A key that OpenSSH made is used as it is."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
    assert server_key(path).public == path.with_suffix(".pub").read_text().strip()


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """The message says what to do."""
    path = tmp_path / "key"
    server_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        server_key(path)


def test_what_is_no_such_key_is_refused(tmp_path: Path) -> None:
    """Neither another kind, nor a passphrase, nor nonsense; the message names the file and the cure."""
    other, locked, torn = tmp_path / "rsa", tmp_path / "locked", tmp_path / "torn"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(other)], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    torn.write_text(key_pair(bytes(32)).private[:100])
    torn.chmod(0o600)
    for path in (other, locked, torn):
        with pytest.raises(ConfigurationError, match=f"{path} .*ssh-keygen -t ed25519"):
            server_key(path)
