"""The table of errors: each family of Google's, to the class that says what the engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
import requests
from dstack_gcp import GcpConfig
from dstack_gcp._backend import GcpBackend
from dstack_gcp._errors import DISABLED, KEYS, QUOTAS, REFUSED, SHORTAGES, THROTTLES, of_operation, translated
from google.api_core import exceptions as sdk
from google.auth import exceptions as auth
from google.protobuf import json_format  # type: ignore[import-untyped]  # it has no types

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    Instance,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
)
from dstack_core.testing import wait_until
from tests.support.gcp import Gcp
from tests.support.gcp._wire import Answer, error
from tests.support.gcp.requests import request_for

ACTION, ZONE = "compute.instances.create", "us-central1-a"
INSERT = "compute.instances.insert"


@pytest.fixture
def backend(gcp: Gcp) -> Iterator[GcpBackend]:
    """A backend for this cloud."""
    backend = GcpBackend(GcpConfig.model_validate({"type": "gcp", **gcp.config()}))
    yield backend
    backend.close()


def cheapest(backend: GcpBackend) -> Offer:
    """On demand."""
    return min((one for one in backend.dstack_list_offers(Requirements()) if not one.spot), key=lambda one: one.price)


def create(backend: GcpBackend) -> Instance:
    """Of a new intent."""
    return backend.dstack_create_instance(request_for(cheapest(backend), uuid4()))


@pytest.mark.parametrize(
    ("code", "kind", "scope"),
    [
        *((code, NoCapacityError, scope) for code, scope in SHORTAGES.items()),
        *((code, QuotaExceededError, "region") for code in sorted(QUOTAS)),
        *((code, RateLimitedError, None) for code in sorted(THROTTLES)),
        *((code, AuthenticationError, None) for code in sorted(DISABLED | REFUSED | KEYS)),
        ("BILLING_DISABLED", AuthenticationError, None),
        ("INTERNAL_ERROR", UnknownOutcomeError, None),
        ("RESOURCE_NOT_FOUND", InvalidRequestError, None),
        ("CONDITION_NOT_MET", InvalidRequestError, None),
    ],
)
def test_an_operation_that_fails(code: str, kind: type[BackendError], scope: str | None) -> None:
    """Its code says what it is; Google's words are kept."""
    found = of_operation(code, "Google's words.", ACTION, ZONE)
    assert type(found) is kind
    assert getattr(found, "scope", None) == scope
    assert all(part in str(found) for part in ("Google's words.", code, ACTION, ZONE))


def test_a_quota_of_the_whole_project_is_one_of_the_account() -> None:
    """Another region does not help."""
    found = of_operation("QUOTA_EXCEEDED", "Quota 'GPUS_ALL_REGIONS' exceeded.  Limit: 0.0 globally.", ACTION, ZONE)
    assert isinstance(found, QuotaExceededError)
    assert found.scope == "account"


@pytest.mark.parametrize(
    ("status", "reason", "words", "kind", "cure"),
    [
        (400, "invalid", "Invalid value for field 'x'", InvalidRequestError, ""),
        (401, "authError", "Invalid Credentials", AuthenticationError, "Check the key"),
        (403, "forbidden", "Required 'compute.instances.create' permission", AuthenticationError, f"Grant {ACTION}"),
        (403, "quotaExceeded", "Quota 'CPUS' exceeded. Limit: 8.0 in region x.", QuotaExceededError, "quotas"),
        (403, "rateLimitExceeded", "Rate Limit Exceeded", RateLimitedError, ""),
        (403, "userRateLimitExceeded", "Rate Limit Exceeded", RateLimitedError, ""),
        (
            403,
            "accessNotConfigured",
            "compute.googleapis.com is disabled",
            AuthenticationError,
            "gcloud services enable",
        ),
        (403, "billingNotEnabled", "No billing", AuthenticationError, "Link the project"),
        (404, "notFound", "The resource was not found", InvalidRequestError, ""),
        (412, "conditionNotMet", "No", InvalidRequestError, ""),
        (429, "tooMany", "Slower", RateLimitedError, ""),
        (500, "internalError", "Internal Error", UnknownOutcomeError, ""),
        (502, "badGateway", "Bad Gateway", UnknownOutcomeError, ""),
        (503, "backendError", "Backend Error", UnknownOutcomeError, ""),
        (503, "resourcePoolExhausted", "The zone has none", NoCapacityError, ""),
        (504, "timeout", "Gateway Timeout", UnknownOutcomeError, ""),
    ],
)
def test_what_google_answers(  # one argument for each column of the table
    gcp: Gcp, backend: GcpBackend, status: int, reason: str, words: str, kind: type[BackendError], cure: str
) -> None:
    """Over the wire, by the unmodified SDK: reason before status, and the cure behind Google's words."""
    gcp.answers[INSERT] = error(status, reason, words)
    with pytest.raises(kind) as caught:
        create(backend)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert cure in str(caught.value)
    assert gcp.url not in str(caught.value)
    assert gcp.seen[INSERT] == 1 + 2 * (status == 401)


