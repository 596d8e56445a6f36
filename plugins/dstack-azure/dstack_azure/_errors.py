"""From Azure's errors to those of the contract. The words are Azure's; the class says what the engine does.

Codes: "Resolve errors for resource deployments" and "Troubleshoot allocation failures" of Azure's documentation.
"""

from __future__ import annotations

import re

import httpx
from azure.core import exceptions as sdk

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

SDK_ERRORS = (sdk.AzureError,)
"""All that a call of the SDK raises: Azure's errors, those on the way, and answers that nobody can read."""

SHORTAGES = {
    "SkuNotAvailable": "zone",
    "AllocationFailed": "region",
    "ZonalAllocationFailed": "zone",
    "OverconstrainedAllocationRequest": "region",
    "OverconstrainedZonalAllocationRequest": "zone",
    "CapacityNotAvailable": "zone",
    "SpotCapacityNotAvailable": "region",
    "SubnetIsFull": "region",
    "AddressPrefixExhausted": "region",
    "AvailabilityZoneNotSupported": "zone",
}
"""With how far each of them reaches."""
QUOTAS = frozenset(
    {
        "QuotaExceeded",
        "ResourceQuotaExceeded",
        "ResourceCountExceedsLimitDueToTemplate",
        "PublicIPAddressCountLimitReached",
        "PublicIPCountLimitReached",
        "NetworkInterfaceCountExceeded",
        "SpendingLimitReached",
    }
)
_QUOTA_WORDS = re.compile(r"quota|exceeding approved|core limit", re.IGNORECASE)
"""`OperationNotAllowed` is a quota by its words only."""
THROTTLES = frozenset(
    {
        "TooManyRequests",
        "OperationNotAllowedByThrottling",
        "SubscriptionRequestsThrottled",
        "ResourceRequestsThrottled",
        "RetryableError",
        "RetryableErrorDueToAnotherOperation",
        "AnotherOperationInProgress",
        "ReferencedResourceNotProvisioned",
        "ServerBusy",
    }
)
REFUSED = frozenset(
    {
        "AuthorizationFailed",
        "LinkedAuthorizationFailed",
        "AuthenticationFailed",
        "AuthenticationFailedMissingToken",
        "AuthenticationFailedInvalidHeader",
        "InvalidAuthenticationToken",
        "InvalidAuthenticationTokenTenant",
        "ExpiredAuthenticationToken",
        "InvalidSubscriptionId",
        "SubscriptionNotFound",
        "SubscriptionNotRegistered",
        "DisabledSubscription",
        "ReadOnlyDisabledSubscription",
        "MissingSubscriptionRegistration",
        "RequestDisallowedByPolicy",
        "MarketplacePurchaseEligibilityFailed",
    }
)
_DENIED = frozenset({"AuthorizationFailed", "LinkedAuthorizationFailed"})

GONE = frozenset(
    {"ResourceNotFound", "ResourceGroupNotFound", "NotFound", "DeploymentNotFound", "ParentResourceNotFound"}
)
_UNSURE = frozenset({"OperationNotAllowed", "Conflict", "OperationPreempted", "PreconditionFailed"})
"""Something else goes on with the same name: what came of it is to be looked at."""
EXISTS = frozenset({"PreconditionFailed", "ResourceAlreadyExists", "Conflict"})
ACTIVE = frozenset({"DeploymentActive", "DeploymentBeingDeleted"})


def code_of(error: Exception) -> str:
    """Azure's code."""
    inner = getattr(error, "error", None)
    return str(getattr(inner, "code", None) or "")


def words_of(error: Exception) -> str:
    """Azure's words."""
    inner = getattr(error, "error", None)
    said = getattr(inner, "message", None) or getattr(error, "message", None) or str(error)
    return re.sub(r"\s+", " ", str(said)).strip()


def status_of(error: Exception) -> int:
    """The HTTP status; 0 without an answer."""
    return int(getattr(error, "status_code", None) or 0)


def is_gone(error: Exception) -> bool:
    """Whether Azure says that there is no such thing."""
    return status_of(error) == 404 and code_of(error) in GONE


