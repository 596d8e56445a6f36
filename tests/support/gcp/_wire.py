"""HTTP as Google's APIs have it: who asks, and how an error is said."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import google.auth.jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from dstack_core.testing import Fault

EMAIL = "dstack@a-project-1.iam.gserviceaccount.com"


@dataclass(frozen=True)
class Answer:
    """One answer; the connection is cut where there is none."""

    status: int
    body: dict[str, Any]


class Refusal(Exception):
    """A request is refused.

    Args:
        status: of HTTP.
        reason: Google's word for it.
        message: for people.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.answer = error(status, reason, message)


_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


def error(status: int, reason: str, message: str) -> Answer:
    """An error as Compute Engine says it."""
    errors = [{"message": message, "domain": "global", "reason": reason}]
    inner = {"code": status, "message": message, "errors": errors, "status": _STATUSES.get(status, "INTERNAL")}
    if reason == "accessNotConfigured":
        kind = "type.googleapis.com/google.rpc.ErrorInfo"
        inner["details"] = [{"@type": kind, "reason": "SERVICE_DISABLED", "domain": "googleapis.com"}]
    return Answer(status, {"error": inner})


WORDS = {
    Fault.THROTTLE: (
        403,
        "rateLimitExceeded",
        "Quota exceeded for quota group 'default' and limit 'Queries per 100 seconds' of service 'compute'",
    ),
    Fault.UNAUTHORIZED: (401, "authError", "Request had invalid authentication credentials."),
    Fault.FORBIDDEN: (403, "forbidden", "Required permission is missing for 'projects/a-project-1'"),
    Fault.INVALID: (400, "invalid", "Invalid value for field 'resource.x': ''. It is refused by order."),
    Fault.SERVER_ERROR: (503, "backendError", "Backend Error"),
}
"""Status, reason and message."""
FAILED = {
    Fault.NO_CAPACITY: (
        "ZONE_RESOURCE_POOL_EXHAUSTED",
        "The zone does not have enough resources available to fulfill the request. Try a different zone.",
    ),
    Fault.QUOTA: ("QUOTA_EXCEEDED", "Quota 'CPUS' exceeded.  Limit: 24.0 in this region."),
}
"""What the error of an operation says: code and message."""


@lru_cache
def key() -> tuple[str, str]:
    """A key of a service account, private and public. Made once: it takes a while."""
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = made.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


def service_account(url: str, project: str) -> str:
    """What is in the file that people download."""
    values = {
        "type": "service_account",
        "project_id": project,
        "private_key_id": "key-1",
        "private_key": key()[0],
        "client_email": EMAIL,
        "client_id": "1",
        "token_uri": f"{url}/token",
    }
    return json.dumps(values)


@lru_cache(maxsize=256)
def is_ours(authorization: str) -> bool:
    """Whether who asks has the key: a token that it signed itself."""
    kind, _, token = authorization.partition(" ")
    try:
        claims = google.auth.jwt.decode(token, certs=key()[1])  # type: ignore[no-untyped-call]  # it has no types
    except ValueError:
        return False
    return kind == "Bearer" and claims["iss"] == EMAIL


class Listener(ThreadingHTTPServer):
    """Listens on a port of this computer.

    Args:
        answer: verb, path, query, body and `Authorization` to an answer; `None` hangs up.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[str, str, dict[str, str], Any, str], Answer | None]) -> None:
        self.answer = answer
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no error of the cloud's."""


class _Handler(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """Reads."""
        self._do("GET")

    def do_POST(self) -> None:
        """Makes."""
        self._do("POST")

    def do_DELETE(self) -> None:
        """Ends."""
        self._do("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _do(self, verb: str) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            body = json.loads(text) if text else None
        except ValueError:
            self._send(error(400, "parseError", "Parse Error"))
            return
        answer = self.server.answer(verb, url.path, query, body, self.headers.get("Authorization", ""))
        if answer is None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        text = json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
