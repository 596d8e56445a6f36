"""What Lambda refuses, family by family; and what it says that nobody foresaw."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from uuid import uuid4

import httpx
import pytest
from dstack_lambda import LambdaConfig
from dstack_lambda._api import _refusal
from dstack_lambda._backend import LambdaBackend
from dstack_lambda._errors import NO_INSTANCE, QUOTAS, REFUSED, SHORTAGES, translated
from dstack_lambda._instances import tags_of
from dstack_lambda._keys import key_name

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    StateReason,
    UnknownOutcomeError,
)
from dstack_core.testing import Fault, wait_until
from tests.support.ec2.requests import request_for
from tests.support.lambda_cloud import Document, LambdaCloud

LAUNCH = "instance-operations/launch/"

Make = Callable[..., LambdaBackend]


def request(backend: LambdaBackend, **changes: object) -> InstanceRequest:
    """A request for the cheapest, by a new intent."""
    offer = min((o for o in backend.dstack_list_offers() if o.availability.worth_trying), key=lambda o: o.price)
    return request_for(offer, uuid4()).model_copy(update=changes)


def started(backend: LambdaBackend) -> Instance:
    """One that runs."""
    return backend.dstack_create_instance(request(backend))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "global/invalid-api-key", AuthenticationError),
        (403, "global/account-inactive", AuthenticationError),
        (403, "global/forbidden", AuthenticationError),
        (400, "global/invalid-address", AuthenticationError),
        (400, "global/quota-exceeded", QuotaExceededError),
        (400, LAUNCH + "insufficient-capacity", NoCapacityError),
        (400, LAUNCH + "file-system-in-wrong-region", InvalidRequestError),
        (400, "global/invalid-parameters", InvalidRequestError),
        (400, "global/object-does-not-exist", InvalidRequestError),
        (404, "global/not-found", InvalidRequestError),
        (409, "global/conflict", InvalidRequestError),
        (409, "global/duplicate", InvalidRequestError),
        (418, "global/one-that-is-new", InvalidRequestError),
        (429, "global/too-many-requests", RateLimitedError),
        (429, "", RateLimitedError),
        (500, "global/internal-error", UnknownOutcomeError),
        (400, "provider/internal-unavailable", UnknownOutcomeError),
        (503, "provider/internal-unavailable", UnknownOutcomeError),
        (403, "", AuthenticationError),
        (404, "", UnknownOutcomeError),
        (502, "", UnknownOutcomeError),
        (302, "", UnknownOutcomeError),
    ],
)
def test_the_class_of_each_error(status: int, code: str, kind: type[BackendError]) -> None:
    """By Lambda's code, and by the status for what has none; with Lambda's words and its advice."""
    said = {"error": {"code": code, "message": "The words.", "suggestion": "The advice."}}
    answer = httpx.Response(status, json=said) if code else httpx.Response(status, text="<html>")
    error = translated(_refusal(answer))
    assert type(error) is kind
    if code:
        assert "The words (" in error.message
        assert "The advice" in error.message
    assert ".." not in error.message


def test_every_code_of_the_document_is_in_the_table() -> None:
    """Whatever the calls that are made may be answered with, according to Lambda, has a line above."""
    document = Document.at_hand()
    if document is None:
        pytest.skip("Lambda's OpenAPI document is not at hand: set DSTACK_LAMBDA_OPENAPI to its path")
    marks = test_the_class_of_each_error.pytestmark  # type: ignore[attr-defined]  # pytest's own
    tried = {code for _, code, _ in marks[0].args[1]}
    assert document.codes() - tried == set()
    assert tried >= SHORTAGES | QUOTAS | (REFUSED & document.codes()) | {NO_INSTANCE}


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"error": 1}', '{"error": {"code": "x"}}', "<html>Cloudflare"])
def test_a_refusal_that_cannot_be_read_has_no_code(body: str) -> None:
    """It comes from somewhere in between, and says nothing but its status."""
    said = _refusal(httpx.Response(500, text=body))
    assert (said.status, said.code) == (500, "")
    assert str(said)


@pytest.mark.parametrize(("seconds", "wait"), [("7", 7.0), ("", None), ("soon", None), ("-1", None)])
def test_the_time_to_wait_is_read(seconds: str, wait: float | None) -> None:
    """Where it is a number of seconds."""
    assert _refusal(httpx.Response(429, headers={"Retry-After": seconds})).retry_after == wait


# -- states and fields that are new -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("booting", InstanceState.PENDING, None),
        ("active", InstanceState.RUNNING, None),
        ("unhealthy", InstanceState.STOPPING, None),
        ("preempted", InstanceState.STOPPING, StateReason.SPOT_INTERRUPTION),
        ("terminating", InstanceState.STOPPING, None),
        ("terminated", InstanceState.TERMINATED, None),
        ("being-migrated", InstanceState.RUNNING, None),
    ],
)
def test_what_each_state_means(
    backend_of: Make, lambda_cloud: LambdaCloud, status: str, state: InstanceState, reason: StateReason | None
) -> None:
    """Only what is certainly gone is gone; a state that is new is taken to be billed."""
    backend = backend_of(lambda_cloud)
    ref = started(backend).ref
    lambda_cloud.boot(3600)
    lambda_cloud.strange = {"status": status}
    found = backend.dstack_get_instance(ref)
    assert found is not None
    assert (found.state, found.reason) == (state, reason)
    assert (found.endpoint is None) or state not in (InstanceState.STOPPING, InstanceState.TERMINATED)


def test_fields_that_are_new_do_no_harm(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """An instance is described with more than the document knows, and without what it calls optional."""
    backend = backend_of(lambda_cloud)
    ref = started(backend).ref
    lambda_cloud.strange = {"cluster": {"id": "x"}, "name": None, "is_reserved": False}
    found = backend.dstack_get_instance(ref)
    assert found is not None
    assert found.state is InstanceState.RUNNING


def test_an_instance_whose_tags_were_changed_is_not_ours(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Somebody removed or edited them by hand. It is not taken for gone either, until it is; and it can be ended."""
    backend = backend_of(lambda_cloud)
    made = started(backend)
    for tags in ([], [{"key": "owner", "value": "me"}], None):
        lambda_cloud.strange = {"tags": tags}
        assert backend.dstack_list_all_instances() == []
        with pytest.raises(UnknownOutcomeError, match="has lost its tags"):
            backend.dstack_get_instance(made.ref)
    backend.dstack_terminate_instance(made.ref)
    wait_until(lambda: _ended(lambda_cloud, made), what="its end")
    assert backend.dstack_get_instance(made.ref) is None


