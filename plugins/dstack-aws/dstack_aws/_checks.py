"""Whether a configuration can work: each call that a run needs is made once, or tried dry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from botocore.exceptions import ClientError

from dstack_aws._account import Account
from dstack_aws._calls import action_of
from dstack_aws._config import AwsConfig
from dstack_aws._errors import DRY, SDK_ERRORS, code_of, translated
from dstack_aws._images import Images
from dstack_aws._market import PRICING_REGION
from dstack_aws._network import GROUP, Networks
from dstack_core.plugin import BackendError, MachineResources

_PLAIN = MachineResources(2, 2048)
_SideBySide = Callable[[Callable[[str], list[str]], Iterable[str]], list[list[str]]]


class Checks:
    """Reads and dry runs; nothing is made."""

    def __init__(self, account: Account, config: AwsConfig, networks: Networks, images: Images) -> None:
        self._account = account
        self._config = config
        self._networks = networks
        self._images = images

    def problems(self, enabled: Iterable[str], side_by_side: _SideBySide) -> list[str]:
        """One sentence for each problem.

        Raises:
            BackendError: nothing can be said, since not even the credentials could be tried.
        """
        there = sorted(enabled)
        home = self._config.regions[0] if self._config.regions else there[0]
        self._account.call("sts", "get_caller_identity", home)
        missing = [region for region in self._config.regions if region not in there]
        found = [
            f"The region {region} does not exist, or is not enabled in this account. Enabled are: {', '.join(there)}."
            for region in missing
        ]
        found += self._of_account()
        wanted = [region for region in self._config.regions or there if region not in missing]
        for of_region in side_by_side(self._of_region, wanted):
            found += of_region
        return list(dict.fromkeys(found))

    def _of_account(self) -> list[str]:
        return _said(
            lambda: self._account.call(
                "pricing", "get_products", PRICING_REGION, ServiceCode="AmazonEC2", FormatVersion="aws_v1", MaxResults=1
            )
        )

    def _of_region(self, region: str) -> list[str]:
        call = self._account.call
        reads: list[Callable[[], object]] = [
            lambda: call("ec2", "describe_instance_types", region, MaxResults=5),
            lambda: call("ec2", "describe_instance_type_offerings", region, MaxResults=5),
            lambda: call("ec2", "describe_spot_price_history", region, MaxResults=5),
            lambda: call("service-quotas", "list_service_quotas", region, ServiceCode="ec2", MaxResults=5),
            lambda: call("ec2", "describe_instances", region, MaxResults=5),
        ]
        return [problem for read in [*reads, lambda: self._start_dry(region)] for problem in _said(read)]

    def _start_dry(self, region: str) -> None:
        """An instance's start, as far as it goes without making anything."""
        network = self._networks.of(region)
        image = self._images.of(region, _PLAIN)
        group = self._config.security_group or self._networks.find_group(region, network.vpc)
        interface: dict[str, Any] = {
            "DeviceIndex": 0,
            "SubnetId": network.subnet_in(None),
            "AssociatePublicIpAddress": self._config.public_ips,
        }
        if group is not None:
            interface["Groups"] = [group]
        else:
            self._dry("create_security_group", region, GroupName=GROUP, Description=GROUP, VpcId=network.vpc)
        profile = {"Name": self._config.instance_profile}
        self._dry(
            "run_instances",
            region,
            ImageId=image.id,
            InstanceType="t3.micro",
            MinCount=1,
            MaxCount=1,
            NetworkInterfaces=[interface],
            TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "managed-by", "Value": "dstack"}]}],
            **({"IamInstanceProfile": profile} if self._config.instance_profile else {}),
        )

    def _dry(self, operation: str, region: str, **params: Any) -> None:
        """EC2 says whether it would have been allowed."""
        try:
            self._account.plain_call("ec2", operation, region, DryRun=True, **params)
        except SDK_ERRORS as error:
            if not isinstance(error, ClientError) or code_of(error) != DRY:
                raise translated(error, action_of("ec2", operation), region) from error


def _said(ask: Callable[[], object]) -> list[str]:
    """What is wrong, in words."""
    try:
        ask()
    except BackendError as error:
        return [str(error)]
    return []
