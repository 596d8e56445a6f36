"""The role: no more and no less than what is called. And the configuration's check, which names what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from dstack_azure import AzureConfig
from dstack_azure._backend import AzureBackend
from dstack_azure._calls import action_of, actions, role, role_text
from dstack_azure._instances import launch

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    RateLimitedError,
    Requirements,
    UnknownOutcomeError,
)
from dstack_core.testing import Event, Fault, wait_until
from tests.support.azure import Azure
from tests.support.ec2.requests import request_for

README = Path(__file__).parents[1] / "README.md"


_MADE: list[AzureBackend] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What a test made is closed after it."""
    yield
    while _MADE:
        _MADE.pop().close()


def backend_of(azure: Azure, **more: Any) -> AzureBackend:
    """A backend for this cloud."""
    _MADE.append(AzureBackend(AzureConfig.model_validate({"type": "azure", **azure.config(), **more})))
    return _MADE[-1]


def cheapest(backend: AzureBackend, **more: Any) -> InstanceRequest:
    """A request for the cheapest machine."""
    offers = [offer for offer in backend.dstack_list_offers(Requirements(**more)) if offer.availability.worth_trying]
    return request_for(min(offers, key=lambda offer: offer.price), uuid4())


def gone(backend: AzureBackend, ref: InstanceRef) -> bool:
    """Ends an instance a little further."""
    backend.dstack_terminate_instance(ref)
    return backend.dstack_get_instance(ref) is None


def live(azure: Azure) -> None:
    """Everything that a backend ever does, with GPUs and without, spot and on demand."""
    backend = backend_of(azure)
    assert backend.dstack_check_config() == []
    offers = [offer for offer in backend.dstack_list_offers(Requirements()) if offer.availability.worth_trying]
    owner = uuid4()
    for wanted in (
        min(offers, key=lambda offer: offer.price),
        min((offer for offer in offers if offer.resources.gpus and not offer.spot), key=lambda offer: offer.price),
        min((offer for offer in offers if offer.spot), key=lambda offer: offer.price),
    ):
        made = backend.dstack_create_instance(request_for(wanted, owner))
        assert backend.dstack_get_instance(made.ref) is not None
        assert backend.dstack_get_console(made.ref) is not None
        wait_until(lambda ref=made.ref: gone(backend, ref), what="the end of the instance")  # type: ignore[misc]  # a default
    request = cheapest(backend)
    azure.leave_parts({**request.tags, "name": request.name}, "eastus")
    (left,) = backend.dstack_list_all_instances()
    wait_until(lambda: gone(backend, left.ref), what="the end of what was left")
    assert backend.dstack_list_instances(owner) == []


def test_the_role_is_what_is_called(azure: Azure) -> None:
    """The permissions that Azure asked for are the role: nothing is missing, nothing is idle."""
    live(azure)
    assert sorted(azure.seen) == actions()