def _ended(cloud: LambdaCloud, made: Instance) -> bool:
    return not any(server.billed for server in cloud.truth().servers if server.id == made.ref.id)


def test_tags_come_back_as_they_were(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Also those whose keys Lambda would not take."""
    backend = backend_of(lambda_cloud)
    odd = {"k" * 63: "v" * 63, "with_line": "x=y", "1st": "", "a": "one letter", "empty": ""}
    asked = request(backend)
    asked = asked.model_copy(update={"tags": {**asked.tags, **odd}})
    made = backend.dstack_create_instance(asked)
    described = {"tags": lambda_cloud.instance(made.ref.id).order["tags"]}
    assert asked.tags.items() <= tags_of(described).items()


# -- creating ---------------------------------------------------------------------------------------------------------


def test_an_order_says_everything(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Name, tags, user-data, image and the one key, in the one call; nothing secret."""
    backend = backend_of(lambda_cloud, image_family="ubuntu-24-04-lts")
    asked = request(backend)
    order = lambda_cloud.instance(backend.dstack_create_instance(asked).ref.id).order
    assert (order["name"], order["hostname"], order["user_data"]) == (asked.name, asked.name, asked.user_data)
    assert order["image"] == {"family": "ubuntu-24-04-lts"}
    assert order["ssh_key_names"] == [key_name(asked.ssh_public_keys[0])]
    assert lambda_cloud.config()["api_key"] not in str(order)


def test_a_quota_is_said_with_its_cure(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """It is found out when it is met."""
    lambda_cloud.plane.quota("instances", 1)
    backend = backend_of(lambda_cloud)
    started(backend)
    with pytest.raises(QuotaExceededError, match="Ask Lambda's support for more, or wait") as caught:
        started(backend)
    assert caught.value.scope == "account"


def test_an_unknown_id_is_ended_already(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """To Lambda that is an error, to us it is success; a 404 from elsewhere is not."""
    backend = backend_of(lambda_cloud)
    ref = InstanceRef(backend="lambda", id="0" * 32, region="us-east-1")
    backend.dstack_terminate_instance(ref)
    assert backend.dstack_get_instance(ref) is None
    elsewhere = backend_of(lambda_cloud, url=f"{lambda_cloud.url}/elsewhere")
    with pytest.raises(UnknownOutcomeError):
        elsewhere.dstack_terminate_instance(ref)


def test_lambda_cannot_be_reached(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Without a connection nothing has happened, so the call is made again later."""
    backend = backend_of(lambda_cloud, url="http://127.0.0.1:9")
    with pytest.raises(RateLimitedError, match="cannot be reached"):
        backend.dstack_list_offers()


def test_what_was_prepared_for_too_long_is_not_launched(lambda_cloud: LambdaCloud) -> None:
    """The core would not hear the answer any more, so nothing is sent; the same request is made again."""
    times = iter([0.0, 1000.0])
    config = LambdaConfig.model_validate({"type": "lambda", **lambda_cloud.config()})
    slow = LambdaBackend(config, seconds=lambda: next(times))
    with closing(slow), pytest.raises(RateLimitedError, match="too slow"):
        started(slow)
    assert lambda_cloud.plane.calls("launchInstance") == 0


# -- the key ----------------------------------------------------------------------------------------------------------


def test_one_key_for_all_launches(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """It is added once, under a name that every process would choose, and found by the next."""
    first, second = backend_of(lambda_cloud), backend_of(lambda_cloud)
    for backend in (first, first, second):
        started(backend)
    assert len(lambda_cloud.keys) == 1
    assert lambda_cloud.plane.calls("addSSHKey") == 1
    assert lambda_cloud.plane.calls("listSSHKeys") == 2


def test_a_key_that_is_there_already_is_used(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """Whatever it is called, and whatever comment it has."""
    backend = backend_of(lambda_cloud)
    asked = request(backend)
    kind, key, _ = asked.ssh_public_keys[0].split()
    lambda_cloud.keys = {"other": "ssh-ed25519 AAAA", "mine": f"{kind} {key} me@home"}
    made = backend.dstack_create_instance(asked)
    assert lambda_cloud.instance(made.ref.id).order["ssh_key_names"] == ["mine"]


def test_two_who_add_the_key_at_once(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """The second is refused, finds the key, and goes on."""
    lambda_cloud.plane.latency(0.3, call="*SSHKey*")
    backends = [backend_of(lambda_cloud) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda one: started(one).ref.id, backends))) == 2
    assert len(lambda_cloud.keys) == 1


def test_a_key_whose_answer_was_lost_is_found(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """It was added, and that nobody heard of it is no obstacle."""
    backend = backend_of(lambda_cloud)
    asked = request(backend)
    lambda_cloud.plane.fail(Fault.DROP, after=True, call="addSSHKey")
    backend.dstack_create_instance(asked)
    assert len(lambda_cloud.keys) == 1


def test_a_key_that_was_removed_is_added_again(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """The launch that finds it missing is refused for certain; the next one has it."""
    backend = backend_of(lambda_cloud)
    started(backend)
    lambda_cloud.keys.clear()
    asked = request(backend)
    with pytest.raises(InvalidRequestError, match=re.escape("SSH key")):
        backend.dstack_create_instance(asked)
    backend.dstack_create_instance(asked)


def test_without_any_key_the_cure_is_said(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """A request brings none, and none is configured; with one that is, it works."""
    backend = backend_of(lambda_cloud)
    asked = request(backend, ssh_public_keys=())
    with pytest.raises(InvalidRequestError, match="set `ssh_key` to the name of one"):
        backend.dstack_create_instance(asked)
    lambda_cloud.keys = {"mine": "ssh-ed25519 AAAA"}
    backend_of(lambda_cloud, ssh_key="mine").dstack_create_instance(asked)
