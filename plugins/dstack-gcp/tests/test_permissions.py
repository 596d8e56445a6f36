"""The role: no more and no less than what is called. And what a configuration lacks is said, with its cure."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from dstack_gcp import GcpConfig
from dstack_gcp._backend import GcpBackend
from dstack_gcp._calls import CALLS, FOR_SERVICE_ACCOUNTS, action_of, permissions, role_text
from dstack_gcp._labels import labels_of, tags_of

from dstack_core.plugin import AuthenticationError, InvalidRequestError, NoCapacityError, Offer, Requirements
from dstack_core.testing import Fault, wait_until
from tests.support.gcp import Gcp
from tests.support.gcp._wire import EMAIL
from tests.support.gcp.requests import request_for

README = Path(__file__).parents[1] / "README.md"
IMAGE = "projects/ubuntu-os-cloud/global/images/ubuntu-2404-noble-amd64-v20261101"


def backend_of(gcp: Gcp, **more: object) -> GcpBackend:
    """A backend for this cloud."""
    return GcpBackend(GcpConfig.model_validate({"type": "gcp", **gcp.config(), **more}))


def cheapest(backend: GcpBackend, *, gpus: bool = False, spot: bool = False) -> Offer:
    """Of those that can be had."""
    return min(
        (
            offer
            for offer in backend.dstack_list_offers(Requirements())
            if bool(offer.resources.gpus) is gpus and offer.spot is spot and offer.availability.worth_trying
        ),
        key=lambda offer: offer.price,
    )


def live(gcp: Gcp, **more: object) -> None:
    """Everything that a backend ever does, with GPUs and without, and once without success."""
    backend = backend_of(gcp, **more)
    assert backend.dstack_check_config() == []
    owner = uuid4()
    for gpus in (False, True):
        offer = cheapest(backend, gpus=gpus)
        gcp.fail(Fault.NO_CAPACITY)
        with pytest.raises(NoCapacityError):
            backend.dstack_create_instance(request_for(offer, owner))
        instance = backend.dstack_create_instance(request_for(offer, owner))
        assert backend.dstack_get_instance(instance.ref) is not None
        backend.dstack_get_console(instance.ref)
        assert len(backend.dstack_list_instances(owner)) == 1
        backend.dstack_terminate_instance(instance.ref)
        wait_until(lambda: not backend.dstack_list_all_instances(), what="the end")
    backend.close()


def test_the_role_is_what_is_called(gcp: Gcp) -> None:
    """The permissions that Google asked for are the role: nothing is missing, nothing is idle."""
    gcp.networks.append("own")
    live(gcp)
    live(gcp, image=IMAGE, subnetwork="own", network="own")
    assert set(gcp.used) == set(permissions())


def test_the_readme_has_the_role() -> None:
    """Word for word, as the command prints it."""
    (shown,) = re.findall(r"```yaml\n(title.*?)```", README.read_text(), re.DOTALL)
    assert shown == role_text()
    printed = subprocess.run(
        [sys.executable, "-m", "dstack_gcp"], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout == role_text()


def test_a_call_that_the_role_lacks_cannot_be_made() -> None:
    """Whoever adds a call adds it to the table."""
    with pytest.raises(LookupError, match="is not in CALLS"):
        action_of("instances", "stop_unary")


@pytest.mark.parametrize("permission", sorted({one for needed in CALLS.values() for one in needed}))
def test_a_missing_permission_is_named(gcp: Gcp, permission: str) -> None:
    """`dstack backends --check` says which permission is missing, and where to find them all."""
    gcp.denied = {permission}
    backend = backend_of(gcp)
    try:
        problems = backend.dstack_check_config()
    except AuthenticationError as error:
        problems = [str(error)]
    assert any(permission in problem and "python -m dstack_gcp" in problem for problem in problems), problems


def test_what_is_not_needed_may_be_missing(gcp: Gcp) -> None:
    """Without a rule and public addresses their permissions are not asked for; a service account needs two more."""
    unneeded = {"compute.firewalls.create", "compute.firewalls.get", "compute.networks.updatePolicy"}
    gcp.denied = {*unneeded, "compute.subnetworks.useExternalIp"}
    backend = backend_of(gcp, firewall=False, public_ips=False)
    assert backend.dstack_check_config() == []
    assert backend.dstack_create_instance(request_for(cheapest(backend), uuid4())).endpoint is not None
    gcp.denied = set(FOR_SERVICE_ACCOUNTS)
    problems = backend_of(gcp, vm_service_account=EMAIL).dstack_check_config()
    assert all(any(permission in problem for problem in problems) for permission in FOR_SERVICE_ACCOUNTS)


@pytest.mark.parametrize("api", ["compute.googleapis.com", "cloudbilling.googleapis.com"])
def test_an_api_that_is_not_enabled_is_named(gcp: Gcp, api: str) -> None:
    """With the command that enables it."""
    gcp.disabled = {api}
    backend = backend_of(gcp)
    try:
        problems = backend.dstack_check_config()
    except AuthenticationError as error:
        problems = [str(error)]
    assert any(f"gcloud services enable {api}" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"regions": ["us-central1", "asia-east1"]}, "The region asia-east1 does not exist"),
        ({"network": "other"}, "There is no network projects/a-project-1/global/networks/other"),
        ({"subnetwork": "other"}, "There is no subnetwork other in us-central1"),
        ({"image": "projects/mine/global/images/family/none"}, "was not found"),
    ],
)
def test_what_is_not_there_is_named(gcp: Gcp, more: dict[str, object], said: str) -> None:
    """And which key of the configuration says so."""
    problems = backend_of(gcp, **more).dstack_check_config()
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("metric", ["CPUS", "IN_USE_ADDRESSES", "INSTANCES"])
def test_a_quota_of_nothing_is_named(gcp: Gcp, metric: str) -> None:
    """Where it is, and where to ask for more."""
    gcp.plane.quota(f"europe-west4 {metric}", 0)
    (problem,) = backend_of(gcp).dstack_check_config()
    assert f"The quota {metric} in europe-west4 is 0" in problem
    assert "https://console.cloud.google.com/iam-admin/quotas" in problem


def test_a_file_with_a_key_is_read(gcp: Gcp, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, or by the SDK's own chain; one that is not there is named."""
    file = kept / "key.json"
    file.write_text(gcp.config()["creds"]["data"])
    mine = {"type": "service_account", "filename": str(file)}
    assert backend_of(gcp, creds=mine).dstack_check_config() == []
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert backend_of(gcp, creds={"type": "default"}).dstack_check_config() == []
    other = {"type": "service_account", "filename": str(kept / "other.json")}
    with pytest.raises(AuthenticationError, match=r"other\.json"):
        backend_of(gcp, creds=other).dstack_check_config()


