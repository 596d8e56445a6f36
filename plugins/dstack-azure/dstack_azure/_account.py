"""The account: who we are, one client for each part of Azure, and one way to call them.

Each call is made once. Retries are the engine's, which knows what a lost answer means.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import httpx
from azure.core.credentials import TokenCredential
from azure.core.pipeline import policies
from azure.core.pipeline.transport import RequestsTransport
from azure.core.rest import HttpRequest
from azure.identity import ClientSecretCredential, DefaultAzureCredential
from azure.mgmt.core.policies import ARMChallengeAuthenticationPolicy

from dstack_azure._calls import action_of
from dstack_azure._config import AzureConfig, ClientSecret
from dstack_azure._errors import SDK_ERRORS, of_web, translated
from dstack_core.plugin import UnknownOutcomeError

_CONNECT_TIMEOUT, _READ_TIMEOUT = 5, 25
"""Seconds. Together shorter than `hook_timeout`, so that it is us who say what is known."""

# At their most talkative these write down what they send, secrets included.
for _name in ("azure", "msal"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class _Client(Protocol):
    def close(self) -> None: ...


class Account:
    """The clients of one subscription. Safe to use from several threads."""

    def __init__(self, config: AzureConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}
        self._closed = False
        self._credential: TokenCredential | None = None

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            self._closed = True
            clients, self._clients = list(self._clients.values()), {}
            credential, self._credential = self._credential, None
        for client in [*clients, credential]:
            close = getattr(client, "close", None)
            if close is not None:
                close()

    def call(self, operation: str, *args: Any, at: str = "", **kwargs: Any) -> dict[str, Any]:
        """One call, once, without waiting for what it begins.

        Args:
            operation: client, group and method of the SDK, as `compute.virtual_machines.get`.
            args: its arguments.
            at: where, for messages.
            kwargs: its arguments.

        Returns:
            The answer as Azure wrote it.

        Raises:
            BackendError: what went wrong, in the contract's terms.
        """
        try:
            return self.plain_call(operation, *args, **kwargs)
        except SDK_ERRORS as error:
            raise translated(error, action_of(operation), at) from error

    def plain_call(self, operation: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `call`, with the SDK's own exceptions, for who has to look at the code."""
        answer = self._method(operation)(*args, **kwargs)
        if hasattr(answer, "polling_method"):
            answer = answer.result()
        return {} if answer is None else _plain(answer)

    def every(self, operation: str, *args: Any, at: str = "", **kwargs: Any) -> list[dict[str, Any]]:
        """All entries of all pages."""
        try:
            return [_plain(entry) for entry in self._method(operation)(*args, **kwargs)]
        except SDK_ERRORS as error:
            raise translated(error, action_of(operation), at) from error

    def permissions(self) -> list[dict[str, Any]]:
        """What may be done in the subscription: each entry with `actions` and `notActions`.

        Raises:
            BackendError: that cannot be read.
        """
        path = f"/subscriptions/{self._config.subscription_id}/providers/Microsoft.Authorization/permissions"
        url: str | None = f"{self._config.base_url}{path}?api-version=2022-04-01"
        found: list[dict[str, Any]] = []
        client: Any = self._client("resource")
        try:
            while url:
                response = client.send_request(HttpRequest("GET", url))
                response.raise_for_status()
                page = response.json()
                found += page["value"]
                url = page.get("nextLink")
        except SDK_ERRORS as error:
            raise translated(error, action_of("permissions"), "") from error
        return found

    def fetch(self, url: str) -> httpx.Response:
        """What is at an address that holds a key: nobody writes that down, as a client of httpx would.

        Raises:
            httpx.HTTPError: it cannot be had; look at the status of what can.
        """
        limits = {"connect": _CONNECT_TIMEOUT, "read": _READ_TIMEOUT, "write": _READ_TIMEOUT, "pool": _CONNECT_TIMEOUT}
        with httpx.HTTPTransport(verify=_trust(self._config.ca_bundle)) as transport:
            response = transport.handle_request(httpx.Request("GET", url, extensions={"timeout": limits}))
            response.read()
        return response

    def web(self) -> httpx.Client:
        """For the prices, which are no part of the SDK. To be closed: they may be read when this is no longer."""
        return httpx.Client(
            verify=_trust(self._config.ca_bundle),
            timeout=httpx.Timeout(_READ_TIMEOUT, connect=_CONNECT_TIMEOUT),
            headers={"User-Agent": "dstack-azure"},
        )

    def _method(self, operation: str) -> Any:
        action_of(operation)
        client, group, method = operation.split(".")
        found = getattr(getattr(self._client(client), group), method)
        return _without_waiting(found) if method.startswith("begin_") else found

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            with self._lock:
                client = self._clients.get(name) or self._clients.setdefault(name, self._new_client(name))
        return client

    def _new_client(self, name: str) -> _Client:
        if self._closed:
            # A thread that still reads in the background: nobody would close what is made for it now.
            raise UnknownOutcomeError("This connection to Azure was closed meanwhile.")
        if self._credential is None:
            self._credential = _credential(self._config)
        scope = f"{self._config.base_url}/.default"
        options: dict[str, Any] = {
            "base_url": self._config.base_url,
            "credential_scopes": [scope],
            "polling_interval": self._config.polling_interval,
            "transport": RequestsTransport(
                connection_timeout=_CONNECT_TIMEOUT,
                read_timeout=_READ_TIMEOUT,
                connection_verify=self._config.ca_bundle or True,
            ),
            # Without the SDK's own retries, and without its way of registering providers in passing.
            "policies": [
                policies.RequestIdPolicy(),
                policies.HeadersPolicy(),
                policies.UserAgentPolicy("dstack-azure"),
                policies.ProxyPolicy(),
                policies.ContentDecodePolicy(),
                ARMChallengeAuthenticationPolicy(self._credential, scope),
            ],
        }
        made: _Client = _client_class(name)(self._credential, self._config.subscription_id, **options)
        return made


