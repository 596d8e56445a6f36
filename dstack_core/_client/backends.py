"""`client.backends`: which backends there are."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core._client.api import APIClient
    from dstack_core._models.wire import BackendStatus


class Backend:
    """A cloud, or this computer, as the server sees it."""

    def __init__(self, status: BackendStatus) -> None:
        self._status = status

    @property
    def name(self) -> str:
        """Its name, as `backends=["aws"]` uses it."""
        return self._status.name

    @property
    def title(self) -> str:
        """Its name for people."""
        return self._status.title

    @property
    def state(self) -> str:
        """`configured` (usable), `not_configured` (only installed), `not_installed` (only configured), or `failed`."""
        return self._status.state

    @property
    def reason(self) -> str | None:
        """Why it is not usable, and what to do; `None` if it is."""
        return self._status.reason

    @property
    def version(self) -> str | None:
        """The version of its package."""
        return self._status.version

    @property
    def distribution(self) -> str | None:
        """The name of its package."""
        return self._status.distribution

    @property
    def path(self) -> str | None:
        """Where its package is installed, on the server's computer."""
        return self._status.path

    @property
    def problems(self) -> tuple[str, ...]:
        """What a check found: missing credentials, permissions, quotas. Empty without a check."""
        return self._status.problems

    def __repr__(self) -> str:
        return f"<Backend '{self.name}': {self.state}>"


class BackendCollection:
    """The backends of the project's server."""

    def __init__(self, api_client: APIClient, project: str) -> None:
        self._api = api_client
        self._project = project

    def list(self) -> builtins.list[Backend]:
        """The backends that are installed and configured, so that runs can use them."""
        return [backend for backend in self.installed() if backend.state == "configured"]

    def installed(self, *, check: bool = False) -> builtins.list[Backend]:
        """All backends that are installed or configured, each with its state and, if it is not usable, the reason.

        Args:
            check: also have each configured backend look at its credentials, permissions and network, which takes a
                while; what it finds is in `Backend.problems`.
        """
        return [Backend(status) for status in self._api.list_backends(self._project, check=check)]

    def __repr__(self) -> str:
        return f"<BackendCollection of project '{self._project}'>"
