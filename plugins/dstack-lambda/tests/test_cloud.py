"""The cloud of these tests: what it refuses, by hand and by Lambda's document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.lambda_cloud import Document, LambdaCloud, _rules

ORDER = {"region_name": "us-east-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["mine"]}
ARM_IMAGE = f"{5:032x}"

INVALID: dict[str, dict[str, object]] = {
    "no_unknown_field": {"quantity": 2},
    "region_type_and_key_are_given": {"region_name": None},
    "exactly_one_ssh_key": {"ssh_key_names": ["mine", "mine"]},
    "name_is_short": {"name": "n" * 65},
    "hostname_is_one": {"hostname": "No Host"},
    "user_data_is_small": {"user_data": "x" * 1_000_001},
    "tags_are_as_allowed": {"tags": [{"key": "with_line", "value": "x"}]},
    "tags_differ": {"tags": [{"key": "same", "value": "x"}] * 2},
    "image_is_by_id_or_family": {"image": {"id": "x", "family": "y"}},
}
MISSING: dict[str, dict[str, object]] = {
    "region_exists": {"region_name": "nowhere"},
    "type_exists": {"instance_type_name": "gpu_0x"},
    "ssh_key_exists": {"ssh_key_names": ["other"]},
    "image_is_of_the_region": {"image": {"id": "nowhere"}},
    "image_family_exists": {"image": {"family": "none"}},
    "image_fits_the_processor": {"image": {"id": ARM_IMAGE}},
}


@pytest.fixture
def http(lambda_cloud: LambdaCloud) -> Iterator[httpx.Client]:
    """A client with the key, of an account with an SSH key."""
    lambda_cloud.keys["mine"] = "ssh-ed25519 AAAA"
    headers = {"Authorization": f"Bearer {lambda_cloud.config()['api_key']}"}
    with httpx.Client(base_url=f"{lambda_cloud.url}/api/v1", headers=headers) as client:
        yield client


def launch(http: httpx.Client, **changes: object) -> tuple[int, dict[str, Any]]:
    """A launch that is somewhat different; `None` leaves a field out."""
    order = {key: value for key, value in {**ORDER, **changes}.items() if value is not None}
    answer = http.post("/instance-operations/launch", json=order)
    return answer.status_code, answer.json()


def test_a_launch_that_breaks_no_rule_is_accepted(http: httpx.Client) -> None:
    """As a beginning for those that do."""
    status, body = launch(http)
    assert (status, len(body["data"]["instance_ids"])) == (200, 1)


def test_each_rule_is_tried() -> None:
    """There is a line for each, and no other."""
    assert [rule.__name__ for rule in _rules.INVALID] == list(INVALID)
    assert [rule.__name__ for rule in _rules.MISSING] == list(MISSING)


@pytest.mark.parametrize("rule", [*INVALID, *MISSING])
def test_a_launch_that_breaks_a_rule_is_refused(http: httpx.Client, lambda_cloud: LambdaCloud, rule: str) -> None:
    """With the code of its kind, and nothing is made."""
    status, body = launch(http, **{**INVALID, **MISSING}[rule])
    code = "global/invalid-parameters" if rule in INVALID else "global/object-does-not-exist"
    assert (status, body["error"]["code"]) == (400, code)
    assert lambda_cloud.truth().servers == []
    lambda_cloud.wrong.clear()


@pytest.mark.parametrize("body", [{"ssh_key_names": "mine"}, {"tags": {"a": "b"}}, {"name": 1}, {"image": "x"}])
def test_what_the_document_does_not_allow_is_refused(
    http: httpx.Client, lambda_cloud: LambdaCloud, body: dict[str, object]
) -> None:
    """Wrong types, which no rule looks at."""
    if Document.at_hand() is None:
        pytest.skip("Lambda's OpenAPI document is not at hand: set DSTACK_LAMBDA_OPENAPI to its path")
    status, said = launch(http, **body)
    assert (status, said["error"]["code"]) == (400, "global/invalid-parameters")
    assert lambda_cloud.wrong
    lambda_cloud.wrong.clear()


def test_an_answer_that_the_document_does_not_allow_is_noticed(http: httpx.Client, lambda_cloud: LambdaCloud) -> None:
    """This cloud is held to it as well."""
    if Document.at_hand() is None:
        pytest.skip("Lambda's OpenAPI document is not at hand: set DSTACK_LAMBDA_OPENAPI to its path")
    _, body = launch(http)
    lambda_cloud.say(body["data"]["instance_ids"][0], "lost-in-thought")
    http.get("/instances")
    assert any("lost-in-thought" in wrong for wrong in lambda_cloud.wrong)
    lambda_cloud.wrong.clear()


def test_a_document_that_is_named_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt path is no reason to validate nothing."""
    monkeypatch.setenv("DSTACK_LAMBDA_OPENAPI", "/nowhere/at/all.json")
    with pytest.raises(FileNotFoundError):
        Document.at_hand.__wrapped__()


def test_nobody_is_let_in_without_the_key(lambda_cloud: LambdaCloud) -> None:
    """Whatever is asked."""
    answer = httpx.get(f"{lambda_cloud.url}/api/v1/instances", headers={"Authorization": "Bearer other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "global/invalid-api-key")


def test_what_it_does_not_have_is_not_found(http: httpx.Client) -> None:
    """No part of Lambda's API is answered by accident."""
    assert http.get("/file-systems").status_code == 404
    assert http.delete("/instances/1").status_code in (404, 501)
