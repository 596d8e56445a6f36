"""Whether a configuration can work: each call that a run needs is looked up in what the application may do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from dstack_azure._account import Account
from dstack_azure._calls import actions
from dstack_azure._config import AzureConfig
from dstack_azure._market import some_price
from dstack_azure._network import Networks
from dstack_azure._offers import ALL_QUOTA, SPOT_QUOTA
from dstack_core.plugin import BackendError

_PROVIDERS = ("Microsoft.Compute", "Microsoft.Network")
_QUOTAS = {ALL_QUOTA: "vCPUs", SPOT_QUOTA: "vCPUs of spot instances"}
_RAISE = "https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade"


class Checks:
    """Reads only; nothing is made."""

    def __init__(self, account: Account, config: AzureConfig, networks: Networks) -> None:
        self._account = account
        self._config = config
        self._networks = networks

    def problems(self) -> list[str]:
        """One sentence for each problem.

        Raises:
            BackendError: nothing can be said, since not even the permissions could be read.
        """
        found = missing_actions(self._account.permissions())
        checks: list[Callable[[], list[str]]] = [self._providers, self._network, self._prices]
        checks += [partial(self._region, region) for region in self._config.regions]
        for check in checks:
            found += _said(check)
        return list(dict.fromkeys(found))

    def _providers(self) -> list[str]:
        states = {
            name: self._account.call("resource.providers.get", name).get("registrationState") for name in _PROVIDERS
        }
        return [
            f"The subscription is not registered for {name} ({state}). Run `az provider register --namespace {name}`."
            for name, state in states.items()
            if state != "Registered"
        ]

    def _network(self) -> list[str]:
        if self._config.vnet is None:
            return []
        region = self._config.regions[0]
        problem = self._networks.problem_with(self._networks.find_configured(region), region)
        return [problem] if problem else []

    def _prices(self) -> list[str]:
        some_price(self._account, self._config, self._config.regions[0])
        return []

    def _region(self, region: str) -> list[str]:
        """Whether it exists, and whether the subscription may have anything in it."""
        skus = self._account.every("compute.resource_skus.list", filter=f"location eq '{region}'", at=region)
        if not any(sku.get("resourceType") == "virtualMachines" for sku in skus):
            return [
                f"There are no machines in {region}. Correct `regions`: `az account list-locations` names them all."
            ]
        limits = {
            usage["name"]["value"].lower(): usage["limit"]
            for usage in self._account.every("compute.usage.list", region, at=region)
        }
        return [
            f"The subscription may have no {what} in {region} (quota {name} is 0). Ask for more at {_RAISE}."
            for name, what in _QUOTAS.items()
            if limits.get(name, 1) <= 0
        ]


def missing_actions(permissions: list[dict[str, Any]]) -> list[str]:
    """A sentence for each action that none of the permissions allows."""
    return [
        f"Allow {action} to this application; `python -m dstack_azure` prints a role with all that is needed."
        for action in actions()
        if not any(_allows(entry, action) for entry in permissions)
    ]


def _allows(entry: dict[str, Any], action: str) -> bool:
    denied = any(_matches(pattern, action) for pattern in entry.get("notActions") or ())
    return not denied and any(_matches(pattern, action) for pattern in entry.get("actions") or ())


def _matches(pattern: str, action: str) -> bool:
    """As Azure does: a star is anything, also across slashes, and capital letters do not count."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), action, re.IGNORECASE) is not None


def _said(check: Callable[[], list[str]]) -> list[str]:
    """What is wrong, in words."""
    try:
        return check()
    except BackendError as error:
        return [str(error)]
