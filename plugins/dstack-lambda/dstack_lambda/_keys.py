"""The one SSH key that a launch wants: a configured one, or one for the key of this server."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from dstack_core.plugin import InvalidRequestError, UnknownOutcomeError
from dstack_lambda._api import Api


class Keys:
    """Names of SSH keys in the account. Safe to use from several threads.

    Args:
        api: the account.
        configured: the name to use, if one is configured.
    """

    def __init__(self, api: Api, configured: str | None) -> None:
        self._api = api
        self._configured = configured
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}

    def name_of(self, public_keys: tuple[str, ...]) -> str:
        """The name for a launch. A key that is not in the account yet is added to it, once.

        The machine gets all keys by its user-data; this one is there because Lambda wants one.

        Raises:
            InvalidRequestError: there is no key to add.
            BackendError: the account cannot be read or changed.
        """
        if self._configured is not None:
            return self._configured
        if not public_keys:
            raise InvalidRequestError("Lambda wants an SSH key for each launch: set `ssh_key` to the name of one")
        wanted = _essence(public_keys[0])
        with self._lock:
            if wanted not in self._names:
                self._names[wanted] = self._found(wanted) or self._added(wanted)
            return self._names[wanted]

    def forget(self) -> None:
        """Perhaps somebody removed a key that we remember."""
        with self._lock:
            self._names.clear()

    def _found(self, wanted: str) -> str | None:
        """The name under which the account has a key already, whoever added it."""
        return next((str(key["name"]) for key in self._api.ssh_keys() if _is(key, wanted)), None)

    def _added(self, wanted: str) -> str:
        name = key_name(wanted)
        try:
            self._api.add_ssh_key(name, wanted)
        except (UnknownOutcomeError, InvalidRequestError):
            # It may be there all the same, by us or by another process: the name says which key it is.
            if self._found(wanted) is None:
                raise
        return name


def key_name(public_key: str) -> str:
    """The name for a public key: the same from every process, another one for every key."""
    return f"dstack-{hashlib.sha256(_essence(public_key).encode()).hexdigest()[:24]}"


def _is(key: dict[str, Any], wanted: str) -> bool:
    return _essence(str(key.get("public_key", ""))) == wanted


def _essence(public_key: str) -> str:
    """Kind and key, without the comment."""
    return " ".join(public_key.split()[:2])
