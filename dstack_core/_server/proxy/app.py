"""Services over HTTP: one application for `/services/…` and `/models/…`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from dstack_core._server.hangup import HANGUP, Hangup
from dstack_core._server.proxy.access import Access, Visitor
from dstack_core._server.proxy.asking import Asking, Exchange, Outgoing
from dstack_core._server.proxy.contract import Directory, ServiceView
from dstack_core._server.proxy.heads import Header, response_headers
from dstack_core._server.proxy.incoming import ClientGoneError, Incoming, read_whole
from dstack_core._server.proxy.models import BODY_LIMIT, find_model, model_document, unknown_model, wanted_model
from dstack_core._server.proxy.refusing import Refusal, as_openai, head_and_body, shape_for
from dstack_core._server.proxy.targets import MODELS, SERVICES, Rewriting, Target, model_target, service_target
from dstack_core._server.proxy.upstream import Broken
from dstack_core._server.refusals import log_failure
from dstack_core.errors import NotFoundError

log = logging.getLogger(__name__)

PATHS = (SERVICES, MODELS)
"""How the paths begin that are answered here."""
CLOSE = (b"connection", b"close")


@dataclass(frozen=True, slots=True)
class Direct:
    """An answer that needs no replica."""

    status: int
    headers: list[Header]
    body: bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A replica has answered: what is left is to pass the answer on."""

    exchange: Exchange
    rewriting: Rewriting | None


