"""Every call that this package makes, with the permission it needs: the policy is made of this table."""

from __future__ import annotations

import json
from typing import Any

CALLS: dict[tuple[str, str], str] = {
    ("ec2", "describe_regions"): "which regions are enabled",
    ("ec2", "describe_instance_types"): "what machines have",
    ("ec2", "describe_instance_type_offerings"): "which zone has which machines",
    ("ec2", "describe_spot_price_history"): "prices of spot instances",
    ("ec2", "describe_vpcs"): "the default network",
    ("ec2", "describe_subnets"): "subnets by zone",
    ("ec2", "describe_security_groups"): "our security group",
    ("ec2", "create_security_group"): "our security group, once for each network",
    ("ec2", "authorize_security_group_ingress"): "SSH, for our security group",
    ("ec2", "describe_images"): "the newest image, its root device and size",
    ("ec2", "run_instances"): "start",
    ("ec2", "describe_instances"): "look",
    ("ec2", "terminate_instances"): "end",
    ("ec2", "get_console_output"): "why a machine did not come up",
    ("pricing", "get_products"): "prices on demand",
    ("service-quotas", "list_service_quotas"): "how many vCPUs the account may have",
    ("ssm", "get_parameter"): "Canonical's newest image",
    ("sts", "get_caller_identity"): "whether the keys are good",
}
"""By service and method of the SDK: what it is for."""

ALONG = {
    "ec2:CreateTags": "tags in the call that starts an instance, or makes the security group",
}
"""Permissions that a call needs besides its own."""

_NO_PERMISSION = {"sts:GetCallerIdentity"}


def action_of(service: str, operation: str) -> str:
    """The IAM action of a call: `ec2:RunInstances`."""
    if (service, operation) not in CALLS:
        raise LookupError(f"{service}.{operation} is not in CALLS: the policy would lack it")
    return f"{service.replace('service-quotas', 'servicequotas')}:{''.join(map(str.capitalize, operation.split('_')))}"


def actions() -> list[str]:
    """All that must be allowed."""
    wanted = {action_of(*call) for call in CALLS} | ALONG.keys()
    return sorted(wanted - _NO_PERMISSION)


def policy(instance_profile_role: str | None = None) -> dict[str, Any]:
    """The least IAM policy. Instances can be ended only if they are ours.

    Args:
        instance_profile_role: ARN of the role of `instance_profile`, if one is configured.
    """
    guarded = "ec2:TerminateInstances"
    statements: list[dict[str, Any]] = [
        {"Effect": "Allow", "Action": [action for action in actions() if action != guarded], "Resource": "*"},
        {
            "Effect": "Allow",
            "Action": guarded,
            "Resource": "arn:aws:ec2:*:*:instance/*",
            "Condition": {"StringEquals": {"aws:ResourceTag/managed-by": "dstack"}},
        },
        {
            "Effect": "Allow",
            "Action": "iam:CreateServiceLinkedRole",
            "Resource": "arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*",
            "Condition": {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}},
        },
    ]
    if instance_profile_role is not None:
        statements.append({"Effect": "Allow", "Action": "iam:PassRole", "Resource": instance_profile_role})
    return {"Version": "2012-10-17", "Statement": statements}


def policy_text() -> str:
    """The policy as one pastes it."""
    return json.dumps(policy(), indent=2)
