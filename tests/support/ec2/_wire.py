"""Requests and answers as Amazon's protocols have them, signatures included."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from dstack_core.testing import Fault

_SCOPE = re.compile(r"Credential=([^/]+)/\d+/([^/]+)/([^/]+)/aws4_request, *SignedHeaders=([^,]+), *Signature=(\w+)")


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        service: as its signature names it.
        region: likewise.
        action: `RunInstances`.
        form: the parameters, of a service that takes a form.
        json: the parameters, of a service that takes JSON.
        body: as it came.
    """

    service: str
    region: str
    action: str
    form: dict[str, str]
    json: dict[str, Any]
    body: bytes

    @property
    def name(self) -> str:
        """`ec2:RunInstances`, as permissions are named."""
        return f"{self.service}:{self.action}"

    @property
    def dry(self) -> bool:
        """Only asks whether it may."""
        return self.form.get("DryRun") == "true"


@dataclass(frozen=True)
class Answer:
    """One answer."""

    status: int
    body: bytes
    type: str = "text/xml"


class BadSignature(Exception):
    """Whoever signed this does not have the key."""


def read(environ: Mapping[str, Any], body: bytes, keys: Mapping[str, str]) -> Call:
    """A request, if it is signed with one of the keys.

    Raises:
        BadSignature: it is not.
    """
    found = _SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
    if found is None:
        raise BadSignature("not signed")
    key, region, service, signed, signature = found.groups()
    form, document = {}, {}
    target = environ.get("HTTP_X_AMZ_TARGET")
    if target:
        document, action = json.loads(body or b"{}"), target.rpartition(".")[2]
    else:
        form = dict(parse_qsl(body.decode(), keep_blank_values=True))
        action = form.get("Action", "")
    wanted = _signature(environ, body, Credentials(key, keys.get(key, "")), region, service, signed.split(";"))
    if key not in keys or not hmac.compare_digest(wanted, signature):
        raise BadSignature(f"the key {key} did not sign this")
    return Call(service, region, action, form, document, body)


def _signature(
    environ: Mapping[str, Any], body: bytes, who: Credentials, region: str, service: str, signed: list[str]
) -> str:
    names = {"content-type": "CONTENT_TYPE", "content-length": "CONTENT_LENGTH"}
    headers = {name: environ[names.get(name, "HTTP_" + name.upper().replace("-", "_"))] for name in signed}
    url = f"http://{environ['HTTP_HOST']}{environ['PATH_INFO']}"
    request = AWSRequest(environ["REQUEST_METHOD"], url, headers=headers, data=body)
    request.context["timestamp"] = environ["HTTP_X_AMZ_DATE"]
    signer = SigV4Auth(who, service, region)
    canonical = signer.canonical_request(request)
    return str(signer.signature(signer.string_to_sign(request, canonical), request))


def with_form(call: Call, **changes: str) -> bytes:
    """The body of the same call with other parameters."""
    return urlencode({**call.form, **changes}).encode()


# -- what goes wrong --------------------------------------------------------------------------------------------------

WORDS = {
    Fault.THROTTLE: (503, "RequestLimitExceeded", "Request limit exceeded."),
    Fault.NO_CAPACITY: (
        500,
        "InsufficientInstanceCapacity",
        "We currently do not have sufficient capacity in the Availability Zone you requested.",
    ),
    Fault.QUOTA: (
        400,
        "VcpuLimitExceeded",
        "You have requested more vCPU capacity than your current vCPU limit allows for this instance bucket.",
    ),
    Fault.UNAUTHORIZED: (401, "AuthFailure", "AWS was not able to validate the provided access credentials"),
    Fault.FORBIDDEN: (
        403,
        "UnauthorizedOperation",
        "You are not authorized to perform this operation. Encoded authorization failure message: zsQ4YWhGnLUQ2",
    ),
    Fault.INVALID: (400, "InvalidParameterValue", "Invalid value 'x' for parameter"),
    Fault.SERVER_ERROR: (500, "InternalError", "An internal error has occurred"),
}
"""Status, code and message."""

_JSON_CODES = {
    "RequestLimitExceeded": (400, "ThrottlingException"),
    "UnauthorizedOperation": (400, "AccessDeniedException"),
}


def struck(call: Call, fault: Fault) -> Answer:
    """What Amazon says to a fault."""
    return error(call, *WORDS[fault])


def error(call: Call, status: int, code: str, message: str) -> Answer:
    """An error, in the protocol of the service."""
    if call.json or not call.form:
        status, code = _JSON_CODES.get(code, (status, code))
        return Answer(status, json.dumps({"__type": code, "message": message}).encode(), "application/x-amz-json-1.1")
    inner = f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message></Error>"
    text = f"<Response><Errors>{inner}</Errors><RequestID>r</RequestID></Response>"
    if call.service != "ec2":
        text = f"<ErrorResponse>{inner}<RequestId>r</RequestId></ErrorResponse>"
    return Answer(status, text.encode())


def document(values: Mapping[str, Any]) -> Answer:
    """An answer in JSON."""
    return Answer(200, json.dumps(values).encode(), "application/x-amz-json-1.1")


def items(call: Call, name: str, entries: list[dict[str, str]], token: str | None = None) -> Answer:
    """An answer of EC2 that is one list."""
    inner = "".join(
        "<item>" + "".join(f"<{key}>{escape(value)}</{key}>" for key, value in entry.items()) + "</item>"
        for entry in entries
    )
    more = f"<nextToken>{escape(token)}</nextToken>" if token else ""
    action = f"{call.action}Response"
    text = f'<{action} xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><{name}>{inner}</{name}>{more}</{action}>'
    return Answer(200, text.encode())
