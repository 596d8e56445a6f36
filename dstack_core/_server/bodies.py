"""Bodies of requests and answers. Models are read from and written to JSON by pydantic directly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from dstack_core._server.refusals import TooLargeError

M = TypeVar("M", bound=BaseModel)

BODY_LIMIT = 8 << 20
"""Bytes that the body of a request may have."""
DRAIN_LIMIT = 64 << 20
"""Bytes of a body over the limit that are read and dropped, so that the client gets to read the refusal."""
_CURE = "Keep data out of `commands` and `env`: let the job fetch it from where it is stored."


def project_of(request: Request) -> str:
    """The project that a request is about."""
    return str(request.path_params["project"])


async def read(request: Request, model: type[M]) -> M:
    """The body of a request. An empty one is an object without fields."""
    return model.model_validate_json(await body_of(request) or b"{}")


async def body_of(request: Request, limit: int = BODY_LIMIT, cure: str = _CURE) -> bytes:
    """The bytes of a body.

    Raises:
        TooLargeError: there are more than `limit`; the rest was read, up to `DRAIN_LIMIT`.
    """
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            pieces.clear()
        else:
            pieces.append(piece)
        if size > max(limit, DRAIN_LIMIT):
            break
    if size > limit:
        raise TooLargeError(f"The request is larger than {limit >> 20} MB. {cure}")
    return b"".join(pieces)


def answer(model: BaseModel) -> Response:
    """A model as an answer."""
    return json_answer(model.model_dump_json().encode())


def answers(models: Iterable[BaseModel]) -> Response:
    """A list of models as an answer."""
    return json_answer(b"[" + b",".join(model.model_dump_json().encode() for model in models) + b"]")


def empty_answer() -> Response:
    """Done, and nothing to say."""
    return json_answer(b"{}")


def json_answer(body: bytes) -> Response:
    """JSON as an answer."""
    return Response(body, media_type="application/json")
