"""From Google's errors to those of the contract. The words are Google's; the class says what the engine does.

Reasons and codes: the Compute Engine documentation, "Troubleshooting resource availability errors", "Allocation quotas"
and "API rate quotas", and what the API was seen to answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import requests
from google.api_core import exceptions as sdk
from google.auth import exceptions as auth
from google.protobuf import json_format  # type: ignore[import-untyped]  # it has no types

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

SDK_ERRORS = (sdk.GoogleAPIError, auth.GoogleAuthError, requests.RequestException, json_format.Error)
"""All that a call of the SDK raises: Google's errors, those on the way, and answers that nobody can read."""

# These come as the error of an operation, after the call was accepted; some as HTTP 503 or 400, too.
SHORTAGES = {
    "ZONE_RESOURCE_POOL_EXHAUSTED": "zone",
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": "zone",
    "STOCKOUT": "zone",
    "RESOURCE_POOL_EXHAUSTED": "zone",
    "resourcePoolExhausted": "zone",
    "UNSUPPORTED_OPERATION": "zone",
    "VM_MIN_COUNT_NOT_REACHED": "zone",
    "IP_SPACE_EXHAUSTED": "region",
    "IP_SPACE_EXHAUSTED_WITH_DETAILS": "region",
}
QUOTAS = frozenset({"QUOTA_EXCEEDED", "quotaExceeded", "LIMIT_EXCEEDED", "limitExceeded", "QUOTA_LIMIT_EXCEEDED"})
THROTTLES = frozenset(
    {
        "rateLimitExceeded",
        "userRateLimitExceeded",
        "concurrentLimitExceeded",
        "RATE_LIMIT_EXCEEDED",
        "operationRateExceeded",
        "OPERATION_RATE_EXCEEDED",
        "CONCURRENT_OPERATIONS_QUOTA_EXCEEDED",
    }
)
DISABLED = frozenset({"accessNotConfigured", "SERVICE_DISABLED"})
KEYS = frozenset({"required", "authError", "ACCESS_TOKEN_EXPIRED", "CREDENTIALS_MISSING"})
REFUSED = frozenset({"forbidden", "insufficientPermissions", "PERMISSIONS_ERROR", "IAM_PERMISSION_DENIED"})
_BILLING = frozenset({"billingNotEnabled", "BILLING_DISABLED", "accountDisabled", "CONSUMER_INVALID"})
_BROKEN = frozenset({"INTERNAL_ERROR", "internalError", "backendError", "RESOURCE_OPERATION_RATE_EXCEEDED"})
_GLOBAL = re.compile(r"ALL_REGIONS|globally", re.IGNORECASE)


def reasons_of(error: sdk.GoogleAPICallError) -> list[str]:
    """Google's reasons, the old kind and the new."""
    found = [str(one.get("reason", "")) for one in error.errors if isinstance(one, Mapping)]
    for detail in error.details:
        reason = detail.get("reason") if isinstance(detail, Mapping) else getattr(detail, "reason", None)
        found.append(str(reason or ""))
    return [reason for reason in found if reason]


def words_of(error: Exception) -> str:
    """Google's words."""
    said = error.message if isinstance(error, sdk.GoogleAPICallError) else str(error)
    # The SDK puts method and address in front, at which nobody has to look.
    return re.sub(r"^[A-Z]+ https?://\S+: ", "", str(said)).strip()


def translated(error: Exception, action: str, where: str) -> BackendError:
    """What an exception of the SDK means.

    Args:
        error: as the SDK raised it.
        action: the permission of the call, as `compute.instances.create`.
        where: zone, region or project.
    """
    if isinstance(error, sdk.GoogleAPICallError):
        return _answered(error, action, where)
    place = f"{action} in {where}"
    if isinstance(error, auth.GoogleAuthError):
        return _not_signed_on(error, place)
    if _unreached(error):
        return RateLimitedError(f"Google cannot be reached ({place}): {error}")
    return UnknownOutcomeError(f"Google did not answer {place}: {type(error).__name__}: {error}")


def _not_signed_on(error: auth.GoogleAuthError, place: str) -> BackendError:
    if isinstance(error, auth.TransportError):
        return RateLimitedError(f"Google's sign-on cannot be reached ({place}): {error}")
    if isinstance(error, auth.DefaultCredentialsError):
        cure = "Set `creds`, or run `gcloud auth application-default login`."
        return AuthenticationError(f"There are no usable Google credentials: {error} {cure}")
    return AuthenticationError(f"Google refuses the credentials ({place}): {error}. Renew them, or correct `creds`.")


def _unreached(error: Exception) -> bool:
    """No connection came about, so that nothing can have happened."""
    if isinstance(error, requests.exceptions.ConnectTimeout | requests.exceptions.ProxyError):
        return True
    return isinstance(error, requests.exceptions.ConnectionError) and "NewConnectionError" in repr(error)


def _answered(error: sdk.GoogleAPICallError, action: str, where: str) -> BackendError:
    reasons, status = reasons_of(error), int(error.code or 0)
    said = f"{words_of(error)} ({', '.join(dict.fromkeys(reasons)) or f'HTTP {status}'}, {action} in {where})"
    for reason in reasons:
        known = _classed(reason, said, action)
        if known is not None:
            return known
    if status == 429:
        return RateLimitedError(said, retry_after=_retry_after(error))
    if status in (401, 403):
        return AuthenticationError(f"{said}. {_cure(status, action)}")
    if status >= 500 or not status:
        return UnknownOutcomeError(f"{said}: HTTP {status}")
    return InvalidRequestError(said)


def of_operation(code: str, words: str, action: str, where: str) -> BackendError:
    """What the error of an operation means. The operation has ended: nothing of it exists."""
    said = f"{words} ({code}, {action} in {where})"
    return _classed(code, said, action) or InvalidRequestError(said)


def _classed(reason: str, said: str, action: str) -> BackendError | None:
    """What a reason alone tells; `None` if nothing."""
    if reason in SHORTAGES:
        return NoCapacityError(said, scope="region" if SHORTAGES[reason] == "region" else "zone")
    if reason in QUOTAS:
        cure = "Ask for more at https://console.cloud.google.com/iam-admin/quotas, or wait until instances have ended."
        return QuotaExceededError(f"{said}. {cure}", scope="account" if _GLOBAL.search(said) else "region")
    if reason in THROTTLES:
        return RateLimitedError(said)
    refused = _cure_of(reason, said, action)
    if refused is not None:
        return AuthenticationError(f"{said}. {refused}")
    return UnknownOutcomeError(said) if reason in _BROKEN else None


def _cure_of(reason: str, said: str, action: str) -> str | None:
    """What helps against a refusal; `None` if the reason is none."""
    if reason in DISABLED:
        return f"Enable the API: gcloud services enable {_api(said)}"
    if reason in _BILLING:
        return "Link the project to a billing account that is open."
    if reason in KEYS:
        return _cure(401, action)
    return _cure(403, action) if reason in REFUSED else None


def _api(said: str) -> str:
    named = re.search(r"\b[a-z]+\.googleapis\.com\b", said)
    return named.group() if named else "compute.googleapis.com"


def _cure(status: int, action: str) -> str:
    if status == 401:
        return "Check the key in `creds`: it was removed, or is another project's."
    return f"Grant {action} to this account; `python -m dstack_gcp` prints a role with all that is needed."


def _retry_after(error: sdk.GoogleAPICallError) -> float | None:
    headers: Any = getattr(error.response, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else None
