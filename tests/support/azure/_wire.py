"""Requests and answers as Azure's interfaces have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from dstack_core.testing import Fault, Struck

PAGE = 25
"""Entries on a page: fewer than Azure gives, so that there is more than one."""


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        method: `GET`.
        path: without the host and what comes after the question mark.
        query: what comes after it.
        headers: by their names in small letters.
        body: as it came.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def document(self) -> Any:
        """The body, if it is JSON.

        Raises:
            Refused: it is not.
        """
        try:
            return json.loads(self.body or b"null")
        except ValueError:
            raise Refused(400, "InvalidRequestContent", "The request content was invalid.") from None


@dataclass(frozen=True)
class Answer:
    """One answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = "application/json; charset=utf-8"


class Refused(Exception):
    """Azure says no.

    Args:
        status: of HTTP.
        code: Azure's.
        words: Azure's.
    """

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(words)
        self.status, self.code, self.words = status, code, words

    def answer(self, **headers: str) -> Answer:
        """As the interface says it."""
        said = {"error": {"code": self.code, "message": self.words}}
        return Answer(
            self.status, json.dumps(said).encode(), {name.replace("_", "-"): v for name, v in headers.items()}
        )


def read(environ: Mapping[str, Any], body: bytes) -> Call:
    """A request of WSGI."""
    headers = {name[5:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
    query = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
    raw = environ.get("REQUEST_URI", environ["PATH_INFO"]).partition("?")[0]
    return Call(environ["REQUEST_METHOD"], unquote(raw), query, headers, body)


def document(values: Any, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(values).encode(), {name.replace("_", "-"): v for name, v in headers.items()})


def page(call: Call, url: str, entries: list[Any], *, following: str = "nextLink", items: str = "value") -> Answer:
    """One page of a list, with the address of the next one."""
    start = int(call.query.get("$skiptoken", 0))
    end = start + PAGE
    values: dict[str, Any] = {items: entries[start:end]}
    if end < len(entries):
        kept = "&".join(f"{name}={_quoted(value)}" for name, value in call.query.items() if name != "$skiptoken")
        values[following] = f"{url}{call.path}?{kept}&$skiptoken={end}"
    return document(values)


def _quoted(value: str) -> str:
    from urllib.parse import quote

    return quote(value, safe="")


# -- what goes wrong --------------------------------------------------------------------------------------------------

WORDS = {
    Fault.THROTTLE: (429, "TooManyRequests", "The request is being throttled as the limit has been reached."),
    Fault.NO_CAPACITY: (
        409,
        "SkuNotAvailable",
        "The requested VM size is currently not available in this location. Please try another size or zone.",
    ),
    Fault.QUOTA: (
        409,
        "OperationNotAllowed",
        "Operation could not be completed as it results in exceeding approved Total Regional Cores quota.",
    ),
    Fault.UNAUTHORIZED: (401, "InvalidAuthenticationToken", "The access token is invalid."),
    Fault.FORBIDDEN: (
        403,
        "AuthorizationFailed",
        "The client 'dstack' does not have authorization to perform action 'x/y' over scope '/subscriptions/z'.",
    ),
    Fault.INVALID: (400, "InvalidParameter", "The value of parameter x is invalid."),
    Fault.SERVER_ERROR: (500, "InternalServerError", "Encountered internal server error."),
}
"""Status, code and message."""


def struck(fault: Struck) -> Answer:
    """What Azure says to a fault."""
    refused = Refused(*WORDS[fault.fault])
    if fault.fault is Fault.THROTTLE:
        return refused.answer(Retry_After=str(max(1, round(fault.retry_after or 1))))
    return refused.answer()