def test_the_readme_has_the_role() -> None:
    """Word for word, as the command prints it."""
    (shown,) = re.findall(r"```json\n(.*?)\n```", README.read_text(), re.DOTALL)
    assert shown == role_text()
    command = [sys.executable, "-m", "dstack_azure", "11111111-1111-4111-8111-111111111111"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(printed.stdout) == role("11111111-1111-4111-8111-111111111111")


def test_a_call_that_the_role_lacks_cannot_be_made() -> None:
    """Whoever adds a call adds it to the table."""
    with pytest.raises(LookupError, match="is not in CALLS"):
        action_of("compute.virtual_machines.begin_restart")


@pytest.mark.parametrize("action", actions())
def test_a_missing_permission_is_named(azure: Azure, action: str) -> None:
    """`dstack backends --check` says which action is missing, and where to find them all."""
    azure.denied = {action}
    try:
        problems = backend_of(azure).dstack_check_config()
    except AuthenticationError as error:
        problems = [str(error)]
    assert any(f"Allow {action} to this application" in problem for problem in problems), problems


@pytest.mark.parametrize(
    "action",
    ["Microsoft.Compute/virtualMachines/write", "Microsoft.Network/publicIPAddresses/write"],
)
def test_a_creation_that_is_not_allowed_names_the_action(azure: Azure, action: str) -> None:
    """Also where Azure says that the call is allowed, and something that belongs to it is not."""
    backend = backend_of(azure)
    request = cheapest(backend)
    azure.denied = {action}
    with pytest.raises(AuthenticationError, match=f"Allow {action} to this application"):
        backend.dstack_create_instance(request)


def test_quotas_that_may_not_be_read_hide_nothing(azure: Azure) -> None:
    """They are found out when they are met."""
    azure.denied = {"Microsoft.Compute/locations/usages/read"}
    offers = backend_of(azure).dstack_list_offers(Requirements(instance_types=("Standard_ND96isr_H100_v5",)))
    assert offers
    assert all(offer.availability.worth_trying for offer in offers)


def test_a_provider_that_is_not_registered_is_named(azure: Azure) -> None:
    """With the command that registers it."""
    azure.unregistered = {"Microsoft.Network"}
    (problem,) = backend_of(azure).dstack_check_config()
    assert "az provider register --namespace Microsoft.Network" in problem


def test_a_quota_of_nothing_is_named(azure: Azure) -> None:
    """With its region, and where one asks for more."""
    azure.plane.quota("westeurope cores", 0)
    (problem,) = backend_of(azure).dstack_check_config()
    assert "no vCPUs in westeurope (quota cores is 0). Ask for more at https://" in problem


def test_a_region_without_machines_is_named(azure: Azure) -> None:
    """One that does not exist, as others."""
    (problem,) = backend_of(azure, regions=["eastus", "middleearth"]).dstack_check_config()
    assert "There are no machines in middleearth" in problem


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"vnet": "net/none", "regions": ["eastus"]}, "There is no network net/none"),
        ({"vnet": "dstack/dstack-eastus", "regions": ["westeurope"]}, r"is in eastus. Set `regions` to \[eastus\]"),
        ({"vnet": "dstack/dstack-eastus", "subnet": "x", "regions": ["eastus"]}, "has no subnet 'x'"),
    ],
)
def test_a_network_that_cannot_be_used_is_named(azure: Azure, entry: dict[str, Any], said: str) -> None:
    """By the check, and by whoever starts something all the same."""
    backend = backend_of(azure)
    backend.dstack_create_instance(cheapest(backend, regions=("eastus",)))
    other = backend_of(azure, **entry)
    (problem,) = other.dstack_check_config()
    assert re.search(said, problem)
    with pytest.raises(InvalidRequestError, match=said):
        other.dstack_create_instance(cheapest(other))


def test_another_secret_is_refused(azure: Azure) -> None:
    """In Microsoft's words without its ids and times, with the cure."""
    creds = {**azure.config()["creds"], "client_secret": "another"}
    with pytest.raises(AuthenticationError, match=r"Invalid client secret provided\. Check tenant_id") as caught:
        backend_of(azure, creds=creds).dstack_check_config()
    assert "Trace ID" not in str(caught.value)