@pytest.mark.parametrize(
    ("problem", "words", "kind"),
    [
        (auth.DefaultCredentialsError, ("none",), AuthenticationError),
        (auth.RefreshError, ("invalid_grant",), AuthenticationError),
        (auth.MalformedError, ("no key",), AuthenticationError),
        (auth.TransportError, ("no way",), RateLimitedError),
        (requests.exceptions.ConnectTimeout, ("slow",), RateLimitedError),
        (requests.exceptions.ProxyError, ("closed",), RateLimitedError),
        (requests.exceptions.ConnectionError, ("NewConnectionError(...)",), RateLimitedError),
        (requests.exceptions.ConnectionError, ("Connection aborted.",), UnknownOutcomeError),
        (requests.exceptions.ReadTimeout, ("late",), UnknownOutcomeError),
        (requests.exceptions.ChunkedEncodingError, ("half",), UnknownOutcomeError),
        (
            sdk.RetryError,
            (
                "tried",
                None,
            ),
            UnknownOutcomeError,
        ),
        (json_format.ParseError, ("no JSON",), UnknownOutcomeError),
    ],
)
def test_what_happens_on_the_way(
    problem: Callable[..., Exception], words: tuple[object, ...], kind: type[BackendError]
) -> None:
    """Whatever the SDK and what it stands on raise: nothing happened, or nobody knows."""
    assert type(translated(problem(*words), ACTION, ZONE)) is kind


def test_nobody_is_there() -> None:
    """A port where nobody listens: certainly not created."""
    gone = Gcp()
    with gone:
        config = GcpConfig.model_validate({"type": "gcp", **gone.config()})
    with pytest.raises(RateLimitedError, match="cannot be reached"):
        GcpBackend(config).dstack_list_all_instances()


@pytest.mark.parametrize(
    "answer",
    [
        {"items": {}, "unreachables": ["zones/us-west1-b"]},
        {"items": {"zones/us-west1-b": {"warning": {"code": "UNREACHABLE", "message": "us-west1-b is down"}}}},
        {"items": {"zones/us-west1-b": {"instances": 7}}},
    ],
)
def test_a_partial_listing_is_none(gcp: Gcp, backend: GcpBackend, answer: dict[str, object]) -> None:
    """Zones that did not answer, by the list or by themselves, and an answer that nobody can read."""
    gcp.answers["compute.instances.aggregatedList"] = Answer(200, answer)
    with pytest.raises(UnknownOutcomeError, match=r"us-west1-b|did not answer"):
        backend.dstack_list_all_instances()


def test_a_state_that_is_new_is_not_guessed(gcp: Gcp, backend: GcpBackend) -> None:
    """Nobody knows whether it lives."""
    made = create(backend)
    shown = gcp.server(made.ref.id).shown("a-project-1", "DREAMING")
    gcp.answers["compute.instances.get"] = Answer(200, shown)
    with pytest.raises(UnknownOutcomeError, match="DREAMING"):
        backend.dstack_get_instance(made.ref)


def test_a_key_that_nobody_can_read_is_not_shown(gcp: Gcp) -> None:
    """Its text may be a secret, and so may be what the parser says of it."""
    creds = {"type": "service_account", "data": '{"private_key": "a-secret"'}
    backend = GcpBackend(GcpConfig.model_validate({"type": "gcp", **gcp.config(), "creds": creds}))
    with pytest.raises(AuthenticationError) as caught:
        backend.dstack_list_all_instances()
    assert "a-secret" not in str(caught.value)
    assert "keys create" in str(caught.value)


def test_a_shortage_that_shows_late(gcp: Gcp, backend: GcpBackend) -> None:
    """Nobody waits for it: the instance is pending, then gone for want of capacity."""
    gcp.breaks = ("ZONE_RESOURCE_POOL_EXHAUSTED", "There is none left.", 4.0)
    request = request_for(cheapest(backend), uuid4())
    pending = backend.dstack_create_instance(request)
    assert pending.state is InstanceState.PENDING

    def gone() -> Instance | None:
        found = backend.dstack_get_instance(pending.ref)
        return found if found is not None and found.state is InstanceState.TERMINATED else None

    ended = wait_until(gone, what="the failure")
    assert ended is not None
    assert ended.reason is StateReason.NO_CAPACITY
    assert ended.ref == pending.ref


def test_a_failed_try_is_followed_by_one_other(gcp: Gcp, backend: GcpBackend) -> None:
    """A `requestId` whose operation failed is used up; whoever tries again comes to the same next one."""
    request = request_for(cheapest(backend), uuid4())
    gcp.breaks = ("ZONE_RESOURCE_POOL_EXHAUSTED", "There is none left.", 0.0)
    for _ in range(2):
        with pytest.raises(NoCapacityError, match="none left"):
            backend.dstack_create_instance(request)
    gcp.breaks = None
    assert {backend.dstack_create_instance(request).ref.id for _ in range(3)} == {request.name}
    assert gcp.seen[INSERT] == 3
    assert len(gcp.truth().servers) == 1


def test_a_failed_try_that_is_not_listed_yet(gcp: Gcp, backend: GcpBackend) -> None:
    """Google answers a used-up `requestId` with its failure: that is no answer to whoever tries again."""
    gcp.lag(3600)
    request = request_for(cheapest(backend), uuid4())
    gcp.breaks = ("ZONE_RESOURCE_POOL_EXHAUSTED", "There is none left.", 0.0)
    for _ in range(2):
        with pytest.raises(NoCapacityError, match="none left"):
            backend.dstack_create_instance(request)
    gcp.breaks = None
    assert {backend.dstack_create_instance(request).ref.id for _ in range(2)} == {request.name}
    assert len(gcp.truth().servers) == 1


def test_an_instance_that_google_forgot_the_request_of(gcp: Gcp, backend: GcpBackend) -> None:
    """Neither the `requestId` nor the operations are known any more: the name still is."""
    request = request_for(cheapest(backend), uuid4())
    first = backend.dstack_create_instance(request)
    gcp.forget_requests()
    assert backend.dstack_create_instance(request) == first
    assert len(gcp.truth().servers) == 1
