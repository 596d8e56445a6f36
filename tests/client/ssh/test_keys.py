"""The user's key for the machines of runs."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dstack.api import ConfigurationError
from dstack_core._client.ssh.keys import identity_file, public_key


def make(path: Path, passphrase: str = "") -> str:
    """A pair of the test's; its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "me", "-f", str(path)], check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip()


def test_it_is_made_when_it_is_first_needed(own_home: Path) -> None:
    """For this user alone, in the home folder, and once."""
    public = public_key()
    assert public is not None
    assert public.startswith("ssh-ed25519 AAAA")
    assert "\n" not in public
    assert public_key() == public
    path = own_home / "ssh" / "id_ed25519"
    assert identity_file(None) == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert (own_home.stat().st_mode | path.parent.stat().st_mode) & 0o777 == 0o700
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["id_ed25519", "id_ed25519.pub"]


def test_whoever_needs_it_first_makes_it_for_all(own_home: Path) -> None:
    """Many at once get the same one."""
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: public_key(), range(16)))) == 1
    assert (own_home / "ssh" / "id_ed25519").exists()


def test_a_lost_public_half_is_found_again(own_home: Path) -> None:
    """It follows from the private one."""
    public = public_key()
    assert public is not None
    (own_home / "ssh" / "id_ed25519.pub").unlink()
    assert (public_key() or "").split()[:2] == public.split()[:2]


def test_a_key_that_others_can_read_is_not_used(own_home: Path) -> None:
    """The error has the command that mends it."""
    public_key()
    path = own_home / "ssh" / "id_ed25519"
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        identity_file(None)


def test_a_key_of_the_users_own(own_home: Path, tmp_path: Path) -> None:
    """Nothing is made then."""
    public = make(tmp_path / "mine", "secret")
    assert public_key(tmp_path / "mine") == public
    assert identity_file(str(tmp_path / "mine")) == tmp_path / "mine"
    assert not own_home.exists()


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    """The error names it."""
    with pytest.raises(ConfigurationError, match="none"):
        public_key(tmp_path / "none")


def test_without_ssh_a_run_can_be_submitted_all_the_same(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on this computer needs no key; who attaches to a machine is told what to install."""
    monkeypatch.setenv("PATH", str(own_home))
    assert public_key() is None
    with pytest.raises(ConfigurationError, match="Install the OpenSSH client"):
        identity_file(None)
