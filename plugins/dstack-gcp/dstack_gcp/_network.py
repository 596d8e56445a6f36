"""Where an instance goes: network, subnetwork, and the rule that lets SSH in."""

from __future__ import annotations

import hashlib
import threading

from google.api_core.exceptions import Conflict, NotFound

from dstack_gcp._account import Account
from dstack_gcp._calls import action_of
from dstack_gcp._config import GcpConfig
from dstack_gcp._errors import SDK_ERRORS, translated

TAG = "dstack"
"""The network tag of our instances, to which the rule is for."""


class Networks:
    """The network of the instances, whose rule is made once."""

    def __init__(self, account: Account, config: GcpConfig) -> None:
        self._account = account
        self._config = config
        self._lock = threading.Lock()
        self._ready = False

    @property
    def rule(self) -> str:
        """The name of the rule; each network has its own."""
        path = self._config.network_path
        if self._config.network_name == "default":
            return "dstack-allow-ssh"
        return f"dstack-allow-ssh-{hashlib.sha256(path.encode()).hexdigest()[:8]}"

    def interface(self, region: str) -> dict[str, object]:
        """The network interface of an instance in a region, in the SDK's terms."""
        config = self._config
        where = {"network": config.network_path}
        if config.subnetwork is not None:
            where["subnetwork"] = f"projects/{config.network_project}/regions/{region}/subnetworks/{config.subnetwork}"
        outside = [{"name": "External NAT", "type_": "ONE_TO_ONE_NAT"}] if config.public_ips else []
        return {**where, "access_configs": outside}

    def make_ready(self) -> None:
        """Makes the rule if it is wanted and not there. Another one who does so at the same time is no obstacle."""
        with self._lock:
            if self._ready or not self._config.firewall:
                return
            if not self.has_rule():
                self._make_rule()
            self._ready = True

    def forget(self) -> None:
        """The rule may have been removed: looks again."""
        self._ready = False

    def has_rule(self) -> bool:
        """Whether the rule is there."""
        try:
            self._account.plain_call("firewalls", "get", project=self._config.network_project, firewall=self.rule)
        except NotFound:
            return False
        except SDK_ERRORS as error:
            raise translated(error, action_of("firewalls", "get"), self._account.project) from error
        return True

    def _make_rule(self) -> None:
        """SSH, from anywhere: the machine's key is known beforehand, and only our key gets in."""
        rule = {
            "name": self.rule,
            "description": "Instances of dstack: SSH from anywhere, nothing else",
            "network": self._config.network_path,
            "direction": "INGRESS",
            "allowed": [{"I_p_protocol": "tcp", "ports": ["22"]}],
            "source_ranges": ["0.0.0.0/0"],
            "target_tags": [TAG],
        }
        try:
            self._account.plain_call(
                "firewalls", "insert", project=self._config.network_project, firewall_resource=rule
            )
        except Conflict:
            return
        except SDK_ERRORS as error:
            raise translated(error, action_of("firewalls", "insert"), self._account.project) from error