def test_the_sdks_own_chain_is_used(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an application from the environment."""
    creds = azure.config()["creds"]
    for name in ("tenant_id", "client_id", "client_secret"):
        monkeypatch.setenv(f"AZURE_{name.upper()}", creds[name])
    assert backend_of(azure, creds={"type": "default"}).dstack_check_config() == []


def test_an_instance_is_as_it_was_asked_for(azure: Azure) -> None:
    """All of it in the one call: tags on each part, and each part goes with the machine."""
    backend = backend_of(azure, tags={"team": "blue"})
    request = cheapest(backend)
    ref = backend.dstack_create_instance(request).ref
    machine = azure.server(ref.id)
    assert {**request.tags, "team": "blue", "name": request.name}.items() <= machine["tags"].items()
    disk = machine["properties"]["storageProfile"]["osDisk"]
    assert (disk["deleteOption"], disk["diskSizeGB"]) == ("Delete", 128)
    (card,) = machine["properties"]["networkProfile"]["networkInterfaces"]
    interface = azure.resource("networkInterfaces", card["id"].rpartition("/")[2])
    (entry,) = interface["properties"]["ipConfigurations"]
    address = azure.resource("publicIPAddresses", entry["properties"]["publicIPAddress"]["id"].rpartition("/")[2])
    for part in (interface, address):
        assert request.tags.items() <= part["tags"].items()
    known = backend.dstack_get_instance(ref)
    assert known is not None
    assert known.endpoint is not None
    assert known.endpoint.ssh_host == address["properties"]["ipAddress"]
    (rule,) = azure.resource("networkSecurityGroups", f"dstack-{ref.region}")["properties"]["securityRules"]
    assert (rule["properties"]["destinationPortRange"], rule["properties"]["access"]) == ("22", "Allow")


def test_without_a_public_address(azure: Azure) -> None:
    """None is made, and the private one is where it is reached."""
    backend = backend_of(azure, public_ips=False)
    ref = backend.dstack_create_instance(cheapest(backend)).ref
    known = backend.dstack_get_instance(ref)
    assert known is not None
    assert known.endpoint is not None
    assert str(known.endpoint.ssh_host).startswith("10.")
    assert "Microsoft.Network/publicIPAddresses/write" not in azure.seen


def test_a_configured_network_is_used_and_none_is_made(azure: Azure) -> None:
    """By its group and name, with its first subnet if none is named."""
    first = backend_of(azure)
    first.dstack_create_instance(cheapest(first, regions=("eastus",)))
    writes = azure.seen["Microsoft.Network/virtualNetworks/write"]
    backend = backend_of(azure, vnet="dstack/dstack-eastus", regions=["eastus"], resource_group="another")
    ref = backend.dstack_create_instance(cheapest(backend)).ref
    assert ref.data == "another"
    assert azure.seen["Microsoft.Network/virtualNetworks/write"] == writes


def test_the_network_is_made_once(azure: Azure) -> None:
    """For all instances of a region, and by none of those who look."""
    for _ in range(3):
        backend = backend_of(azure)
        backend.dstack_create_instance(cheapest(backend, regions=("eastus",)))
        backend.dstack_create_instance(cheapest(backend, regions=("eastus",)))
    assert azure.seen["Microsoft.Network/virtualNetworks/write"] == 1
    assert azure.seen["Microsoft.Network/networkSecurityGroups/write"] == 1
    assert azure.seen["Microsoft.Resources/subscriptions/resourceGroups/write"] == 1


def test_a_network_that_is_made_slowly_is_waited_for(azure: Azure) -> None:
    """A little; what takes longer is for the next time, and nothing is made until then."""
    azure.slow_networks = 5
    backend = backend_of(azure)
    request = cheapest(backend)
    assert backend.dstack_create_instance(request).intent == request.intent
    azure.slow_networks = 10_000
    slow = cheapest(backend, regions=("westeurope",))
    other = backend_of(azure, polling_interval=10)
    with pytest.raises(RateLimitedError, match="is being made"):
        _without_pauses(other).dstack_create_instance(slow)
    assert [one.name for one in azure.truth().servers] == [request.name]


def _without_pauses(backend: AzureBackend) -> AzureBackend:
    backend._networks._pause = lambda _: None
    return backend


def test_a_resource_group_that_cannot_be_made_is_said(azure: Azure) -> None:
    """And no machine is asked for."""
    azure.denied = {"Microsoft.Resources/subscriptions/resourceGroups/write"}
    backend = backend_of(azure)
    with pytest.raises(AuthenticationError, match=r"Allow Microsoft\.Resources/subscriptions/resourceGroups/write"):
        backend.dstack_create_instance(cheapest(backend))
    assert not azure.truth().servers


def test_what_a_creation_left_half_way_is_listed_and_ended(azure: Azure) -> None:
    """Parts without a machine cost money, and are found by their owner."""
    backend = backend_of(azure)
    request = cheapest(backend)
    azure.leave_parts({**request.tags, "name": request.name}, "eastus", "elsewhere")
    (left,) = backend.dstack_list_instances(request.owner)
    assert (left.state, left.intent, left.ref.data) == (InstanceState.STOPPING, request.intent, "elsewhere")
    assert backend.dstack_get_instance(left.ref) == left
    wait_until(lambda: gone(backend, left.ref), what="the end of the parts")
    assert azure.truth().leftovers == []
    assert backend.dstack_list_instances(request.owner) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("AllocationFailed", "no_capacity"),
        ("ZonalAllocationFailed", "no_capacity"),
        ("OverconstrainedAllocationRequest", "no_capacity"),
        ("OSProvisioningTimedOut", "failure"),
    ],
)
def test_a_machine_that_fails_after_it_was_accepted(azure: Azure, code: str, reason: str) -> None:
    """It is on its way to the end, says whether that is for want of capacity, and leaves nothing."""
    azure.late.append(code)
    backend = backend_of(azure)
    made = backend.dstack_create_instance(cheapest(backend))
    assert made.state is InstanceState.PENDING
    known = backend.dstack_get_instance(made.ref)
    assert known is not None
    assert (known.state.value, known.reason and known.reason.value) == ("stopping", reason)
    assert f"ProvisioningState/failed/{code}: {code}: we do not have" in str(backend.dstack_get_console(made.ref))
    wait_until(lambda: gone(backend, made.ref), what="the end of the machine")
    assert not azure.truth().leftovers
    assert not azure.truth().servers


@pytest.mark.parametrize(("event", "reason"), [("spot interruption", "spot_interruption"), ("stopped", None)])
def test_what_is_deallocated_is_ended(azure: Azure, event: str, reason: str | None) -> None:
    """A spot machine that is deallocated was taken away; either has a disk that costs money until it is ended."""
    backend = backend_of(azure)
    spot = "spot" if reason else "on-demand"
    made = backend.dstack_create_instance(cheapest(backend, spot_policy=spot))
    azure.befall(made.ref.id, Event(event))
    known = backend.dstack_get_instance(made.ref)
    assert known is not None
    assert (known.state, known.reason and known.reason.value) == (InstanceState.STOPPING, reason)
    wait_until(lambda: gone(backend, made.ref), what="the end of the machine")
    assert not azure.truth().leftovers


def test_the_end_of_an_intent_is_known_to_all(azure: Azure) -> None:
    """Whoever is late with the same request gets the ended one; whoever asks otherwise is told so."""
    backend = backend_of(azure)
    request = cheapest(backend)
    made = backend.dstack_create_instance(request)
    wait_until(lambda: gone(backend, made.ref), what="the end of the machine")
    again = backend_of(azure).dstack_create_instance(request)
    assert (again.ref.id, again.state) == (made.ref.id, InstanceState.TERMINATED)
    assert abs((again.created_at - made.created_at).total_seconds()) < 1
    with pytest.raises(InvalidRequestError, match="asked for otherwise"):
        backend.dstack_create_instance(request.model_copy(update={"user_data": "#cloud-config\n{}"}))
    assert not azure.truth().servers


@pytest.mark.parametrize("part", ["networkInterfaces", "publicIPAddresses", "disks"])
def test_what_was_not_made_to_go_with_its_machine_stays(
    azure: Azure, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """As at Azure, so that a leak shows: and the next call of the end finds it by its tags."""
    monkeypatch.setattr("dstack_azure._backend.launch", lambda *args: _keeping(part, launch(*args)))
    backend = backend_of(azure)
    made = backend.dstack_create_instance(cheapest(backend))
    backend.dstack_terminate_instance(made.ref)
    wait_until(lambda: not azure.truth().servers, what="the machine to go")
    assert [one.partition(" ")[0] for one in azure.truth().leftovers] == [part]
    known = backend.dstack_get_instance(made.ref)
    assert known is not None
    assert known.state is InstanceState.STOPPING
    wait_until(lambda: gone(backend, made.ref), what="the end of what was left")
    assert not azure.truth().leftovers


def _keeping(part: str, body: dict[str, Any]) -> dict[str, Any]:
    """The same machine, but one part of it stays."""
    (card,) = body["properties"]["networkProfile"]["networkInterfaceConfigurations"]
    address = card["properties"]["ipConfigurations"][0]["properties"]["publicIPAddressConfiguration"]
    kept = {
        "networkInterfaces": card["properties"],
        "publicIPAddresses": address["properties"],
        "disks": body["properties"]["storageProfile"]["osDisk"],
    }
    kept[part]["deleteOption"] = "Detach"
    return body


def test_the_console(azure: Azure, caplog: pytest.LogCaptureFixture) -> None:
    """What the machine said; the address that Azure gives for it holds a key, and nobody writes that down."""
    caplog.set_level("DEBUG")
    backend = backend_of(azure)
    made = backend.dstack_create_instance(cheapest(backend))
    assert backend.dstack_get_console(made.ref) == f"{made.ref.id} login: "
    assert "a-key" not in caplog.text
    azure.fail(Fault.SERVER_ERROR, 1000, skip=2)
    with pytest.raises(UnknownOutcomeError) as caught:
        backend.dstack_get_console(made.ref)
    assert "a-key" not in str(caught.value)
    assert "serial console" in str(caught.value)


def test_without_the_record_nothing_is_ended(azure: Azure) -> None:
    """A machine whose end could not be written down stays: a late request would make it again."""
    backend = backend_of(azure)
    made = backend.dstack_create_instance(cheapest(backend))
    azure.denied = {"Microsoft.Resources/deployments/write"}
    with pytest.raises(BackendError, match="deployments/write"):
        backend.dstack_terminate_instance(made.ref)
    known = backend.dstack_get_instance(made.ref)
    assert known is not None
    assert known.state is InstanceState.RUNNING
