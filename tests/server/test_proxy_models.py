"""OpenAI's protocol: the model in the body picks the service. With OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.conftest import TOKEN, Services
from tests.support.upstreams import Handler, Replica, Seen, respond


def completion(text: str, **more: object) -> bytes:
    """A completion, or a piece of one."""
    choice = {"index": 0, "finish_reason": None, "message": {"role": "assistant", "content": text}, **more}
    document = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(document).encode()


def model(name: str) -> Handler:
    """A server of a model that says its name, the last message and the path; word by word if it is asked to stream."""

    async def handler(request: Seen) -> None:
        asked = json.loads(await request.body())
        words = [name, str(asked["messages"][-1]["content"])[:20], request.target]
        if not asked.get("stream"):
            body = completion(" ".join(words))
            await request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            return
        await request.answer(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for word in words:
            event = b"data: %b\n\n" % completion("", delta={"content": f"{word} "})
            await request.answer(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(0)
        await request.answer(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    return handler


@pytest.fixture
def models(services: Services) -> dict[str, Replica]:
    """Two models that need the token, and one for everybody."""
    known = {
        "llama": services.add("one", model("llama"), auth=True, model="meta/llama"),
        "other": services.add("two", model("other"), auth=True, model="other", model_prefix="/api/v2/"),
        "free": services.add("three", model("free"), model="free"),
    }
    return {name: replica for name, (replica,) in known.items()}


@pytest.fixture
def client(services: Services) -> Iterator[openai.OpenAI]:
    """OpenAI's client, with the token."""
    with openai.OpenAI(base_url=f"{services.url}/models/main", api_key=TOKEN, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, content: str = "hi") -> str | None:
    """The answer of a model."""
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}])
    return answer.choices[0].message.content


def test_chat(client: openai.OpenAI, models: dict[str, Replica]) -> None:
    """The model in the request picks the service, which gets the request under its own prefix, without our token."""
    assert ask(client, "meta/llama") == "llama hi /v1/chat/completions"
    assert ask(client, "other") == "other hi /api/v2/chat/completions"
    assert models["llama"].seen[0].header("authorization") is None
    assert TOKEN not in repr([replica.seen for replica in models.values()])


@pytest.mark.parametrize("prefix", ["/v1", "/", "/v1/"])
def test_other_base_addresses(services: Services, models: dict[str, Replica], prefix: str) -> None:
    """Clients that insist on `v1` in their base address work, too."""
    with openai.OpenAI(base_url=f"{services.url}/models/main{prefix}", api_key=TOKEN, max_retries=0) as client:
        assert ask(client, "meta/llama") == "llama hi /v1/chat/completions"


def test_stream(client: openai.OpenAI, models: dict[str, Replica]) -> None:
    """An answer streams word by word."""
    stream = client.chat.completions.create(
        model="meta/llama", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert [piece.choices[0].delta.content for piece in stream] == ["llama ", "hi ", "/v1/chat/completions "]


def test_embeddings(client: openai.OpenAI, services: Services) -> None:
    """Any path of the protocol is passed on."""
    body = json.dumps(
        {"object": "list", "model": "e", "data": [{"object": "embedding", "index": 0, "embedding": [1.5]}]}
    )
    (replica,) = services.add("e", respond(body.encode(), "200 OK", "Content-Type: application/json"), model="e")
    assert client.embeddings.create(model="e", input="x", encoding_format="float").data[0].embedding == [1.5]
    assert replica.seen[0].target == "/v1/embeddings"


def test_large_request(client: openai.OpenAI, models: dict[str, Replica]) -> None:
    """A request with pictures in it, of some ten megabytes, arrives whole; one beyond all reason is refused."""
    assert ask(client, "meta/llama", "x" * 30_000_000) == f"llama {'x' * 20} /v1/chat/completions"
    assert int(models["llama"].seen[0].header("content-length") or 0) > 30_000_000
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, "meta/llama", "x" * (65 << 20))
    assert refused.value.status_code == 413
    assert "64 MiB" in refused.value.message


def test_list(client: openai.OpenAI, models: dict[str, Replica]) -> None:
    """The models of a project are listed; each can be asked for by its name, which may have slashes."""
    assert [known.id for known in client.models.list()] == ["free", "meta/llama", "other"]
    found = client.models.retrieve("meta/llama")
    assert (found.id, found.object, found.owned_by) == ("meta/llama", "model", "main")


def test_unknown_model(client: openai.OpenAI, models: dict[str, Replica]) -> None:
    """A model that no service offers is named, with those that are there."""
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "gpt-9")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert "'gpt-9'. These are there: 'free', 'meta/llama', 'other'." in missing.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_no_models(client: openai.OpenAI, services: Services) -> None:
    """A project without a model says how to offer one."""
    services.add("web", respond())
    assert list(client.models.list()) == []
    with pytest.raises(openai.NotFoundError, match="submit one with `model=`"):
        ask(client, "m")


def test_stranger(services: Services, models: dict[str, Replica]) -> None:
    """Without the token only the models for everybody are there, and a key for the replica reaches it."""
    with openai.OpenAI(base_url=f"{services.url}/models/main", api_key="theirs", max_retries=0) as client:
        assert [known.id for known in client.models.list()] == ["free"]
        assert ask(client, "free") == "free hi /v1/chat/completions"
        for name in ("meta/llama", "gpt-9"):
            with pytest.raises(openai.AuthenticationError):
                ask(client, name)
    assert models["free"].seen[0].header("authorization") == "Bearer theirs"
    assert not models["llama"].seen


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"m"', b"{}", b'{"model": 1}', b"\xff", b"[" * 100_000])
def test_body_without_a_model(services: Services, models: dict[str, Replica], body: bytes) -> None:
    """A body that names no model is refused in OpenAI's form, with what is wanted."""
    with services.client() as client:
        path, headers = "/models/main/chat/completions", {"authorization": f"Bearer {TOKEN}"}
        answer = client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert '{"model": "..."}' in answer.json()["error"]["message"]
        assert client.get(path, headers=headers).status_code == 405


@pytest.mark.parametrize(
    "path", ["/models/main", "/models/", "/models/nope/chat/completions", "/models/../main/models"]
)
def test_path_of_no_project(services: Services, models: dict[str, Replica], path: str) -> None:
    """A path that names no project is refused."""
    with services.connect() as connection:
        head = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}".encode())
        assert connection.recv(1 << 16)[9:12] in {b"404", b"400"}


def test_model_that_is_not_ready(client: openai.OpenAI, services: Services) -> None:
    """A model without a ready replica says what was probed, in OpenAI's form."""
    services.set("one", [], auth=True, model="m", patience=0.1, problem="GET /health: 500")
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client, "m")
    assert refused.value.status_code == 503
    assert refused.value.code == "not_ready"
    assert "GET /health: 500" in refused.value.message


def test_ready_service_is_preferred(client: openai.OpenAI, services: Services) -> None:
    """Of two services with the same model the one with a ready replica answers."""
    services.set("a", [], auth=True, model="m")
    services.add("b", model("b"), auth=True, model="m")
    services.set("c", [], auth=True, model="m")
    assert ask(client, "m") == "b hi /v1/chat/completions"


def test_answer_with_paths_of_the_replica(services: Services) -> None:
    """An answer is passed on as it is, errors of the model included."""
    services.add("one", respond(b'{"error": {"message": "too long"}}', "400 Bad Request", "X-Request-Id: 7"), model="m")
    with services.client() as client:
        answer: Any = client.post("/models/main/v1/completions?x=1", json={"model": "m"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "7")
    assert answer.json()["error"]["message"] == "too long"
