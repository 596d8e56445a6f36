"""The IAM policy: no more and no less than what is called."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from dstack_aws import AwsConfig
from dstack_aws._backend import AwsBackend
from dstack_aws._calls import ALONG, CALLS, action_of, actions, policy, policy_text

from dstack_core.plugin import AuthenticationError, InstanceState, Requirements
from dstack_core.testing import wait_until
from tests.support.ec2 import Ec2
from tests.support.ec2.requests import request_for

README = Path(__file__).parents[1] / "README.md"
_FREE = {"sts:GetCallerIdentity"}


def backend_of(ec2: Ec2) -> AwsBackend:
    """A backend for this cloud."""
    return AwsBackend(AwsConfig.model_validate({"type": "aws", **ec2.config()}))


def live(ec2: Ec2) -> None:
    """Everything that a backend ever does, with GPUs and without, spot and on demand."""
    backend = backend_of(ec2)
    assert backend.dstack_check_config() == []
    offers = backend.dstack_list_offers(Requirements())
    cheapest = min(offers, key=lambda offer: offer.price)
    with_gpu = min((offer for offer in offers if offer.resources.gpus), key=lambda offer: offer.price)
    owner = uuid4()
    for offer in (cheapest, with_gpu):
        instance = backend.dstack_create_instance(request_for(offer, owner))
        assert backend.dstack_get_instance(instance.ref) is not None
        backend.dstack_get_console(instance.ref)
        backend.dstack_terminate_instance(instance.ref)
    assert {one.state for one in backend.dstack_list_instances(owner)} == {InstanceState.TERMINATED}
    assert len(backend.dstack_list_all_instances()) == 2
    backend.close()


def test_the_policy_is_what_is_called(ec2: Ec2) -> None:
    """The calls that Amazon saw, and what goes along with them, are the policy: nothing is missing, nothing is idle."""
    live(ec2)
    assert set(ec2.seen) - _FREE == set(actions()) - ALONG.keys()


def test_the_readme_has_the_policy() -> None:
    """Word for word, as the command prints it."""
    (shown,) = re.findall(r"```json\n(.*?)\n```", README.read_text(), re.DOTALL)
    assert shown == policy_text()
    printed = subprocess.run(
        [sys.executable, "-m", "dstack_aws"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(printed.stdout) == policy()


def test_only_what_is_ours_may_be_ended() -> None:
    """A stolen key ends no machine of somebody else's."""
    (ending,) = [one for one in policy()["Statement"] if one["Action"] == "ec2:TerminateInstances"]
    assert ending["Condition"] == {"StringEquals": {"aws:ResourceTag/managed-by": "dstack"}}
    (passing,) = [one for one in policy("arn:aws:iam::1:role/x")["Statement"] if one["Action"] == "iam:PassRole"]
    assert passing["Resource"] == "arn:aws:iam::1:role/x"


def test_a_call_that_the_policy_lacks_cannot_be_made() -> None:
    """Whoever adds a call adds it to the table."""
    with pytest.raises(LookupError, match="is not in CALLS"):
        action_of("ec2", "reboot_instances")


# What Amazon does not try dry in a way that tells anything: there has to be a group, or a machine.
_UNTRIED = {"ec2:AuthorizeSecurityGroupIngress", "ec2:GetConsoleOutput", "ec2:TerminateInstances"}


@pytest.mark.parametrize("action", sorted({action_of(*call) for call in CALLS} - _FREE - _UNTRIED))
def test_a_missing_permission_is_named(ec2: Ec2, action: str) -> None:
    """`dstack backends --check` says which permission is missing, and where to find them all."""
    ec2.denied = {action}
    backend = backend_of(ec2)
    try:
        problems = backend.dstack_check_config()
    except AuthenticationError as error:
        problems = [str(error)]
    assert any(f"Allow {action} to this user or role" in problem for problem in problems), problems
    assert not any("Encoded authorization failure message" in problem for problem in problems)


def test_quotas_that_may_not_be_read_hide_nothing(ec2: Ec2) -> None:
    """They are found out when they are met."""
    ec2.denied = {"servicequotas:ListServiceQuotas"}
    offers = backend_of(ec2).dstack_list_offers(Requirements())
    assert all(offer.availability.worth_trying for offer in offers)


def test_a_role_is_taken_on(ec2: Ec2, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the keys of the SDK's own chain, and an external id."""
    creds = ec2.config()["creds"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", creds["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", creds["secret_key"])
    role = {"type": "role", "role_arn": "arn:aws:iam::123456789012:role/dstack", "external_id": "a-secret"}
    backend = AwsBackend(AwsConfig.model_validate({"type": "aws", **ec2.config(), "creds": role}))
    assert backend.dstack_check_config() == []
    assert ec2.seen["sts:AssumeRole"] == 1


def test_a_profile_is_read(ec2: Ec2, kept: Path) -> None:
    """Of the SDK's own files; one that is not there is named."""
    creds = ec2.config()["creds"]
    lines = ["[mine]", f"aws_access_key_id = {creds['access_key']}", f"aws_secret_access_key = {creds['secret_key']}"]
    (kept / "aws_shared_credentials_file").write_text("\n".join(lines))
    entry = {"type": "aws", **ec2.config()}
    mine = AwsBackend(AwsConfig.model_validate({**entry, "creds": {"type": "profile", "name": "mine"}}))
    assert mine.dstack_check_config() == []
    other = AwsBackend(AwsConfig.model_validate({**entry, "creds": {"type": "profile", "name": "other"}}))
    with pytest.raises(AuthenticationError, match="other"):
        other.dstack_check_config()


def test_without_credentials_the_cure_is_said(ec2: Ec2) -> None:
    """Where nothing is configured, and nothing is in the environment."""
    backend = AwsBackend(AwsConfig.model_validate({"type": "aws", **ec2.config(), "creds": {"type": "default"}}))
    with pytest.raises(AuthenticationError, match="aws configure"):
        backend.dstack_check_config()


def test_an_instance_is_as_it_was_asked_for(ec2: Ec2) -> None:
    """Tags in the one call, on the disk as well; the metadata service wants a token; a shutdown is the end."""
    backend = backend_of(ec2)
    offer = min(backend.dstack_list_offers(Requirements()), key=lambda one: one.price)
    request = request_for(offer, uuid4())
    ref = backend.dstack_create_instance(request).ref
    machine = ec2.server(ref.id)
    assert request.tags.items() <= machine.born_with.items()
    assert machine.born_with["Name"] == request.name
    assert machine.metadata_options.http_tokens == "required"
    assert machine.instance_initiated_shutdown_behavior == "terminate"
    ((_, disk),) = machine.get_block_device_mapping
    volume = machine.ec2_backend.volumes[disk.volume_id]
    assert (volume.volume_type, volume.size, disk.delete_on_termination) == ("gp3", 100, True)
    assert request.tags.items() <= {tag["key"]: tag["value"] for tag in volume.get_tags()}.items()
    (interface,) = machine.nics.values()
    assert interface.delete_on_termination
    (group,) = interface.group_set
    assert group.name == "dstack"
    assert {(rule.ip_protocol, rule.from_port, rule.to_port) for rule in group.ingress_rules} == {("tcp", 22, 22)}
    backend.dstack_terminate_instance(ref)
    wait_until(lambda: not ec2.truth().leftovers, what="the disk to go")
