"""From Lambda's errors to those of the contract. The words are Lambda's; the class says what the engine does.

Codes: the API's own OpenAPI document, version 1.10.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

SHORTAGES = frozenset({"instance-operations/launch/insufficient-capacity"})
QUOTAS = frozenset({"global/quota-exceeded"})
REFUSED = frozenset(
    {
        "global/invalid-api-key",
        "global/forbidden",
        "global/account-inactive",
        "global/invalid-address",
        "global/invalid-billing-address",
    }
)
NO_INSTANCE = "global/object-does-not-exist"
_KEY = "global/invalid-api-key"
_PROVIDER = "provider/"


@dataclass(frozen=True)
class Refusal:
    """An answer of Lambda's that is no success.

    Attributes:
        status: of HTTP.
        code: Lambda's own; empty for what comes from elsewhere.
        words: Lambda's message.
        advice: what Lambda suggests, if it does.
        retry_after: seconds to wait, if it says so.
    """

    status: int
    code: str
    words: str
    advice: str = ""
    retry_after: float | None = None

    def __str__(self) -> str:
        said = f"{self.words} ({self.code or f'HTTP {self.status}'})"
        return f"{said}. {self.advice}" if self.advice else said

    @property
    def unknown(self) -> bool:
        """Whether Lambda knows nothing of this id. A bare 404 may come from anywhere."""
        return self.status == 404 and self.code == NO_INSTANCE


def translated(said: Refusal) -> BackendError:
    """What a refusal means for the engine. The code counts, and the status where there is none that says anything."""
    if said.code in SHORTAGES:
        return NoCapacityError(str(said), scope="region", retry_after=said.retry_after)
    if said.code in QUOTAS:
        cure = "Ask Lambda's support for more, or wait until instances have ended"
        return QuotaExceededError(f"{said}. {cure}.", scope="account")
    if said.code in REFUSED or said.status in (401, 403):
        return AuthenticationError(f"{said}. {_cure(said.code)}")
    return _of_status(said)


def _of_status(said: Refusal) -> BackendError:
    if said.status == 429:
        return RateLimitedError(str(said), retry_after=said.retry_after)
    # What comes from elsewhere has no code of Lambda's; what its suppliers say is between the two.
    known = said.code and not said.code.startswith(_PROVIDER)
    if known and 400 <= said.status < 500:
        return InvalidRequestError(str(said))
    return UnknownOutcomeError(f"{said}: HTTP {said.status}")


def _cure(code: str) -> str:
    if code == _KEY:
        return "Set another `api_key`: https://cloud.lambda.ai/api-keys."
    return "Look at the account's state, its billing and its team at https://cloud.lambda.ai."