class Proxy:
    """The application. One per server process.

    Args:
        directory: which services there are.
        access: who may in.

    Attributes:
        asking: what asks replicas.
        access: who may in.
    """

    def __init__(self, directory: Directory, access: Access) -> None:
        self._directory = directory
        self.access = access
        self.asking = Asking(directory)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; ends at once, and lets go of the replica, when the client hangs up."""
        hangup: Hangup = scope["state"][HANGUP]
        if hangup.lost:
            return
        hangup.task = asyncio.current_task()
        try:
            await self._serve(scope, receive, send)
        except asyncio.CancelledError:
            if not hangup.lost:
                raise
        finally:
            hangup.task = None

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(scope, receive)
        if isinstance(answer, Direct):
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await send({"type": "http.response.body", "body": answer.body})
        elif answer is not None:
            try:
                await _pass_on(answer, send)
            finally:
                answer.exchange.close()

    async def _answer(self, scope: Scope, receive: Receive) -> Direct | Asked | None:
        """What to answer; `None` if there is nobody left to answer to."""
        models = scope["raw_path"].startswith(MODELS)
        try:
            return await (self._model(scope, receive) if models else self._service(scope, receive))
        except ClientGoneError:
            return None
        except Exception as exc:  # noqa: BLE001  # the last line of defence: becomes an answer, and a line in the log
            refusal = as_refusal(exc)
            headers, body = head_and_body(refusal, as_openai if models else shape_for(scope["headers"]))
            return Direct(refusal.status, headers + _closing(scope["headers"]), body)

    # ------------------------------------------------------------------------------------------------- services --

    async def _service(self, scope: Scope, receive: Receive) -> Direct | Asked:
        visitor = self.access.visitor(scope["state"], scope["headers"])
        target, view = await self.find(scope["raw_path"], scope["query_string"], visitor)
        if target.rest is None:
            raise missing_slash(target, scope["query_string"])
        incoming = Incoming.of(scope, visitor)
        outgoing = await incoming.outgoing(*inner(target, view), receive)
        exchange = await self.asking.ask(view, outgoing, tell=visitor.known)
        return Asked(exchange, incoming.rewriting(target, strips=view.strip_prefix))

    async def find(self, path: bytes, query: bytes, visitor: Visitor) -> tuple[Target, ServiceView]:
        """The service that a path belongs to. Raises `Refusal`; a stranger does not learn which services there are."""
        target = service_target(path, query)
        if target is None:
            visitor.admit()
            raise Refusal(404, "not_found", "Services are at /services/PROJECT/RUN/, with both names in plain letters.")
        try:
            view = await self._directory.find(target.project, target.name)
        except NotFoundError:
            visitor.admit()
            raise
        if view.auth:
            visitor.admit()
        return target, view

    # --------------------------------------------------------------------------------------------------- models --

    async def _model(self, scope: Scope, receive: Receive) -> Direct | Asked:
        visitor = self.access.visitor(scope["state"], scope["headers"])
        target = model_target(scope["raw_path"])
        if target is None:
            visitor.admit()
            raise Refusal(404, "not_found", "Models are at /models/PROJECT/, as /models/main/chat/completions.")
        project, rest = target
        views = await self._models_for(project, visitor)
        if scope["method"] in {"GET", "HEAD"} and (rest == b"models" or rest.startswith(b"models/")):
            return _document(model_document(views, project, unquote(rest[len(b"models/") :].decode())))
        if scope["method"] != "POST":
            raise Refusal(405, "method_not_allowed", "Send a POST request with a JSON body that names a `model`.")
        return await self._ask_model(scope, receive, views, rest, visitor)

    async def _models_for(self, project: str, visitor: Visitor) -> list[ServiceView]:
        try:
            views = [view for view in await self._directory.models(project) if visitor.known or not view.auth]
        except NotFoundError:
            visitor.admit()
            raise
        if not views:
            visitor.admit()
        return views

    async def _ask_model(
        self, scope: Scope, receive: Receive, views: Sequence[ServiceView], rest: bytes, visitor: Visitor
    ) -> Asked:
        body = await read_whole(receive, BODY_LIMIT)
        name = await wanted_model(body)
        view = find_model(views, name)
        if view is None:
            visitor.admit()
            raise unknown_model(views, name)
        path = b"%b/%b" % (view.model_prefix.rstrip("/").encode(), rest)
        if query := scope["query_string"]:
            path = b"%b?%b" % (path, query)
        head = Incoming.of(scope, visitor).head(path, b"", b"content-length: %d\r\n" % len(body))
        return Asked(await self.asking.ask(view, Outgoing("POST", head, body), tell=visitor.known), None)


def inner(target: Target, view: ServiceView) -> tuple[bytes, bytes]:
    """The path that the replica gets, and what was taken off it."""
    rest = target.rest or b"/"
    return (rest, target.prefix) if view.strip_prefix else (target.prefix + rest, b"")


def missing_slash(target: Target, query: bytes) -> Refusal:
    """Relative addresses on the pages of a service work only below its last slash."""
    where = target.name.encode() + (b"/?" + query if query else b"/")
    return Refusal(307, "redirect", "The address of a service ends with a slash.", [(b"location", where)])


def as_refusal(exc: Exception) -> Refusal:
    """The answer for an exception."""
    if isinstance(exc, Refusal):
        return exc
    if isinstance(exc, NotFoundError):
        return Refusal(404, exc.code, str(exc))
    number = log_failure("A request to a service failed", exc)
    message = f"The server failed. Its log has the details: look for {number} in server/server.log."
    return Refusal(500, "server_error", message)


def _closing(headers: Sequence[Header]) -> list[Header]:
    """The client may or may not send a body that nobody asked for: where its next request begins is unknown."""
    return [CLOSE] if any(name == b"expect" for name, _ in headers) else []


def _document(document: object) -> Direct:
    body = json.dumps(document).encode()
    return Direct(200, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))], body)


async def _pass_on(answer: Asked, send: Send) -> None:
    """Sends the answer of a replica, as it comes and no faster than the client takes it."""
    exchange = answer.exchange
    upstream = exchange.upstream
    headers = response_headers(upstream.headers, upstream.status, answer.rewriting)
    if exchange.outgoing.expects and not exchange.outgoing.body_asked:
        headers.append(CLOSE)
    await send({"type": "http.response.start", "status": upstream.status, "headers": headers})
    more = True
    while more:
        try:
            piece, more = await upstream.piece()
        except Broken as broken:
            # The status is out. That the server hangs up is how the client learns that something is missing.
            log.info("An answer of a replica broke off: %s", broken)
            return
        if not more:
            exchange.close()
        await send({"type": "http.response.body", "body": piece, "more_body": more})