def translated(error: Exception, action: str, at: str) -> BackendError:
    """What an exception of the SDK means.

    Args:
        error: as the SDK raised it.
        action: of the call, as `Microsoft.Compute/virtualMachines/write`.
        at: where it was made; may be empty.
    """
    where = f"{action} in {at}" if at else action
    if isinstance(error, sdk.HttpResponseError) and status_of(error):
        return _classed(error, action, where)
    if isinstance(error, sdk.ClientAuthenticationError):
        return AuthenticationError(
            f"Azure does not let this application in: {_without_trace(words_of(error))}. "
            "Check tenant_id, client_id and client_secret in `creds`, or run `az login`."
        )
    if isinstance(error, sdk.ServiceRequestError) and not isinstance(error, sdk.ServiceResponseError):
        return RateLimitedError(f"Azure cannot be reached ({where}): {words_of(error)}")
    return UnknownOutcomeError(f"Azure did not answer {where}: {type(error).__name__}: {words_of(error)}")


def _classed(error: sdk.HttpResponseError, action: str, where: str) -> BackendError:
    code, words, status = code_of(error), words_of(error), status_of(error)
    said = f"{words} ({code or f'HTTP {status}'}, {where})"
    if code in SHORTAGES:
        return _shortage(code, said)
    if code in QUOTAS or (code == "OperationNotAllowed" and _QUOTA_WORDS.search(words)):
        cure = "Ask for more at https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade."
        return QuotaExceededError(f"{said}. {cure}", scope="region")
    if code in THROTTLES or status == 429:
        return RateLimitedError(said, retry_after=_retry_after(error))
    if code in REFUSED or status in (401, 403):
        return AuthenticationError(f"{said}. {_cure(code, action, words)}")
    if status >= 500 or not 400 <= status < 600 or code in _UNSURE:
        return UnknownOutcomeError(f"{said}: HTTP {status}")
    return InvalidRequestError(said)


def _shortage(code: str, said: str) -> NoCapacityError:
    if SHORTAGES[code] == "zone":
        return NoCapacityError(said, scope="zone")
    return NoCapacityError(said, scope="region")


def _cure(code: str, action: str, words: str) -> str:
    if code in _DENIED:
        named = re.findall(r"perform (?:the )?action\(?s?\)? '([^']+)'", words)
        wanted = named[-1] if named else action
        return f"Allow {wanted} to this application; `python -m dstack_azure` prints a role with all that is needed."
    if code == "MissingSubscriptionRegistration":
        provider = action.partition("/")[0]
        return f"Run `az provider register --namespace {provider}`."
    if code in ("SubscriptionNotFound", "InvalidSubscriptionId"):
        return "Check subscription_id, and that the application has a role in it."
    if "Subscription" in code:
        return "The subscription has to be enabled again by its owner."
    if code == "RequestDisallowedByPolicy":
        return "A policy of the organisation forbids it: ask whoever is responsible for the subscription."
    return "Check `creds`."


def _retry_after(error: sdk.HttpResponseError) -> float | None:
    headers = getattr(error.response, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else None


def _without_trace(words: str) -> str:
    """Microsoft's login adds ids and times of which nobody here can make anything."""
    return re.sub(r"\s*(Trace|Correlation) ID:.*", "", words).strip().rstrip(".")


def of_web(error: Exception, what: str) -> BackendError:
    """What an exception of httpx means. Addresses are left out: some hold a key."""
    if isinstance(error, httpx.HTTPStatusError):
        return of_status(error.response, what)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return RateLimitedError(f"Azure cannot be reached for {what}: {type(error).__name__}")
    return UnknownOutcomeError(f"Azure did not answer for {what}: {type(error).__name__}")


def of_status(response: httpx.Response, what: str) -> BackendError:
    """What an answer of httpx means that is not a good one."""
    status = response.status_code
    said = f"Azure answered HTTP {status} for {what}: {_said_in(response)}"
    if status == 429:
        after = response.headers.get("Retry-After", "")
        return RateLimitedError(said, retry_after=float(after) if after.isdecimal() else None)
    if status in (401, 403):
        return AuthenticationError(said)
    if status < 500:
        return InvalidRequestError(said)
    return UnknownOutcomeError(said)


def _said_in(response: httpx.Response) -> str:
    """The message of an error, if there is one."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.reason_phrase
