"""Whether a configuration can work: what may be done is asked for, what has to be there is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dstack_core.plugin import BackendError, MachineResources
from dstack_gcp._account import Account
from dstack_gcp._calls import permissions
from dstack_gcp._config import GcpConfig
from dstack_gcp._images import Images
from dstack_gcp._market import Mood, read_mood
from dstack_gcp._network import Networks
from dstack_gcp._prices import COMPUTE

_PLAIN = MachineResources(2, 2048)
_QUOTAS = ("INSTANCES", "IN_USE_ADDRESSES", "SSD_TOTAL_GB", "CPUS")


class Checks:
    """Reads alone; nothing is made."""

    def __init__(self, account: Account, config: GcpConfig, networks: Networks, images: Images) -> None:
        self._account = account
        self._config = config
        self._networks = networks
        self._images = images

    def problems(self) -> list[str]:
        """One sentence for each problem.

        Raises:
            BackendError: nothing can be said, since not even the credentials could be tried.
        """
        found = list(self._missing())
        self._account.call("projects", "get")
        mood = read_mood(self._account)
        found += [*self._of_regions(mood), *self._of_network()]
        found += _said(lambda: self._images.of(_PLAIN))
        found += _said(lambda: self._account.call("billing", "list_skus", parent=COMPUTE, page_size=1))
        return list(dict.fromkeys(found))

    def _missing(self) -> Iterator[str]:
        """The permissions that we lack, one sentence each."""
        wanted = permissions(service_account=self._config.vm_service_account is not None)
        granted = self._account.granted(wanted)
        for permission in wanted:
            if permission not in granted and self._needs(permission):
                yield (
                    f"The permission {permission} is missing in the project {self._account.project}: grant it to this "
                    "account; `python -m dstack_gcp` prints a role with all that is needed."
                )

    def _needs(self, permission: str) -> bool:
        """Not all is needed with each configuration."""
        if permission in ("compute.firewalls.create", "compute.networks.updatePolicy", "compute.firewalls.get"):
            return self._config.firewall
        if permission == "compute.subnetworks.useExternalIp":
            return self._config.public_ips
        return True

    def _of_regions(self, mood: Mood) -> Iterator[str]:
        there = sorted(mood.zones)
        for region in self._config.regions:
            if region not in there:
                yield f"The region {region} does not exist, or is down. There are: {', '.join(there)}."
        for region in self._config.regions or there:
            limits = mood.limits.get(region, {})
            needed = [one for one in _QUOTAS if one != "IN_USE_ADDRESSES" or self._config.public_ips]
            for metric in needed:
                if limits.get(metric, 1) < 1:
                    yield (
                        f"The quota {metric} in {region} is {limits[metric]:g}: no instance can be started there. Ask "
                        "for more at https://console.cloud.google.com/iam-admin/quotas, or leave the region out of "
                        "`regions`."
                    )

    def _of_network(self) -> Iterator[str]:
        project, config = self._config.network_project, self._config
        yield from _said(
            lambda: self._account.call("networks", "get", project=project, network=config.network_name),
            f"There is no network {config.network_path}: make one, or set `network`.",
        )
        for region in config.regions if config.subnetwork is not None else ():
            yield from _said(
                lambda region=region: self._account.call(  # type: ignore[misc]  # a default binds the loop's variable
                    "subnetworks", "get", region, project=project, region=region, subnetwork=config.subnetwork
                ),
                f"There is no subnetwork {config.subnetwork} in {region}: make one, or leave the region out.",
            )
        if config.firewall:
            yield from _said(self._networks.has_rule)


def _said(ask: Callable[[], object], missing: str | None = None) -> list[str]:
    """What is wrong, in words; in these where there is no such thing."""
    try:
        ask()
    except BackendError as error:
        said = str(error)
        return [missing if missing is not None and "was not found" in said else said]
    return []
