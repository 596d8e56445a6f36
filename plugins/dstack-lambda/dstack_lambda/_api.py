"""Lambda's API: what this backend asks it, each question once, and in its turn.

It reads what it needs and passes over what it does not know: states and fields come into being without notice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from dstack_core.plugin import RateLimitedError, UnknownOutcomeError
from dstack_lambda._config import LambdaConfig
from dstack_lambda._errors import Refusal, translated
from dstack_lambda._gate import Gate

T = TypeVar("T")

_CONNECT_TIMEOUT, _READ_TIMEOUT, _LAUNCH_TIMEOUT = 5, 10, 25
"""Seconds. With the waiting for turns they are shorter than `hook_timeout`."""


class Api:
    """One account. Safe to use from several threads.

    Args:
        config: where it is, and the key.
        gate: whose turn it is; the one of this user and account if not set.
    """

    def __init__(self, config: LambdaConfig, gate: Gate | None = None) -> None:
        self._gate = gate or Gate(account_folder(config), config.request_interval, config.launch_interval)
        headers = {"Authorization": f"Bearer {config.api_key.get_secret_value()}"}
        self._http = httpx.Client(base_url=config.url, headers=headers, follow_redirects=False)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    # -- questions ---------------------------------------------------------------------------------------------------

    def instance_types(self) -> dict[str, Any]:
        """What is sold, and where it is to be had now."""
        return _of(dict, self._call("GET", "/api/v1/instance-types"))

    def instances(self) -> list[dict[str, Any]]:
        """All instances of the account: it has no pages."""
        return _of(list, self._call("GET", "/api/v1/instances"))

    def instance(self, id: str) -> dict[str, Any] | None:
        """One instance; `None` if it is unknown."""
        found = self._call("GET", f"/api/v1/instances/{quote(id, safe='')}", unknown_ok=True)
        return None if found is None else _of(dict, found)

    def images(self) -> list[dict[str, Any]]:
        """The images of all regions."""
        return _of(list, self._call("GET", "/api/v1/images"))

    def ssh_keys(self) -> list[dict[str, Any]]:
        """The SSH keys of the account."""
        return _of(list, self._call("GET", "/api/v1/ssh-keys"))

    # -- changes -----------------------------------------------------------------------------------------------------

    def add_ssh_key(self, name: str, public_key: str) -> None:
        """Adds a public key under a name."""
        self._call("POST", "/api/v1/ssh-keys", {"name": name, "public_key": public_key})

    def launch(self, order: dict[str, Any]) -> str:
        """Starts one instance.

        Returns:
            Its id.
        """
        made = self._call("POST", "/api/v1/instance-operations/launch", order, launch=True)
        ids = made.get("instance_ids") if isinstance(made, dict) else None
        if not ids:
            raise UnknownOutcomeError(f"Lambda accepted a launch and did not say which instance it is: {made!r:.200}")
        return str(ids[0])

    def terminate(self, ids: Sequence[str]) -> bool:
        """Begins the end of these.

        Returns:
            Whether all of them are known; if not, nothing may have been done.
        """
        path = "/api/v1/instance-operations/terminate"
        return self._call("POST", path, {"instance_ids": list(ids)}, unknown_ok=True) is not None

    # -- asking ------------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        launch: bool = False,
        unknown_ok: bool = False,
    ) -> Any:
        """One request, once. The answer's data; `None` if the id in it is unknown, and that is all right.

        Raises:
            BackendError: what went wrong, in the contract's terms.
        """
        self._gate.wait(launch=launch)
        answer = self._send(method, path, body, _LAUNCH_TIMEOUT if launch else _READ_TIMEOUT)
        if answer.is_success:
            return _data(answer)
        said = _refusal(answer)
        if said.status == 429 and said.retry_after:
            self._gate.hold(said.retry_after)
        if said.unknown and unknown_ok:
            return None
        raise translated(said)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> httpx.Response:
        """Without a connection nothing happened; else it may have."""
        limits = httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT)
        try:
            return self._http.request(method, path, json=body, timeout=limits)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise RateLimitedError(f"Lambda cannot be reached at {self._http.base_url}: {error}") from error
        except httpx.HTTPError as error:
            raise UnknownOutcomeError(f"Lambda did not answer {method} {path}: {error!r}") from error


def account_folder(config: LambdaConfig) -> Path:
    """Where all processes of this user keep what they share about an account: in `cache/lambda` of the home folder.

    Its name holds no secret: it is a hash.
    """
    home = os.environ.get("DSTACK_HOME")
    who = hashlib.sha256(f"{config.api_key.get_secret_value()} {config.url}".encode()).hexdigest()[:16]
    return (Path(home) if home else Path.home() / ".dstack") / "cache" / "lambda" / who


def _data(answer: httpx.Response) -> Any:
    """What a success says."""
    try:
        return answer.json()["data"]
    except (ValueError, LookupError, TypeError) as error:
        raise UnknownOutcomeError(f"Lambda's answer cannot be read: {error!r}") from error


def _of(kind: type[T], data: Any) -> T:
    if not isinstance(data, kind):
        raise UnknownOutcomeError(f"Lambda's answer is no {kind.__name__}: {data!r:.200}")
    return data


def _refusal(answer: httpx.Response) -> Refusal:
    """What a refusal says; what comes from a proxy in between has no code."""
    seconds = answer.headers.get("Retry-After", "").strip()
    wait = float(seconds) if seconds.isdecimal() else None
    try:
        error = answer.json()["error"]
        words, advice = str(error["message"]), str(error.get("suggestion") or "")
        return Refusal(answer.status_code, str(error["code"]), words.rstrip("."), advice.rstrip("."), wait)
    except (ValueError, LookupError, TypeError, AttributeError):
        said = f"Lambda answered: {answer.reason_phrase or answer.status_code}"
        return Refusal(answer.status_code, "", said, retry_after=wait)
