"""The front end refuses what Google refuses: by the discovery documents, and by rules that span several fields."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support import gcp
from tests.support.gcp._discovery import google
from tests.support.gcp._rules import FIREWALL_RULES, INSTANCE_RULES, Order, problems
from tests.support.gcp._wire import EMAIL

README = Path(gcp.__file__).with_name("README.md")
ZONE = "us-central1-a"
PATH = {"project": "a-project-1", "zone": ZONE}
T4 = [{"acceleratorType": f"zones/{ZONE}/acceleratorTypes/nvidia-tesla-t4", "acceleratorCount": 1}]
N1 = f"zones/{ZONE}/machineTypes/n1-standard-4"
ARM = "projects/ubuntu-os-cloud/global/images/ubuntu-2404-noble-arm64-v20261101"
DEEP = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2204-nvidia-580"
SOON = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
LATE = (datetime.now(UTC) + timedelta(days=121)).isoformat()

GOOD: dict[str, Any] = {
    "name": "one",
    "machineType": f"zones/{ZONE}/machineTypes/e2-micro",
    "labels": {"owner": "me"},
    "disks": [
        {
            "boot": True,
            "autoDelete": True,
            "initializeParams": {
                "sourceImage": "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
                "diskSizeGb": "20",
                "diskType": f"zones/{ZONE}/diskTypes/pd-balanced",
            },
        }
    ],
    "networkInterfaces": [{"network": "global/networks/default", "accessConfigs": [{"type": "ONE_TO_ONE_NAT"}]}],
    "scheduling": {"automaticRestart": False},
}
RULE: dict[str, Any] = {
    "name": "in",
    "network": "global/networks/default",
    "direction": "INGRESS",
    "allowed": [{"IPProtocol": "tcp", "ports": ["22"]}],
    "sourceRanges": ["0.0.0.0/0"],
}


def changed(body: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The same with other values; `__` leads into the first of a list, or into an object."""
    made = copy.deepcopy(body)
    for path, value in values.items():
        *way, last = path.split("__")
        place: Any = made
        for step in way:
            place = place.setdefault(step, {})
            place = place[0] if isinstance(place, list) else place
        place[last] = value
    return made


DISK = "disks__initializeParams__"
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("the_name_is_a_label_of_dns", {"name": "One"}),
    ("the_machine_type_is_sold_in_the_zone", {"machineType": f"zones/{ZONE}/machineTypes/g2-standard-4"}),
    ("everything_of_a_zone_is_of_this_zone", {f"{DISK}diskType": "zones/us-west1-a/diskTypes/pd-balanced"}),
    ("one_disk_boots_and_it_is_the_first", {"disks__boot": False}),
    ("a_disk_is_made_or_taken", {"disks__source": "zones/z/disks/d"}),
    ("the_image_is_there", {f"{DISK}sourceImage": "projects/p/global/images/none"}),
    ("a_disk_has_room_for_its_image", {f"{DISK}sourceImage": DEEP}),
    ("a_disk_is_of_a_size_that_is_sold", {f"{DISK}diskSizeGb": "70000"}),
    ("a_disk_is_of_a_kind_that_is_sold", {f"{DISK}diskType": f"zones/{ZONE}/diskTypes/pd-golden"}),
    ("image_and_machine_are_of_one_architecture", {f"{DISK}sourceImage": ARM}),
    ("gpus_do_not_move", {"machineType": N1, "guestAccelerators": T4}),
    ("gpus_are_attached_to_n1_alone", {"guestAccelerators": T4, "scheduling__onHostMaintenance": "TERMINATE"}),
    (
        "gpus_fit_the_machine",
        {
            "machineType": N1,
            "guestAccelerators": [{**T4[0], "acceleratorCount": 3}],
            "scheduling__onHostMaintenance": "TERMINATE",
        },
    ),
    (
        "spot_does_not_move",
        {"scheduling__provisioningModel": "SPOT", "scheduling__onHostMaintenance": "MIGRATE"},
    ),
    ("spot_does_not_start_again", {"scheduling__provisioningModel": "SPOT", "scheduling__automaticRestart": True}),
    ("preemptible_means_spot", {"scheduling__preemptible": True, "scheduling__provisioningModel": "STANDARD"}),
    ("an_action_needs_an_occasion", {"scheduling__instanceTerminationAction": "DELETE"}),
    ("a_time_limit_needs_an_action", {"scheduling__terminationTime": SOON}),
    (
        "there_is_one_time_limit",
        {
            "scheduling__terminationTime": SOON,
            "scheduling__maxRunDuration": {"seconds": "60"},
            "scheduling__instanceTerminationAction": "DELETE",
        },
    ),
    (
        "a_time_limit_is_ahead",
        {"scheduling__terminationTime": LATE, "scheduling__instanceTerminationAction": "DELETE"},
    ),
    ("labels_have_their_alphabet", {"labels": {"Owner": "me"}}),
    ("metadata_are_named_once_and_fit", {"metadata": {"items": [{"key": "a", "value": "v" * 300_000}]}}),
    ("it_is_in_a_network_that_is_there", {"networkInterfaces__network": "global/networks/other"}),
    ("a_subnetwork_is_of_the_region", {"networkInterfaces__subnetwork": "regions/us-west1/subnetworks/own"}),
    ("an_interface_has_one_way_out", {"networkInterfaces__accessConfigs": [{"type": "ONE_TO_ONE_NAT"}] * 2}),
    ("network_tags_are_names", {"tags": {"items": ["One"]}}),
    ("there_is_one_service_account_with_scopes", {"serviceAccounts": [{"email": EMAIL}]}),
    ("a_request_id_is_a_uuid", {}),
]
WRONG_RULES: list[tuple[str, dict[str, Any]]] = [
    ("a_rule_allows_or_denies", {"denied": [{"IPProtocol": "udp"}]}),
    ("ports_are_of_protocols_that_have_them", {"allowed__IPProtocol": "icmp"}),
    ("sources_are_networks_and_of_what_comes_in", {"sourceRanges": ["everywhere"]}),
    ("the_network_of_a_rule_is_there", {"network": "global/networks/other"}),
]


