"""The table of errors: each family of Azure's, and of the SDK's, has its class, its words, and its cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from azure.core import exceptions as sdk
from azure.core.exceptions import AzureError
from dstack_azure import AzureConfig
from dstack_azure._account import Account
from dstack_azure._errors import is_gone, of_web, translated

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)
from tests.support.azure import Azure

ACTION = "Microsoft.Compute/virtualMachines/write"
Answered = Callable[..., sdk.HttpResponseError]


@pytest.fixture(scope="module")
def answered() -> Iterator[Answered]:
    """What the SDK raises for an answer that came over the wire: status, code, words."""
    with Azure() as azure:
        account = Account(AzureConfig.model_validate({"type": "azure", **azure.config()}))

        def ask(status: int, code: str = "", words: str = "Words.", **headers: str) -> sdk.HttpResponseError:
            azure.say(status, code, words, **headers)
            with pytest.raises(sdk.HttpResponseError) as caught:
                account.plain_call("compute.virtual_machines.get", "group", "name")
            return caught.value

        yield ask
        account.close()


@pytest.mark.parametrize(
    ("status", "code", "words", "kind", "scope"),
    [
        (409, "SkuNotAvailable", "", NoCapacityError, "zone"),
        (409, "AllocationFailed", "", NoCapacityError, "region"),
        (409, "ZonalAllocationFailed", "", NoCapacityError, "zone"),
        (409, "OverconstrainedAllocationRequest", "", NoCapacityError, "region"),
        (409, "OverconstrainedZonalAllocationRequest", "", NoCapacityError, "zone"),
        # What it is, is said by the code alone.
        (500, "AllocationFailed", "", NoCapacityError, "region"),
        (400, "SubnetIsFull", "", NoCapacityError, "region"),
        (409, "QuotaExceeded", "", QuotaExceededError, "region"),
        (409, "OperationNotAllowed", "exceeding approved Total Regional Cores quota", QuotaExceededError, "region"),
        (400, "PublicIPCountLimitReached", "", QuotaExceededError, "region"),
        (409, "OperationNotAllowed", "the server is being updated", UnknownOutcomeError, None),
        (409, "Conflict", "", UnknownOutcomeError, None),
        (412, "PreconditionFailed", "", UnknownOutcomeError, None),
        (409, "AnotherOperationInProgress", "", RateLimitedError, None),
        (429, "ReferencedResourceNotProvisioned", "", RateLimitedError, None),
        (429, "TooManyRequests", "", RateLimitedError, None),
        (429, "", "", RateLimitedError, None),
        (401, "InvalidAuthenticationToken", "", AuthenticationError, None),
        (401, "", "", AuthenticationError, None),
        (403, "AuthorizationFailed", "", AuthenticationError, None),
        (403, "RequestDisallowedByPolicy", "", AuthenticationError, None),
        (404, "SubscriptionNotFound", "", AuthenticationError, None),
        (409, "MissingSubscriptionRegistration", "", AuthenticationError, None),
        (409, "ReadOnlyDisabledSubscription", "", AuthenticationError, None),
        (400, "InvalidParameter", "", InvalidRequestError, None),
        (400, "InvalidRequestContent", "", InvalidRequestError, None),
        (404, "PlatformImageNotFound", "", InvalidRequestError, None),
        (400, "", "", InvalidRequestError, None),
        (500, "InternalServerError", "", UnknownOutcomeError, None),
        (503, "ServiceUnavailable", "", UnknownOutcomeError, None),
        (504, "GatewayTimeout", "", UnknownOutcomeError, None),
        (502, "", "", UnknownOutcomeError, None),
    ],
)
def test_the_class_of_an_answer(
    answered: Answered, status: int, code: str, words: str, kind: type[BackendError], scope: str | None
) -> None:
    """By its code first, and by its status where the code says nothing."""
    error = translated(answered(status, code, words or "Words."), ACTION, "eastus")
    assert type(error) is kind
    assert getattr(error, "scope", None) == scope
    assert (words or "Words.") in str(error) or not code
    assert f"{ACTION} in eastus" in str(error)


@pytest.mark.parametrize(
    ("code", "words", "cure"),
    [
        ("AuthorizationFailed", "to perform action 'A/b/write' over", "Allow A/b/write to this application"),
        ("AuthorizationFailed", "no.", f"Allow {ACTION} to this application"),
        (
            "LinkedAuthorizationFailed",
            "permission to perform action 'A/b/write' on; however not to perform action(s) 'C/d/join/action' on",
            "Allow C/d/join/action to this application",
        ),
        ("MissingSubscriptionRegistration", "no.", "az provider register --namespace Microsoft.Compute"),
        ("SubscriptionNotFound", "no.", "Check subscription_id"),
        ("DisabledSubscription", "no.", "has to be enabled again"),
        ("RequestDisallowedByPolicy", "no.", "policy of the organisation"),
        ("InvalidAuthenticationToken", "no.", "Check `creds`"),
    ],
)
def test_the_cure(answered: Answered, code: str, words: str, cure: str) -> None:
    """It is in the message."""
    assert cure in str(translated(answered(403, code, words), ACTION, "eastus"))


def test_how_long_to_wait(answered: Answered) -> None:
    """As Azure says."""
    error = translated(answered(429, "TooManyRequests", Retry_After="17"), ACTION, "")
    assert isinstance(error, RateLimitedError)
    assert error.retry_after == 17


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (sdk.ClientAuthenticationError("AADSTS7000215: no. Trace ID: x"), AuthenticationError),
        (sdk.ServiceRequestError("refused"), RateLimitedError),
        (sdk.ServiceRequestTimeoutError("no way there"), RateLimitedError),
        (sdk.ServiceResponseError("reset"), UnknownOutcomeError),
        (sdk.ServiceResponseTimeoutError("late"), UnknownOutcomeError),
        (sdk.IncompleteReadError("half"), UnknownOutcomeError),
        (sdk.DecodeError("what?"), UnknownOutcomeError),
        (sdk.DeserializationError("what?"), UnknownOutcomeError),
        (AzureError("something new"), UnknownOutcomeError),
    ],
)
def test_the_class_of_what_went_wrong_on_the_way(error: Exception, kind: type[BackendError]) -> None:
    """What was certainly never sent may be sent again; all else may have happened."""
    assert type(translated(error, ACTION, "eastus")) is kind


@pytest.mark.parametrize(("code", "gone"), [("ResourceNotFound", True), ("SubscriptionNotFound", False), ("", False)])
def test_what_is_gone(answered: Answered, code: str, gone: bool) -> None:
    """Only what Azure says is gone: not what cannot be looked at."""
    assert is_gone(answered(404, code)) is gone


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, RateLimitedError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, InvalidRequestError),
        (500, UnknownOutcomeError),
    ],
)
def test_the_class_of_an_answer_of_the_list_of_prices(status: int, kind: type[BackendError]) -> None:
    """Without the address, which may hold a key."""
    request = httpx.Request("GET", "https://prices/?sig=a-key")
    response = httpx.Response(status, json={"error": {"message": "Words."}}, headers={"Retry-After": "3"})
    error = of_web(httpx.HTTPStatusError("x?sig=a-key", request=request, response=response), "the list")
    assert type(error) is kind
    assert "a-key" not in str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("x"), RateLimitedError),
        (httpx.ConnectTimeout("x"), RateLimitedError),
        (httpx.ReadTimeout("x"), UnknownOutcomeError),
        (httpx.RemoteProtocolError("x"), UnknownOutcomeError),
        (ValueError("no JSON"), UnknownOutcomeError),
        (KeyError("Items"), UnknownOutcomeError),
    ],
)
def test_the_class_of_what_went_wrong_with_the_list_of_prices(error: Any, kind: type[BackendError]) -> None:
    """As for everything else."""
    assert type(of_web(error, "the list")) is kind
