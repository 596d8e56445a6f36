"""The account: who we are, one client for each service and region, and one way to call them.

Each call is made once. Retries are the engine's, which knows what a lost answer means.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.loaders import create_loader
from botocore.session import Session

from dstack_aws._calls import action_of
from dstack_aws._config import AccessKey, AssumedRole, AwsConfig, NamedProfile
from dstack_aws._errors import SDK_ERRORS, translated

_CONNECT_TIMEOUT, _READ_TIMEOUT = 5, 25
"""Seconds. Together shorter than `hook_timeout`, so that it is us who say what is known."""


# At its most talkative the SDK writes down what it signs, session tokens included.
logging.getLogger("botocore").setLevel(logging.INFO)


class Account:
    """The clients of one account. Safe to use from several threads."""

    def __init__(self, config: AwsConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._clients: dict[tuple[str, str], Any] = {}

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def call(self, service: str, operation: str, region: str, **params: Any) -> dict[str, Any]:
        """One call, once.

        Args:
            service: as the SDK names it, `ec2`.
            operation: the SDK's method, `describe_instances`.
            region: where.
            params: the arguments.

        Raises:
            BackendError: what went wrong, in the contract's terms.
        """
        try:
            return self.plain_call(service, operation, region, **params)
        except SDK_ERRORS as error:
            raise translated(error, action_of(service, operation), region) from error

    def plain_call(self, service: str, operation: str, region: str, **params: Any) -> dict[str, Any]:
        """As `call`, with the SDK's own exceptions, for who has to look at the code."""
        answer: dict[str, Any] = getattr(self._client(service, region), operation)(**params)
        return answer

    def pages(self, service: str, operation: str, region: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Page after page."""
        token: dict[str, Any] = {}
        while True:
            page = self.call(service, operation, region, **params, **token)
            yield page
            if not page.get("NextToken"):
                return
            token = {"NextToken": page["NextToken"]}

    def _client(self, service: str, region: str) -> Any:
        key = (service, region)
        client = self._clients.get(key)
        if client is None:
            # Sessions are not safe to use from several threads; clients are.
            with self._lock:
                client = self._clients.get(key) or self._clients.setdefault(key, self._new_client(service, region))
        return client

    def _new_client(self, service: str, region: str) -> Any:
        if self._session is None:
            self._session = _session(self._config)
        return self._session.create_client(
            service,
            region_name=region,
            endpoint_url=self._config.endpoint_url,
            config=Config(
                connect_timeout=_CONNECT_TIMEOUT,
                read_timeout=_READ_TIMEOUT,
                retries={"total_max_attempts": 1},
                max_pool_connections=16,
                user_agent_extra="dstack-aws",
            ),
        )


# Reading a service's description takes longer than most calls; it is the same for every account.
_LOADER = create_loader()


def _sdk(profile: str | None = None) -> Session:
    session = Session(profile=profile)
    session.register_component("data_loader", _LOADER)
    return session


def _session(config: AwsConfig) -> Session:
    creds = config.creds
    if isinstance(creds, NamedProfile):
        return _sdk(creds.name)
    session = _sdk()
    if isinstance(creds, AccessKey):
        token = creds.session_token.get_secret_value() if creds.session_token else None
        session.set_credentials(creds.access_key.get_secret_value(), creds.secret_key.get_secret_value(), token)
    if isinstance(creds, AssumedRole):
        session._credentials = _role(creds, config)  # noqa: SLF001  # it has no other door for keys that run out
    return session


def _role(creds: AssumedRole, config: AwsConfig) -> DeferredRefreshableCredentials:
    """The keys of a role, fetched when they are first needed, and anew before they run out."""
    base = _sdk(creds.profile)
    extra: dict[str, str] = {"RoleSessionName": "dstack"}
    if creds.external_id is not None:
        extra["ExternalId"] = creds.external_id.get_secret_value()

    def client(service: str, **options: Any) -> Any:
        region = options.pop("region_name", None) or base.get_config_variable("region") or "us-east-1"
        return base.create_client(service, region_name=region, endpoint_url=config.endpoint_url, **options)

    fetcher = AssumeRoleCredentialFetcher(client, base.get_credentials(), creds.role_arn, extra_args=extra)
    return DeferredRefreshableCredentials(refresh_using=fetcher.fetch_credentials, method="assume-role")
