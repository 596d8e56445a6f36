"""Secrets that are kept: encrypted, with a key that does not lie in the database.

The key is `$DSTACK_ENCRYPTION_KEY`, or else what `server/secret.key` holds, which is made when it is first needed.
Several keys, one a line or with commas between, are tried in turn; the first one encrypts what is new.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

VARIABLE = "DSTACK_ENCRYPTION_KEY"
_CURE = (
    'A new key is printed by: python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
)


class Vault:
    """Encrypts and decrypts. The library that does it is imported when there is something to do.

    Args:
        key_file: where the key is, if the environment has none.
    """

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._fernet: MultiFernet | None = None

    def encrypt(self, text: str) -> str:
        """The text, encrypted.

        Raises:
            ConfigurationError: the key cannot be used; says where it is and what to do.
        """
        return self._keys().encrypt(text.encode()).decode()

    def decrypt(self, text: str, what: str) -> str:
        """The text that was encrypted.

        Args:
            text: what `encrypt` returned.
            what: what it is, for the message.

        Raises:
            ConfigurationError: it was encrypted with another key; says what to do.
        """
        from cryptography.fernet import InvalidToken

        try:
            return self._keys().decrypt(text.encode()).decode()
        except InvalidToken:
            raise ConfigurationError(
                f"{what} cannot be decrypted: it was encrypted with another key than that of {self._place()}. "
                f"Put the old key there (after the new one, with a comma between), or store it anew."
            ) from None

    def _place(self) -> str:
        return VARIABLE if os.environ.get(VARIABLE) else str(self._key_file)

    def _keys(self) -> MultiFernet:
        if self._fernet is None:
            self._fernet = _fernet([*_words(os.environ.get(VARIABLE, "")), *self._kept()], self._place())
        return self._fernet

    def _kept(self) -> list[str]:
        """The keys of the file. One is made if there is none anywhere."""
        if not os.environ.get(VARIABLE) and not self._key_file.exists():
            _make(self._key_file)
        with suppress(FileNotFoundError):
            return _words(self._key_file.read_text())
        return []


def _words(text: str) -> list[str]:
    return re.split(r"[\s,]+", text.strip(" \n\t,")) if text.strip(" \n\t,") else []


def _fernet(keys: list[str], place: str) -> MultiFernet:
    from cryptography.fernet import Fernet, MultiFernet

    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError:
        # The key is not repeated.
        raise ConfigurationError(f"{place} is no key: it must be 32 bytes in URL-safe Base64. {_CURE}") from None


def _make(path: Path) -> None:
    """Writes a new key. Of two at once, one wins, and both use its key."""
    from cryptography.fernet import Fernet

    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(Fernet.generate_key() + b"\n")
        file.flush()
        os.fsync(descriptor)
    with suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()
