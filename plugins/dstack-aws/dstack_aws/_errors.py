"""From Amazon's errors to those of the contract. The words are Amazon's; the class says what the engine does.

Codes: the EC2 API reference, "Error codes", and what the API was seen to answer.
"""

from __future__ import annotations

import re
from typing import Any

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

SDK_ERRORS = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError)
"""All that a call of the SDK raises: Amazon's errors, those on the way, and answers that nobody can read."""

# A shortage comes as HTTP 500: what it is, is said by the code alone.
SHORTAGES = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientCapacity",
        "InsufficientFreeAddressesInSubnet",
        "InsufficientAddressCapacity",
        "SpotMaxPriceTooLow",
        "Unsupported",
    }
)
"""All of them are of one zone."""
QUOTAS = frozenset(
    {
        "VcpuLimitExceeded",
        "InstanceLimitExceeded",
        "MaxSpotInstanceCountExceeded",
        "VolumeLimitExceeded",
        "MaxIOPSLimitExceeded",
        "PendingVerification",
    }
)
THROTTLES = frozenset(
    {
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "RequestThrottled",
        "RequestThrottledException",
        "TooManyRequestsException",
        "EC2ThrottledException",
        "PriorRequestNotComplete",
    }
)
REFUSED = frozenset(
    {
        "AuthFailure",
        "UnauthorizedOperation",
        "UnauthorizedAccess",
        "AccessDenied",
        "AccessDeniedException",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "SignatureDoesNotMatch",
        "IncompleteSignature",
        "InvalidSignatureException",
        "InvalidSignature",
        "MissingAuthenticationToken",
        "ExpiredToken",
        "ExpiredTokenException",
        "RequestExpired",
        "OptInRequired",
        "Blocked",
        "NotAuthorized",
    }
)
_KEYS = frozenset({"AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch"})
_OLD = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})

MISMATCH = "IdempotentParameterMismatch"
ENDED_TOKEN = "IdempotentInstanceTerminated"  # noqa: S105  # a code of an error
NO_INSTANCE = frozenset({"InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed"})
DRY = "DryRunOperation"


def code_of(error: sdk.ClientError) -> str:
    """Amazon's code."""
    return str(error.response.get("Error", {}).get("Code", ""))


def words_of(error: sdk.ClientError) -> str:
    """Amazon's words, without the encoded message that only an administrator can read."""
    said = str(error.response.get("Error", {}).get("Message", "")) or str(error)
    return re.sub(r"\s*Encoded authorization failure message: \S+", "", said).strip()


def translated(error: Exception, action: str, region: str) -> BackendError:
    """What an exception of the SDK means.

    Args:
        error: as botocore raised it.
        action: the IAM action of the call, as `ec2:RunInstances`.
        region: where it was made.
    """
    if isinstance(error, sdk.ClientError):
        return _classed(error, action, region)
    where = f"{action} in {region}"
    if isinstance(error, sdk.NoCredentialsError | sdk.PartialCredentialsError | sdk.CredentialRetrievalError):
        return AuthenticationError(
            f"There are no usable AWS credentials: {error}. Set `creds`, or run `aws configure`."
        )
    if isinstance(error, sdk.ProfileNotFound | sdk.TokenRetrievalError | sdk.SSOError | sdk.ConfigNotFound):
        return AuthenticationError(f"AWS credentials cannot be read: {error}. Correct `creds`, or run `aws sso login`.")
    if isinstance(error, sdk.ParamValidationError):
        return InvalidRequestError(f"{where} cannot be asked for: {error}")
    if isinstance(error, sdk.EndpointConnectionError | sdk.ConnectTimeoutError | sdk.ProxyConnectionError):
        return RateLimitedError(f"AWS cannot be reached ({where}): {error}")
    return UnknownOutcomeError(f"AWS did not answer {where}: {type(error).__name__}: {error}")


def _classed(error: sdk.ClientError, action: str, region: str) -> BackendError:
    code, words = code_of(error), words_of(error)
    said = f"{words} ({code}, {action} in {region})"
    if code in SHORTAGES:
        return NoCapacityError(said, scope="zone")
    if code in QUOTAS:
        cure = "Ask for more at https://console.aws.amazon.com/servicequotas, or wait until instances have ended."
        return QuotaExceededError(f"{said}. {cure}", scope="region")
    if code in THROTTLES:
        return RateLimitedError(said, retry_after=_retry_after(error.response))
    if code in REFUSED:
        return AuthenticationError(f"{said}. {_cure(code, action)}")
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if status >= 500 or not code:
        return UnknownOutcomeError(f"{said}: HTTP {status}")
    return InvalidRequestError(said)


def _cure(code: str, action: str) -> str:
    if code in _KEYS:
        return "Check the keys in `creds`."
    if code in _OLD:
        return "The credentials have expired: renew them."
    if code == "OptInRequired":
        return "Enable the region in the account, or leave it out of `regions`."
    return f"Allow {action} to this user or role; `python -m dstack_aws` prints a policy with all that is needed."


def _retry_after(response: Any) -> float | None:
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None
