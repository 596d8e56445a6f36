"""Secrets at rest: encrypted with a key that is made once, and that lies apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from dstack_core._store.vault import VARIABLE, Vault
from dstack_core.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has no key."""
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_secret_comes_back(tmp_path: Path) -> None:
    """The key is made on first use, for this user alone, and serves the next process, too."""
    path = tmp_path / "secret.key"
    sealed = Vault(path).encrypt("hush ü")
    assert "hush" not in sealed
    assert path.stat().st_mode & 0o777 == 0o600
    assert Vault(path).decrypt(sealed, "It") == "hush ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret.key"]


def test_the_key_of_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a variable there is no file; what the file's key encrypted before can still be read."""
    path = tmp_path / "secret.key"
    old = Vault(path).encrypt("old")
    one, two = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    monkeypatch.setenv(VARIABLE, two)
    by_two = Vault(path).encrypt("by two")
    monkeypatch.setenv(VARIABLE, f"{one}, {two}")
    vault = Vault(path)
    assert [vault.decrypt(old, "It"), vault.decrypt(by_two, "It")] == ["old", "by two"]
    monkeypatch.setenv(VARIABLE, one)
    assert Vault(tmp_path / "none").encrypt("x")
    assert not (tmp_path / "none").exists()


def test_another_key(tmp_path: Path) -> None:
    """A key that does not fit: what it was for, where the key is, and what to do."""
    sealed = Vault(tmp_path / "one").encrypt("hush")
    with pytest.raises(ConfigurationError, match=r"What opens it cannot be decrypted: .*two\. Put the old key there"):
        Vault(tmp_path / "two").decrypt(sealed, "What opens it")


@pytest.mark.parametrize("nonsense", ["nonsense", "a" * 44, "ü"])
def test_what_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    """Says so, how to make one, and does not repeat it."""
    path = tmp_path / "secret.key"
    path.write_text(nonsense)
    monkeypatch.setenv(VARIABLE, nonsense)
    with pytest.raises(ConfigurationError, match=r"DSTACK_ENCRYPTION_KEY is no key.*Fernet\.generate_key") as refused:
        Vault(path).encrypt("x")
    assert nonsense not in str(refused.value)


def test_starting_a_server_does_not_load_the_library(tmp_path: Path) -> None:
    """It takes longer than much else, and most servers have no secret to keep."""
    code = "import sys, dstack_core._server.app; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
