"""Every exception as an answer: `{"detail": [{"code", "msg", "fields"}]}`, readable, and without a secret.

What nobody foresaw is a 500 with a number. Under that number `server/server.log` has the whole story, again without
values.
"""

from __future__ import annotations

import json
import logging
import secrets
import traceback

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from dstack_core._server.auth import NotAllowedError
from dstack_core.errors import (
    BackendError,
    ConfigurationError,
    DstackError,
    NotFoundError,
    RunNameTakenError,
    ServerClientError,
)

log = logging.getLogger(__name__)

Detail = dict[str, object]

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (RunNameTakenError, 409),
    (ServerClientError, 400),
    (ConfigurationError, 400),
    (BackendError, 400),
)
_SECRET_FIELDS = frozenset({"env", "registry_auth", "password", "creds", "token", "repo_data"})


class TooLargeError(Exception):
    """The body of the request is over the limit."""


def refusal(exc: Exception) -> Response:
    """The answer for an exception that a handler let through."""
    if isinstance(exc, ValidationError):
        return refuse(400, [_invalid(error) for error in exc.errors(include_url=False, include_context=False)])
    if isinstance(exc, NotAllowedError):
        return refuse(401, [_detail("unauthorized", str(exc))], {"www-authenticate": "Bearer"})
    if isinstance(exc, TooLargeError):
        # What is left of the body is still on its way: this connection cannot be used again.
        return refuse(413, [_detail("too_large", str(exc))], {"connection": "close"})
    for kind, status in _STATUS:
        if isinstance(exc, kind):
            return refuse(status, [_detail(getattr(exc, "code", "error"), str(exc))])
    return _unforeseen(exc)


def no_such_route(status: int, method: str, path: str) -> Response:
    """The answer where no handler was found: most likely client and server are of different versions."""
    message = f"This server has no {method} {path}. If your client is newer than the server, upgrade the server."
    return refuse(status, [_detail("not_found", message)])


def refuse(status: int, details: list[Detail], headers: dict[str, str] | None = None) -> Response:
    """A refusal with that status."""
    return Response(json.dumps({"detail": details}), status, headers, "application/json")


def _detail(code: str, message: str, fields: tuple[str, ...] = ()) -> Detail:
    return {"code": code, "msg": message, "fields": list(fields)}


def _invalid(error: ErrorDetails) -> Detail:
    """One wrong field: its path, what is wrong, and the type that came. Never the value: it may be a secret."""
    path = ".".join(str(part) for part in error["loc"])
    what = error["msg"].removeprefix("Value error, ")
    if not _SECRET_FIELDS.isdisjoint(error["loc"]):
        what = "this value is not allowed here"
    got = "" if error["type"] in {"missing", "json_invalid"} else f" (got {_type_name(error['input'])})"
    return _detail("error", f"{path or 'body'}: {what}{got}", (path,) if path else ())


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _unforeseen(exc: Exception) -> Response:
    number = log_failure("A request failed", exc)
    foreseen = f": {exc}" if isinstance(exc, DstackError) else ""
    message = f"The server failed{foreseen}. Its log has the details: look for {number} in server/server.log."
    return refuse(500, [_detail("server_error", message)])


def log_failure(what: str, exc: BaseException) -> str:
    """Writes an exception to the log, without values that could be secret. Returns the number to find it by."""
    number = f"E-{secrets.token_hex(4)}"
    log.error("%s [%s]\n%s", what, number, describe(exc))
    return number


def describe(exc: BaseException) -> str:
    """The traceback of an exception and of its causes, with messages only where these hold no input of a user."""
    cause = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    before = f"{describe(cause)}\nwhich led to\n" if cause is not None else ""
    return f"{before}{''.join(traceback.format_tb(exc.__traceback__))}{type(exc).__name__}: {_safe_message(exc)}"


def _safe_message(exc: BaseException) -> str:
    if isinstance(exc, ValidationError):
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        return "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['type']}" for error in errors)
    original = getattr(exc, "orig", None)
    # SQLAlchemy's own text quotes the statement with its parameters, a whole run with its environment among them.
    return str(exc if original is None else original)[:2000]
