"""The project: who we are, one client for each part of the API, and one way to call them.

Each call is made once. Retries are the engine's, which knows what a lost answer means.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import google.auth
from google.api_core.client_options import ClientOptions
from google.auth.transport.requests import AuthorizedSession
from google.cloud import billing_v1, compute_v1
from google.oauth2 import service_account

from dstack_core.plugin import AuthenticationError
from dstack_gcp._calls import action_of, permissions_of
from dstack_gcp._config import GcpConfig, ServiceAccount
from dstack_gcp._errors import SDK_ERRORS, translated

TIMEOUT = 20.0
"""Seconds for an answer. Shorter than `hook_timeout`, so that it is us who say what is known."""

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_RESOURCE_MANAGER = "https://cloudresourcemanager.googleapis.com"
_CLIENTS: dict[str, Any] = {
    "accelerator_types": compute_v1.AcceleratorTypesClient,
    "firewalls": compute_v1.FirewallsClient,
    "images": compute_v1.ImagesClient,
    "instances": compute_v1.InstancesClient,
    "machine_types": compute_v1.MachineTypesClient,
    "networks": compute_v1.NetworksClient,
    "projects": compute_v1.ProjectsClient,
    "regions": compute_v1.RegionsClient,
    "subnetworks": compute_v1.SubnetworksClient,
    "zone_operations": compute_v1.ZoneOperationsClient,
    "billing": billing_v1.CloudCatalogClient,
}


class Account:
    """The clients of one project. Safe to use from several threads.

    Attributes:
        project: its id.
    """

    def __init__(self, config: GcpConfig) -> None:
        self.project = config.project
        self._config = config
        self._lock = threading.RLock()
        self._creds: Any = None
        self._clients: dict[str, Any] = {}

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.transport.close()

    def call(self, client: str, method: str, where: str = "", **fields: Any) -> Any:
        """One call, once.

        Args:
            client: one of the table's, `instances`.
            method: the SDK's method, `get`.
            where: the zone or region, for messages; the project if not set.
            fields: of the request; `project` is there already.

        Raises:
            BackendError: what went wrong, in the contract's terms.
        """
        try:
            return self.plain_call(client, method, **fields)
        except SDK_ERRORS as error:
            raise translated(error, action_of(client, method), where or self.project) from error

    def plain_call(self, client: str, method: str, **fields: Any) -> Any:
        """As `call`, with the SDK's own exceptions, for who has to look at the reason."""
        permissions_of(client, method)
        request = fields if client == "billing" else {"project": self.project, **fields}
        return getattr(self._client(client), method)(request=request, retry=None, timeout=TIMEOUT)

    def pages(self, client: str, method: str, where: str = "", **fields: Any) -> Iterator[Any]:
        """Page after page."""
        pager = self.call(client, method, where, **fields)
        try:
            yield from pager.pages
        except SDK_ERRORS as error:
            raise translated(error, action_of(client, method), where or self.project) from error

    def granted(self, wanted: list[str]) -> set[str]:
        """Those of these permissions that we have in the project.

        Raises:
            BackendError: nobody can say.
        """
        base = self._config.endpoint_url or _RESOURCE_MANAGER
        url = f"{base}/v1/projects/{self.project}:testIamPermissions"
        action = action_of("resource_manager", "test_iam_permissions")
        try:
            with AuthorizedSession(self._credentials()) as session:  # type: ignore[no-untyped-call]  # it has no types
                answer = session.post(url, json={"permissions": wanted}, timeout=TIMEOUT)
            if answer.status_code != 200:
                from google.api_core.exceptions import from_http_response

                raise from_http_response(answer)  # type: ignore[no-untyped-call]  # it has no types
            return set(answer.json().get("permissions", ()))
        except SDK_ERRORS as error:
            raise translated(error, action, self.project) from error

    def _client(self, name: str) -> Any:
        with self._lock:
            if name not in self._clients:
                options = ClientOptions(api_endpoint=self._config.endpoint_url) if self._config.endpoint_url else None
                self._clients[name] = _CLIENTS[name](
                    credentials=self._credentials(), client_options=options, transport="rest"
                )
            return self._clients[name]

    def _credentials(self) -> Any:
        with self._lock:
            if self._creds is None:
                self._creds = _credentials(self._config)
            return self._creds


def _credentials(config: GcpConfig) -> Any:
    creds = config.creds
    if not isinstance(creds, ServiceAccount):
        return _signing(google.auth.default(scopes=_SCOPES)[0])
    try:
        if creds.data is not None:
            info = json.loads(creds.data.get_secret_value())
            found = service_account.Credentials.from_service_account_info(info, scopes=_SCOPES)  # type: ignore[no-untyped-call]  # it has no types
        else:
            found = service_account.Credentials.from_service_account_file(creds.filename, scopes=_SCOPES)  # type: ignore[no-untyped-call]  # it has no types
        return _signing(found)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        where = creds.filename or "`data`"
        # What was wrong with it may quote it.
        raise AuthenticationError(
            f"The key of the service account in {where} cannot be read ({type(error).__name__}). Make one with "
            "`gcloud iam service-accounts keys create`, and give the file's path or all of its text."
        ) from None


def _signing(creds: Any) -> Any:
    """A service account that signs its own tokens, so that nobody has to be asked for one."""
    if isinstance(creds, service_account.Credentials):
        return creds.with_always_use_jwt_access(True)  # type: ignore[no-untyped-call]  # it has no types
    return creds
