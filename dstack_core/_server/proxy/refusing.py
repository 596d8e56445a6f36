"""What a client reads when no replica answers: JSON for programs, a page for people, OpenAI's form for its clients."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from http import HTTPStatus

from starlette.types import Send

Headers = list[tuple[bytes, bytes]]
Shape = Callable[["Refusal"], tuple[bytes, bytes]]
"""Makes of a refusal a media type and a body."""

RETRY_AFTER = 5
"""Seconds after which a client may ask again for a service without a ready replica."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>{refresh}
<style>body{{font-family:system-ui,sans-serif;margin:3rem auto;max-width:50rem;padding:0 1rem}}
pre{{white-space:pre-wrap;background:#8882;padding:1rem;border-radius:.5rem}}
@media (prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}}}</style></head>
<body><h1>{title}</h1><pre>{message}</pre></body></html>
"""


class Refusal(Exception):
    """The proxy answers itself.

    Args:
        status: of the answer.
        code: for programs.
        message: what is wrong and what to do; may have several lines.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = list(headers)


def as_json(refusal: Refusal) -> tuple[bytes, bytes]:
    """As the API refuses."""
    detail = {"code": refusal.code, "msg": refusal.message, "fields": []}
    return b"application/json", json.dumps({"detail": [detail]}).encode()


def as_page(refusal: Refusal) -> tuple[bytes, bytes]:
    """For people. The page of a service that is not ready loads itself again."""
    again = f'<meta http-equiv="refresh" content="{RETRY_AFTER}">' if refusal.status == 503 else ""
    title = f"{refusal.status} {HTTPStatus(refusal.status).phrase}"
    page = _PAGE.format(title=title, refresh=again, message=html.escape(refusal.message))
    return b"text/html; charset=utf-8", page.encode()


def as_openai(refusal: Refusal) -> tuple[bytes, bytes]:
    """As OpenAI's clients read it."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    param = "model" if refusal.code == "model_not_found" else None
    error = {"message": refusal.message, "type": kind, "param": param, "code": refusal.code}
    return b"application/json", json.dumps({"error": error}).encode()


def shape_for(headers: Iterable[tuple[bytes, bytes]]) -> Shape:
    """A page for who asks for HTML, JSON for all others."""
    return as_page if any(name == b"accept" and b"text/html" in value for name, value in headers) else as_json


def head_and_body(refusal: Refusal, shape: Shape) -> tuple[Headers, bytes]:
    """The headers and the body of a refusal."""
    kind, body = shape(refusal)
    headers = [
        (b"content-type", kind),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        *refusal.headers,
    ]
    return headers, body


async def send_refusal(refusal: Refusal, shape: Shape, send: Send) -> None:
    """Answers with a refusal."""
    headers, body = head_and_body(refusal, shape)
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
