"""Where instances go: the resource group, and in each region a network that lets in SSH."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dstack_azure._account import Account
from dstack_azure._calls import action_of
from dstack_azure._config import AzureConfig
from dstack_azure._errors import SDK_ERRORS, is_gone, translated
from dstack_core.plugin import InvalidRequestError, RateLimitedError

_PATIENCE = 20.0
"""Seconds for which the first instance of a region waits for its network; whoever comes too early is told so."""
_GROUP, _MAKE_GROUP = "resource.resource_groups.get", "resource.resource_groups.create_or_update"
_VNET, _MAKE_VNET = "network.virtual_networks.get", "network.virtual_networks.begin_create_or_update"
_MAKE_RULES = "network.network_security_groups.begin_create_or_update"


class Networks:
    """The networks of all regions, looked up once, and made if they are not there.

    Args:
        account: whom to ask.
        config: which ones to use.
        pause: lets so many seconds pass.
    """

    def __init__(self, account: Account, config: AzureConfig, pause: Callable[[float], object] = time.sleep) -> None:
        self._account = account
        self._config = config
        self._pause = pause
        self._lock = threading.Lock()
        self._subnets: dict[str, str] = {}

    def subnet(self, region: str) -> str:
        """The id of a region's subnet. Also sees to it that there is the resource group.

        Raises:
            InvalidRequestError: the configured one is not there.
            RateLimitedError: it is being made.
            BackendError: it cannot be looked up or made.
        """
        with self._lock:
            if region not in self._subnets:
                self.make_group()
                vnet = self._configured(region) if self._config.vnet else self._own(region)
                self._subnets[region] = self._subnet_in(vnet)
            return self._subnets[region]

    def forget(self, region: str) -> None:
        """Something of it may have been removed: looks again."""
        with self._lock:
            self._subnets.pop(region, None)

    def make_group(self) -> None:
        """The resource group, which may be there already."""
        name, home = self._config.resource_group, self._config.regions[0]
        if self._found(_GROUP, home, name) is None:
            body = {"location": home, "tags": self._tags()}
            self._account.call(_MAKE_GROUP, name, body, at=home)

    def find_configured(self, region: str) -> dict[str, Any] | None:
        """The configured network, if it is there."""
        group, name = str(self._config.vnet).split("/")
        return self._found(_VNET, region, group, name)

    def _configured(self, region: str) -> dict[str, Any]:
        vnet = self.find_configured(region)
        problem = self.problem_with(vnet, region)
        if vnet is None or problem:
            raise InvalidRequestError(str(problem))
        return vnet

    def problem_with(self, vnet: dict[str, Any] | None, region: str) -> str | None:
        """What is wrong with a configured network, in words."""
        if vnet is None:
            return f"There is no network {self._config.vnet}. Correct `vnet`, or leave it out: one will be made."
        if vnet["location"] != region:
            return f"The network {self._config.vnet} is in {vnet['location']}. Set `regions` to [{vnet['location']}]."
        names = [subnet["name"] for subnet in vnet["properties"].get("subnets") or ()]
        if self._wanted() not in names:
            return f"The network {self._config.vnet} has no subnet '{self._wanted()}', but {names}. Set `subnet`."
        return None

    def _wanted(self) -> str:
        return self._config.subnet or "default"

    def _subnet_in(self, vnet: dict[str, Any]) -> str:
        return next(str(one["id"]) for one in vnet["properties"]["subnets"] if one["name"] == self._wanted())

    def _own(self, region: str) -> dict[str, Any]:
        """Ours, which is looked at before it is made: to make it again would undo what others changed in it."""
        group, name = self._config.resource_group, f"dstack-{region}"
        vnet = self._found(_VNET, region, group, name)
        if vnet is None:
            rules = self._account.call(_MAKE_RULES, group, name, self._rules(region), at=region)
            vnet = self._account.call(_MAKE_VNET, group, name, self._vnet(region, rules["id"]), at=region)
        for _ in range(int(_PATIENCE / self._config.polling_interval)):
            if _is_ready(vnet):
                return vnet
            self._pause(self._config.polling_interval)
            vnet = self._account.call(_VNET, group, name, at=region)
        raise RateLimitedError(f"The network {name} is being made. Once for each region, that takes a while.")

    def _rules(self, region: str) -> dict[str, Any]:
        """SSH, from anywhere: the machine's key is known beforehand, and only our key gets in."""
        rule = {
            "protocol": "Tcp",
            "access": "Allow",
            "direction": "Inbound",
            "priority": 1000,
            "sourceAddressPrefix": "*",
            "sourcePortRange": "*",
            "destinationAddressPrefix": "*",
            "destinationPortRange": "22",
        }
        rules = [{"name": "ssh", "properties": rule}]
        return {"location": region, "tags": self._tags(), "properties": {"securityRules": rules}}

    def _vnet(self, region: str, rules: str) -> dict[str, Any]:
        subnet = {"addressPrefix": "10.0.0.0/16", "networkSecurityGroup": {"id": rules}}
        properties = {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [{"name": "default", "properties": subnet}],
        }
        return {"location": region, "tags": self._tags(), "properties": properties}

    def _tags(self) -> dict[str, str]:
        return {**self._config.tags, "managed-by": "dstack"}

    def _found(self, operation: str, region: str, *names: str) -> dict[str, Any] | None:
        try:
            return self._account.plain_call(operation, *names)
        except SDK_ERRORS as error:
            if is_gone(error):
                return None
            raise translated(error, action_of(operation), region) from error


def _is_ready(vnet: dict[str, Any]) -> bool:
    """Raises if it will never be."""
    state = str(vnet["properties"].get("provisioningState"))
    if state == "Failed":
        raise InvalidRequestError(f"The network {vnet['id']} is broken. Remove it: it will be made anew.")
    return state == "Succeeded"
