"""Where an instance goes: its subnet and security group."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from dstack_aws._account import Account
from dstack_aws._calls import action_of
from dstack_aws._config import AwsConfig
from dstack_aws._errors import SDK_ERRORS, code_of, translated
from dstack_core.plugin import InvalidRequestError, NoCapacityError

GROUP = "dstack"
_TAGS = [{"Key": "Name", "Value": GROUP}, {"Key": "managed-by", "Value": "dstack"}]


@dataclass(frozen=True)
class Network:
    """One region's network.

    Attributes:
        vpc: its id.
        subnets: id by zone.
    """

    vpc: str
    subnets: dict[str, str]

    def subnet_in(self, zone: str | None) -> str:
        """The subnet for a zone.

        Raises:
            NoCapacityError: there is none.
        """
        found = self.subnets.get(zone) if zone else next(iter(self.subnets.values()), None)
        if found is None:
            raise NoCapacityError(
                f"{self.vpc} has no subnet in {zone}. Make one, or leave the zone out of the run.", scope="zone"
            )
        return found


class Networks:
    """The networks of all regions, looked up once."""

    def __init__(self, account: Account, config: AwsConfig) -> None:
        self._account = account
        self._config = config
        self._lock = threading.Lock()
        self._known: dict[str, Network] = {}
        self._groups: dict[str, str] = {}

    def of(self, region: str) -> Network:
        """The network of a region.

        Raises:
            InvalidRequestError: there is none to use.
            BackendError: it cannot be looked up.
        """
        if region not in self._known:
            vpc = self._config.vpc or self._vpc_of_subnets(region) or self._default_vpc(region)
            self._known[region] = Network(vpc, self._subnets(region, vpc))
        return self._known[region]

    def group(self, region: str) -> str:
        """The security group of a region's instances; made if it is not there."""
        if self._config.security_group is not None:
            return self._config.security_group
        with self._lock:
            if region not in self._groups:
                vpc = self.of(region).vpc
                self._groups[region] = self.find_group(region, vpc) or self._make_group(region, vpc)
            return self._groups[region]

    def find_group(self, region: str, vpc: str) -> str | None:
        """Our security group, if it has been made."""
        filters = _filters({"vpc-id": vpc, "group-name": GROUP})
        groups = self._account.call("ec2", "describe_security_groups", region, Filters=filters)["SecurityGroups"]
        return groups[0]["GroupId"] if groups else None

    def forget(self, region: str) -> None:
        """Something of it may have been removed: looks again."""
        self._known.pop(region, None)
        self._groups.pop(region, None)

    def _vpc_of_subnets(self, region: str) -> str | None:
        if not self._config.subnets:
            return None
        found = self._account.call("ec2", "describe_subnets", region, SubnetIds=list(self._config.subnets))["Subnets"]
        vpcs = {subnet["VpcId"] for subnet in found}
        if len(vpcs) > 1:
            raise InvalidRequestError(f"`subnets` are of several networks, {', '.join(sorted(vpcs))}. Keep one's.")
        return vpcs.pop() if vpcs else None

    def _default_vpc(self, region: str) -> str:
        vpcs = self._account.call("ec2", "describe_vpcs", region, Filters=_filters({"is-default": "true"}))["Vpcs"]
        if not vpcs:
            raise InvalidRequestError(
                f"{region} has no default network. Make one (aws ec2 create-default-vpc), or set `vpc`."
            )
        return str(vpcs[0]["VpcId"])

    def _subnets(self, region: str, vpc: str) -> dict[str, str]:
        """One for each zone: the same each time, one with public addresses first where those are wanted."""
        filters = _filters({"vpc-id": vpc, "state": "available"})
        pages = self._account.pages("ec2", "describe_subnets", region, Filters=filters)
        found: list[dict[str, Any]] = [subnet for page in pages for subnet in page["Subnets"]]
        if self._config.subnets:
            found = [subnet for subnet in found if subnet["SubnetId"] in self._config.subnets]
        found.sort(
            key=lambda one: (one.get("MapPublicIpOnLaunch", False) is not self._config.public_ips, one["SubnetId"])
        )
        return {one["AvailabilityZone"]: one["SubnetId"] for one in reversed(found)}

    def _make_group(self, region: str, vpc: str) -> str:
        """Makes it; of two who do so at once, one finds that of the other."""
        try:
            made = self._account.plain_call(
                "ec2",
                "create_security_group",
                region,
                GroupName=GROUP,
                Description="Instances of dstack: SSH from anywhere, nothing else",
                VpcId=vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": _TAGS}],
            )
            group: str | None = made["GroupId"]
        except SDK_ERRORS as error:
            if not isinstance(error, ClientError) or code_of(error) != "InvalidGroup.Duplicate":
                raise translated(error, action_of("ec2", "create_security_group"), region) from error
            group = self.find_group(region, vpc)
        if group is None:
            raise InvalidRequestError(f"The security group '{GROUP}' of {vpc} is there and cannot be seen. Try again.")
        self._let_in(region, group)
        return group

    def _let_in(self, region: str, group: str) -> None:
        """SSH, from anywhere: the machine's key is known beforehand, and only our key gets in."""
        anywhere = {"IpRanges": [{"CidrIp": "0.0.0.0/0"}], "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}
        rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **anywhere}
        try:
            self._account.plain_call(
                "ec2", "authorize_security_group_ingress", region, GroupId=group, IpPermissions=[rule]
            )
        except SDK_ERRORS as error:
            if not isinstance(error, ClientError) or code_of(error) != "InvalidPermission.Duplicate":
                action = action_of("ec2", "authorize_security_group_ingress")
                raise translated(error, action, region) from error


def _filters(wanted: dict[str, str]) -> list[dict[str, Any]]:
    return [{"Name": name, "Values": [value]} for name, value in wanted.items()]
