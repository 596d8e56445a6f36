"""Every error of the project, and what each one asks its receiver to do.

    DstackError
    ├── ConfigurationError               what a person wrote is wrong; the message names file, key and cure
    │   └── BackendNotInstalledError     a configured backend has no package; the message has the pip line
    ├── ClientError                      a call of the client did not do what was asked
    │   ├── ServerUnavailableError       no server answered; says whether the request may have been carried out
    │   ├── VersionMismatchError         client and server cannot talk to each other; says which one to upgrade
    │   ├── PortUsedError                a wanted local port is taken
    │   ├── AttachError                  forwarding could not start, or broke
    │   └── ServerClientError            the server refused the request
    │       ├── NoOffersError            nothing fits; says per backend why, and what comes nearest
    │       ├── RunNameTakenError        an active run has this name
    │       └── NotFoundError            there is no such run, project or backend
    └── BackendError                     a backend's answer to a hook; the class tells the engine what to do
        ├── NoCapacityError              try the next offer, remember this one for a while
        ├── QuotaExceededError           skip the instance family in this region
        ├── AuthenticationError          stop; the credentials need a person
        ├── InvalidRequestError          stop; the request needs a person
        ├── RateLimitedError             the same call again, later
        ├── UnknownOutcomeError          it may have happened: reconcile, never move on
        └── PluginBug                    anything else a plugin did; only that backend is affected

The tree above is compared with the classes by a test.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "AttachError",
    "AuthenticationError",
    "BackendError",
    "BackendNotInstalledError",
    "ClientError",
    "ConfigurationError",
    "DstackError",
    "InvalidRequestError",
    "NoCapacityError",
    "NoOffersError",
    "NotFoundError",
    "PluginBug",
    "PortUsedError",
    "QuotaExceededError",
    "RateLimitedError",
    "RunNameTakenError",
    "ServerClientError",
    "ServerUnavailableError",
    "UnknownOutcomeError",
    "VersionMismatchError",
]

Scope = Literal["zone", "region", "type", "account"]
"""How far a refusal reaches: this zone, this region, this instance type everywhere, or the whole account."""


class DstackError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigurationError(DstackError, ValueError):
    """Something a person wrote (a file, an argument, an environment variable) cannot be used."""


class BackendNotInstalledError(ConfigurationError):
    """A backend is configured but its package is not installed.

    Args:
        backend: the backend's name, for example `"aws"`.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        super().__init__(f"Backend '{backend}' is not installed. Install it with: pip install dstack-{backend}")


class ClientError(DstackError):
    """A call of the client failed."""


class ServerUnavailableError(ClientError):
    """No server answered, after all the tries that are safe to make."""


class VersionMismatchError(ClientError):
    """Client and server are of versions that cannot work together."""


class PortUsedError(ClientError):
    """A wanted local port is taken.

    Args:
        port: the port number.
        holder: who listens on it, as `"nginx (pid 812)"`; `None` when the system does not tell.
        job_port: the port of the job that it was wanted for; the same one if not set.
    """

    def __init__(self, port: int, holder: str | None = None, job_port: int | None = None) -> None:
        self.port = port
        self.holder = holder
        by = f" by {holder}" if holder else ""
        inner = port if job_port is None else job_port
        super().__init__(
            f"Local port {port} is already in use{by}. Stop what uses it, map another port "
            f"(ports=['{port + 1 if port < 65535 else port - 1}:{inner}']), or let one be picked (ports=['*:{inner}'])."
        )


class AttachError(ClientError):
    """The ports of a run could not be forwarded, or the forwarding broke."""


class ServerClientError(ClientError):
    """The server refused the request: the request, not the server, has to change."""

    code = "error"


class NoOffersError(ServerClientError):
    """No offer of any backend satisfies the run's requirements."""

    code = "no_offers"


class RunNameTakenError(ServerClientError):
    """An active run already has the wanted name."""

    code = "run_name_taken"


class NotFoundError(ServerClientError):
    """What was asked for does not exist."""

    code = "not_found"


class BackendError(DstackError):
    """A backend could not do what a hook asked. Raise one of the subclasses.

    Args:
        message: the cloud's own words, followed by the cure if there is one. Never a secret.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class NoCapacityError(BackendError):
    """The cloud has none of these instances now. The engine takes the next offer.

    Args:
        message: the cloud's own words.
        scope: how far the shortage reaches; offers inside it are passed over for a while.
        retry_after: seconds after which trying again makes sense, if the cloud says so.
    """

    def __init__(self, message: str, *, scope: Scope = "zone", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.scope: Scope = scope
        self.retry_after = retry_after


class QuotaExceededError(BackendError):
    """The account may not have more of these instances. The engine skips this family and region.

    Args:
        message: the cloud's own words, with the quota's name and where to raise it.
        scope: how far the quota reaches.
    """

    def __init__(self, message: str, *, scope: Scope = "region") -> None:
        super().__init__(message)
        self.scope: Scope = scope


class AuthenticationError(BackendError):
    """The credentials are missing, wrong, expired, or lack a permission (which one is in the message)."""


class InvalidRequestError(BackendError):
    """The cloud refuses the request as such; the same request will be refused again."""


class RateLimitedError(BackendError):
    """Too many requests: nothing happened, and the same call may be made again later.

    Args:
        message: the cloud's own words.
        retry_after: seconds to wait; `None` lets the engine choose.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnknownOutcomeError(BackendError):
    """The call may or may not have happened (time-out, reset connection, 5xx). The engine reconciles."""


class PluginBug(BackendError):
    """A plugin raised what it may not raise, returned what it may not return, or did not return in time.

    Args:
        plugin: name of the backend or plugin.
        version: its distribution and version, or `"unknown version"`.
        hook: the hook that was called.
        problem: what was wrong, in one sentence.
    """

    def __init__(self, plugin: str, version: str, hook: str, problem: str) -> None:
        self.plugin = plugin
        self.version = version
        self.hook = hook
        self.problem = problem
        super().__init__(f"Plugin '{plugin}' ({version}) failed in {hook}: {problem}")
