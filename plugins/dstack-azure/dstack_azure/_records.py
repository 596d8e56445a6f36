"""Which intents have ended: a machine that is gone leaves its name free, and must not be made a second time.

Azure keeps the history of deployments, up to 800 for each resource group, and drops the oldest by itself. An empty
deployment costs nothing and makes nothing: one with the machine's name is the record that it was there.
"""

from __future__ import annotations

from typing import Any

from dstack_azure._account import Account
from dstack_azure._calls import action_of
from dstack_azure._config import AzureConfig
from dstack_azure._errors import ACTIVE, SDK_ERRORS, code_of, is_gone, translated

_API = "2024-03-01"
_NOTHING = {
    "$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#",
    "contentVersion": "1.0.0.0",
    "resources": [],
}
_GET, _PUT = "resource.resources.get_by_id", "resource.resources.begin_create_or_update_by_id"


class Records:
    """The records of one subscription."""

    def __init__(self, account: Account, config: AzureConfig) -> None:
        self._account = account
        self._subscription = config.subscription_id

    def find(self, group: str, name: str, region: str) -> dict[str, Any] | None:
        """The record of a machine that has ended, with its tags; `None` if there is none.

        Raises:
            BackendError: that cannot be read.
        """
        try:
            return self._account.plain_call(_GET, self._id(group, name), api_version=_API)
        except SDK_ERRORS as error:
            if is_gone(error):
                return None
            raise translated(error, action_of(_GET), region) from error

    def write(self, group: str, machine: dict[str, Any]) -> None:
        """Records that a machine is being ended; again and again is fine.

        Raises:
            BackendError: that cannot be written, so that the machine must stay for now.
        """
        tags = {**(machine.get("tags") or {}), "created": str(machine["properties"].get("timeCreated") or "")}
        body = {"properties": {"mode": "Incremental", "template": _NOTHING}, "tags": tags}
        try:
            self._account.plain_call(_PUT, self._id(group, machine["name"]), body, api_version=_API)
        except SDK_ERRORS as error:
            if code_of(error) not in ACTIVE:
                raise translated(error, action_of(_PUT), machine["location"]) from error

    def _id(self, group: str, name: str) -> str:
        return (
            f"/subscriptions/{self._subscription}/resourceGroups/{group}"
            f"/providers/Microsoft.Resources/deployments/{name}"
        )
