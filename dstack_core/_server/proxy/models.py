"""The paths that OpenAI's clients know: `/models/PROJECT/chat/completions` and the like, with or without `v1/`.

A client is given `http://SERVER/models/PROJECT` as its base address. The `model` in the body says which service gets
the request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dstack_core._server.proxy.contract import ServiceView
from dstack_core._server.proxy.refusing import Refusal

BODY_LIMIT = 64 << 20
"""Bytes that the body of a request may have: it is read whole, since the model may stand at its end."""
QUICK = 1 << 20
"""Bytes up to which a body is read by the loop itself; a longer one would keep all others waiting."""


async def wanted_model(body: bytes) -> str:
    """The model that a request names. Raises `Refusal` if it names none."""
    try:
        document = json.loads(body) if len(body) <= QUICK else await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        document = None
    name = document.get("model") if isinstance(document, dict) else None
    if not isinstance(name, str):
        raise Refusal(400, "invalid_body", 'The body must be a JSON object with the name of a model: {"model": "..."}.')
    return name


def find_model(views: Iterable[ServiceView], name: str) -> ServiceView | None:
    """The service that offers a model; of several one with a ready replica."""
    offering = [view for view in views if view.model == name]
    return max(offering, key=lambda view: bool(view.ready), default=None)


def unknown_model(views: Sequence[ServiceView], name: str) -> Refusal:
    """Nobody offers that model."""
    known = ", ".join(repr(model) for model in _names(views))
    cure = (
        f"These are there: {known}."
        if known
        else "No service of this project offers a model: submit one with `model=`."
    )
    return Refusal(404, "model_not_found", f"There is no model {name!r}. {cure}")


def model_document(views: Sequence[ServiceView], project: str, name: str) -> dict[str, Any]:
    """One model, or with an empty name the list of all."""
    if name:
        if name not in _names(views):
            raise unknown_model(views, name)
        return _described(name, project)
    return {"object": "list", "data": [_described(model, project) for model in _names(views)]}


def _names(views: Iterable[ServiceView]) -> list[str]:
    return sorted({view.model for view in views if view.model is not None})


def _described(name: str, project: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": project}