def order(body: dict[str, Any], request_id: str | None = None) -> Order:
    """A request in the usual zone."""
    return Order(body, ZONE, request_id or str(uuid4()), ("default",))


def test_a_good_order_is_right() -> None:
    """Nothing is wrong with it, nor with a good rule."""
    assert list(problems(INSTANCE_RULES, order(GOOD))) == []
    assert list(problems(FIREWALL_RULES, order(RULE))) == []


@pytest.mark.parametrize(("name", "changes"), WRONG, ids=[name for name, _ in WRONG])
def test_each_rule_refuses(name: str, changes: dict[str, Any]) -> None:
    """What breaks this one rule, and no other one."""
    wrong = order(changed(GOOD, **changes), "nonsense" if name == "a_request_id_is_a_uuid" else None)
    assert [rule.__name__ for rule in INSTANCE_RULES if list(rule(wrong))] == [name]


@pytest.mark.parametrize(("name", "changes"), WRONG_RULES, ids=[name for name, _ in WRONG_RULES])
def test_each_rule_of_firewalls_refuses(name: str, changes: dict[str, Any]) -> None:
    """Likewise."""
    assert [rule.__name__ for rule in FIREWALL_RULES if list(rule(order(changed(RULE, **changes))))] == [name]


def test_every_rule_is_tried_and_counted() -> None:
    """Here, and in the front end's README."""
    rules = [rule.__name__ for rule in (*INSTANCE_RULES, *FIREWALL_RULES)]
    assert rules == [name for name, _ in (*WRONG, *WRONG_RULES)]
    assert f"{len(rules)} rules" in README.read_text()
    assert set(re.findall(r"^\| `(\w+)`", README.read_text(), re.MULTILINE)) == set(rules)


def refusals(verb: str, path: str, query: dict[str, str], body: Any) -> Iterator[str]:
    """What is wrong with a request, by the document alone."""
    found = google().find(verb, f"/compute/v1/{path}")
    assert found is not None
    method, values = found
    return method.problems_of_request(values, query, body)


@pytest.mark.parametrize(
    ("query", "changes", "said"),
    [
        ({}, {"colour": "red"}, 'Unknown name "colour"'),
        ({}, {"scheduling__colour": "red"}, "Unknown name"),
        ({}, {"scheduling__automaticRestart": "no"}, "is not true or false"),
        ({}, {"scheduling__provisioningModel": "CHEAP"}, "Must be one of"),
        ({}, {"disks": {}}, "not a list"),
        ({}, {"labels": {"owner": 1}}, "is no text"),
        ({}, {f"{DISK}diskSizeGb": "large"}, "is no number"),
        ({}, {f"{DISK}diskSizeGb": str(1 << 63)}, "is no int64"),
        ({}, {"status": "RUNNING"}, "only the answer has it"),
        ({}, {"name": "One"}, "Must be a match of regex"),
        ({"colour": "red"}, {}, "Cannot bind query parameter"),
    ],
)
def test_what_the_document_forbids(query: dict[str, str], changes: dict[str, Any], said: str) -> None:
    """Fields, types, numbers, words and patterns, in the body and in the query."""
    found = list(refusals("POST", f"projects/p-12345/zones/{ZONE}/instances", query, changed(GOOD, **changes)))
    assert any(said in problem for problem in found), found


def test_what_the_document_allows() -> None:
    """A good order, and a field of each size."""
    assert list(refusals("POST", f"projects/p-12345/zones/{ZONE}/instances", {"requestId": "x"}, GOOD)) == []
    assert list(refusals("GET", "projects/p-12345/aggregated/instances", {"maxResults": "500"}, None)) == []
    assert list(refusals("GET", "projects/p-12345/aggregated/instances", {"maxResults": "many"}, None))
    assert google().count > 1000
    assert google().find("GET", "/compute/v1/projects/p-12345/nothing") is None


def test_answers_are_checked_too() -> None:
    """A front end that says what Google never would is of no use."""
    found = google().find("GET", f"/compute/v1/projects/p-12345/zones/{ZONE}/instances/one")
    assert found is not None
    method, _ = found
    assert list(method.problems_of_answer({"name": "one", "status": "RUNNING"})) == []
    for wrong in ({"status": "GONE"}, {"id": "one"}, {"colour": "red"}):
        assert list(method.problems_of_answer(wrong)), wrong
