"""How the client reaches a server: connections, retries, and whether both sides speak the same version.

httpx is imported when the first request is made, so that `import dstack.api` stays cheap.
"""

from __future__ import annotations

import os
import time
import weakref
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dstack_core import __version__
from dstack_core.errors import ConfigurationError, ServerUnavailableError, VersionMismatchError

if TYPE_CHECKING:
    import httpx

    from dstack_core._models.wire import ServerInfo

ANSWER_TIMEOUT = 60.0
"""Seconds for which a server that accepted a request may be silent, on top of the time it was asked to wait."""
CONNECT_TIMEOUT = 10.0
FIRST_PATIENCE = 3.0
"""Seconds of trying to reach a server that has not answered this client yet: most likely the address is wrong."""
PATIENCE = 60.0
"""Seconds of trying to reach a server that has answered before: most likely it is being restarted."""
LONGEST_PAUSE = 2.0


class Failures:
    """The failed tries of one request.

    Attributes:
        count: how many there were.
        sent: whether one of the tries may have reached the server.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sent = False
        self._since = 0.0

    def add(self, error: Exception, *, sent: bool) -> None:
        """Counts one more; `sent` if the request itself was on its way."""
        import httpx

        if not self.count:
            self._since = time.monotonic()
        self.count += 1
        self.sent |= sent and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)

    def forget(self) -> None:
        """Starts to count anew: something was achieved in between."""
        self.count = 0

    def lasted(self) -> float:
        """Seconds since the first one."""
        return time.monotonic() - self._since if self.count else 0.0

    def pause(self) -> float:
        """Seconds to wait before the next try."""
        return min(0.05 * 2.0**self.count, LONGEST_PAUSE)


class Connection:
    """A server, and the open connections to it. Safe to use from several threads, and after a fork.

    Attributes:
        label: the server as messages call it; holds no secret.
        on_this_computer: whether addresses of the server's computer are addresses of this one.
        services_url: where the server publishes services; `None` if only the server can say.
    """

    label: str
    on_this_computer: bool = False
    services_url: str | None = None

    def __init__(self) -> None:
        # One per process: a forked child must not write into its parent's connections.
        self._clients: dict[int, httpx.Client] = {}
        weakref.finalize(self, _close, self._clients)

    def http(self) -> httpx.Client:
        """The HTTP client of this process."""
        pid = os.getpid()
        return self._clients.get(pid) or self._clients.setdefault(pid, self._new_client())

    def close(self) -> None:
        """Closes the open connections. The next request opens new ones."""
        _close(self._clients)

    def prepare(self) -> None:
        """Called before every try of a request: makes sure that there is a server of the right version."""

    def recover(self, error: Exception, failures: Failures) -> None:
        """Called after a try that met no server, or lost it: returns when another try makes sense.

        Raises:
            ServerUnavailableError: there is no point in trying again.
        """
        raise NotImplementedError

    def _new_client(self) -> httpx.Client:
        raise NotImplementedError


def _close(clients: dict[int, httpx.Client]) -> None:
    client = clients.pop(os.getpid(), None)
    if client is not None:
        client.close()


def new_client(url: str, *, uds: str | None = None, headers: dict[str, str] | None = None) -> httpx.Client:
    """An HTTP client with as many connections as there are threads; `uds` is the unix socket to use, if any."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=30)
    return httpx.Client(
        base_url=url,
        transport=_unix_transport(uds, limits) if uds else None,
        headers={"accept-encoding": "identity", "user-agent": f"dstack-core/{__version__}", **(headers or {})},
        limits=limits,
        timeout=httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT),
        # Without TLS there are no certificates to load, which takes longer than many requests.
        verify=url.startswith("https:"),
        trust_env=uds is None,
    )


def _unix_transport(address: str, limits: httpx.Limits) -> httpx.BaseTransport:
    from dstack_core._client.unix import UnixTransport

    return UnixTransport(address, limits)


class RemoteConnection(Connection):
    """A server that somebody else runs, over TCP.

    Args:
        url: as `https://dstack.example.com`.
        token: sent with every request, and never shown.
    """

    def __init__(self, url: str, token: str | None) -> None:
        super().__init__()
        self._url = checked_url(url)
        self._token = token
        self._checked = False
        self.services_url = without_user(self._url)
        self.label = f"The server {self.services_url}"
        self.on_this_computer = urlsplit(self._url).hostname in {"localhost", "127.0.0.1", "::1"}

    def _new_client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        return new_client(self._url, headers=headers)

    def prepare(self) -> None:
        """Compares versions, once."""
        if self._checked:
            return
        answer = self.http().get("/api/server/info")
        if answer.status_code == 200:
            check_version(read_info(answer.content, self.label))
        self._checked = True

    def recover(self, error: Exception, failures: Failures) -> None:
        """Waits a little, longer each time."""
        patience = PATIENCE if self._checked else FIRST_PATIENCE
        if failures.lasted() + failures.pause() > patience or not _may_pass(error):
            raise ServerUnavailableError(
                f"{self.label} does not answer: {reason_of(error)}. "
                "Check that it runs, that its url in config.yml is right, and that this computer is online."
            ) from error
        time.sleep(failures.pause())


def _may_pass(error: Exception) -> bool:
    """False for failures that the next try would meet again: no such host, a certificate that is not trusted."""
    text = str(error).lower()
    return not any(sign in text for sign in ("name or service not known", "nodename nor servname", "certificate"))


def reason_of(error: Exception) -> str:
    """What went wrong, in the system's words."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    return str(error).strip().rstrip(".") or type(error).__name__


def checked_url(url: str) -> str:
    """The URL without a slash at its end; `ConfigurationError` if it is none of HTTP."""
    if not _is_http(url):
        raise ConfigurationError(f"'{without_user(url)}' is not the URL of a server. Example: http://127.0.0.1:3000")
    return url.rstrip("/")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def without_user(url: str) -> str:
    """The URL without user and password."""
    scheme, slashes, rest = url.rpartition("://")
    address, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{address.rpartition('@')[2]}{slash}{path}"


# ------------------------------------------------------------------------------------------------------------ versions


def read_info(body: bytes, label: str) -> ServerInfo:
    """Who answers; `ServerUnavailableError` if that is no dstack server at all."""
    from pydantic import ValidationError

    from dstack_core._models.wire import ServerInfo

    try:
        return ServerInfo.model_validate_json(body)
    except ValidationError:
        raise ServerUnavailableError(f"{label} answers, but is no dstack server. Check its url.") from None


def is_older(version: str, than: str = __version__) -> bool:
    """Whether a version comes before another one. One that cannot be read is not older."""
    return bool(_numbers(version)) and _numbers(version) < _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    import re

    match = re.match(r"\d+(\.\d+)+", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def check_version(info: ServerInfo) -> None:
    """Raises `VersionMismatchError` unless client and server can talk to each other."""
    from dstack_core._models.wire import API_VERSION

    if info.api == API_VERSION:
        return
    if info.api > API_VERSION:
        raise VersionMismatchError(
            f"The server is of version {info.version}, newer than this client ({__version__}). "
            f"Upgrade the client: pip install --upgrade 'dstack-core=={info.version}'"
        )
    raise VersionMismatchError(
        f"The server is of version {info.version}, older than this client ({__version__}). "
        f"Upgrade the server, or use an older client: pip install 'dstack-core=={info.version}'"
    )