def _client_class(name: str) -> Any:
    """Loaded when it is first used: some have tens of megabytes."""
    if name == "compute":
        from azure.mgmt.compute import ComputeManagementClient as Compute

        return Compute
    if name == "network":
        from azure.mgmt.network import NetworkManagementClient as Network

        return Network
    from azure.mgmt.resource.resources import ResourceManagementClient as Resource

    return Resource


def _without_waiting(begin: Any) -> Any:
    def begun(*args: Any, **kwargs: Any) -> Any:
        return begin(*args, polling=False, **kwargs)

    return begun


def _plain(answer: Any) -> dict[str, Any]:
    values: dict[str, Any] = answer.as_dict()
    return values


def _trust(ca_bundle: str | None) -> Any:
    if ca_bundle is None:
        return True
    import ssl

    return ssl.create_default_context(cafile=ca_bundle)


def _credential(config: AzureConfig) -> TokenCredential:
    options: dict[str, Any] = {
        "authority": config.authority,
        "disable_instance_discovery": not config.instance_discovery,
        "connection_verify": config.ca_bundle or True,
        "connection_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _READ_TIMEOUT,
        "retry_total": 0,
    }
    creds = config.creds
    if isinstance(creds, ClientSecret):
        return ClientSecretCredential(
            creds.tenant_id, creds.client_id, creds.client_secret.get_secret_value(), **options
        )
    return DefaultAzureCredential(**options)


def pages(account: Account, url: str, params: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The entries of a list that is no part of the SDK, page after page.

    Raises:
        BackendError: it cannot be read.
    """
    following: str | None = url
    wanted: dict[str, str] | None = params
    with account.web() as web:
        while following:
            entries, following = _page(web, following, wanted)
            yield from entries
            # The address of the next one has them in it.
            wanted = None


def _page(web: httpx.Client, url: str, params: dict[str, str] | None) -> tuple[list[dict[str, Any]], str | None]:
    try:
        response = web.get(url, params=params)
        response.raise_for_status()
        page = response.json()
        return list(page["Items"]), page.get("NextPageLink")
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise of_web(error, "the list of prices") from error