def test_without_credentials_the_cure_is_said(gcp: Gcp) -> None:
    """Where nothing is configured, and nothing is in the environment."""
    with pytest.raises(AuthenticationError, match="gcloud auth application-default login"):
        backend_of(gcp, creds={"type": "default"}).dstack_check_config()


def order(gcp: Gcp, offer: Offer, backend: GcpBackend, **more: Any) -> dict[str, Any]:
    """What Google was asked for."""
    request = request_for(offer, uuid4()).model_copy(update=more)
    return gcp.server(backend.dstack_create_instance(request).ref.id).body


def test_an_instance_is_as_it_was_asked_for(gcp: Gcp) -> None:
    """Labels in the one call, on the disk as well; all that was made for it goes with it."""
    backend = backend_of(gcp, labels={"team": "web"})
    request = request_for(cheapest(backend), uuid4())
    ref = backend.dstack_create_instance(request).ref
    body = gcp.server(ref.id).body
    assert {**request.tags, "team": "web"}.items() <= body["labels"].items()
    (disk,) = body["disks"]
    assert (disk["autoDelete"], disk["initializeParams"]["diskSizeGb"]) == (True, "100")
    assert disk["initializeParams"]["labels"] == body["labels"]
    items = {item["key"]: item["value"] for item in body["metadata"]["items"]}
    assert items["user-data"] == request.user_data
    assert items["block-project-ssh-keys"] == "true"
    assert "serviceAccounts" not in body
    (rule,) = gcp.rules
    assert rule["targetTags"] == body["tags"]["items"] == ["dstack"]
    assert [(one["IPProtocol"], one["ports"]) for one in rule["allowed"]] == [("tcp", ["22"])]
    backend.dstack_terminate_instance(ref)
    wait_until(lambda: not any(server.billed for server in gcp.truth().servers), what="the end")
    assert not gcp.truth().leftovers


def test_spot_gpus_and_time_limits(gcp: Gcp) -> None:
    """Spot is deleted when it is taken away, GPUs do not move, and Google itself ends what has an end."""
    backend = backend_of(gcp)
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)
    spot = order(gcp, cheapest(backend, spot=True), backend, expires_at=None)["scheduling"]
    assert (spot["provisioningModel"], spot["instanceTerminationAction"]) == ("SPOT", "DELETE")
    assert "terminationTime" not in spot
    limited = order(gcp, cheapest(backend), backend, expires_at=ends)["scheduling"]
    assert limited["instanceTerminationAction"] == "DELETE"
    assert datetime.fromisoformat(limited["terminationTime"]) == ends
    plain = order(gcp, cheapest(backend), backend, expires_at=None)["scheduling"]
    assert "instanceTerminationAction" not in plain
    with_gpu = order(gcp, cheapest(backend, gpus=True), backend)
    assert with_gpu["scheduling"]["onHostMaintenance"] == "TERMINATE"
    (t4,) = [
        offer
        for offer in backend.dstack_list_offers(Requirements(instance_types=("n1-standard-4+2xt4",)))
        if (offer.zone, offer.spot) == ("us-central1-b", False)
    ]
    (card,) = order(gcp, t4, backend)["guestAccelerators"]
    assert card == {
        "acceleratorType": "zones/us-central1-b/acceleratorTypes/nvidia-tesla-t4",
        "acceleratorCount": 2,
    }


def test_a_private_instance_with_an_identity_in_a_network_of_ones_own(gcp: Gcp) -> None:
    """What is configured is asked for; the address is the one within the network."""
    gcp.networks.append("own")
    more = {"network": "own", "subnetwork": "own", "public_ips": False, "vm_service_account": EMAIL, "image": IMAGE}
    backend = backend_of(gcp, **more)
    made = backend.dstack_create_instance(request_for(cheapest(backend), uuid4()))
    body = gcp.server(made.ref.id).body
    (interface,) = body["networkInterfaces"]
    assert interface["subnetwork"] == "projects/a-project-1/regions/us-central1/subnetworks/own"
    assert not interface.get("accessConfigs")
    assert made.endpoint is not None
    assert str(made.endpoint.ssh_host).startswith("10.")
    assert body["serviceAccounts"][0]["email"] == EMAIL
    assert body["disks"][0]["initializeParams"]["sourceImage"] == IMAGE
    assert gcp.rules[0]["name"] != "dstack-allow-ssh"


def test_tags_are_labels_and_back() -> None:
    """Keys that a label may not have are put behind a prefix, and nothing is lost; what does not fit is refused."""
    tags = {"run": "a", "1st": "b", "-x": "c", "x-y": "d", "_z": "", "k" * 63: "v" * 63}
    labels = labels_of(tags)
    assert all(re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) for key in labels)
    assert len(labels) == len(tags)
    assert tags_of(labels) == tags
    for wrong in ({"1" + "k" * 62: "v"}, {"Key": "v"}, {"k": "V"}, {f"k{n}": "" for n in range(65)}):
        with pytest.raises(InvalidRequestError):
            labels_of(wrong)
