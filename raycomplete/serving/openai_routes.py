"""The routes in OpenAI's shape, under which clients of that interface ask base, aligned and student."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from raycomplete.serving.gate import openai_error
from raycomplete.serving.openai_schemas import (
    ChatRequest,
    ChatView,
    CompletionRequest,
    CompletionView,
    ErrorBody,
    ModelList,
    ModelView,
    NoAnswer,
)

_ABOUT = {
    400: "The request is no JSON, a value is wrong, or the model's context is too short.",
    401: "The token is missing or wrong.",
    403: "Without a token, this server serves its own machine only.",
    404: "There is no such model.",
    413: "The body is too large.",
    500: "The model's process could not answer; the service's log says why.",
    503: "The model failed, or did not answer in time.",
}
_CHUNK_SCHEMA = {"type": "string", "description": "`data:` lines with chunks, the last of them [DONE]"}


class Answers(Protocol):
    """A model that answers; `raycomplete.serving.answers.Answerer` is one, and so is a handle on its replica."""

    def complete(self, request: ChatRequest | CompletionRequest) -> Awaitable[ChatView | CompletionView | NoAnswer]:
        """Returns the whole answer."""

    def stream(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        """Yields chunks; a refusal ends them."""


def _answers(*codes: int, chunks: bool = False) -> dict[int | str, dict[str, Any]]:
    """Lists what an operation may answer beside its result. Any may be refused at the gate."""
    found: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody, "description": _ABOUT[code]} for code in sorted({*codes, 401, 403})
    }
    return found | ({200: {"content": {"text/event-stream": {"schema": _CHUNK_SCHEMA}}}} if chunks else {})


def add_openai(app: FastAPI, models: Mapping[str, Answers], *, max_length: int, heartbeat_s: float) -> None:
    """Adds the routes in OpenAI's shape to the application.

    Args:
        models: By name.
        max_length: Longest sequence that they read, in tokens.
        heartbeat_s: Longest silence of a stream, in seconds.
    """
    listed = {name: ModelView(id=name, created=int(time.time()), max_model_len=max_length) for name in models}

    @app.get("/v1/models", responses=_answers())
    def list_models() -> ModelList:
        """Lists the models that answer here."""
        return ModelList(data=list(listed.values()))

    @app.get("/v1/models/{name}", response_model=ModelView, responses=_answers(404))
    def get_model(name: str) -> Any:
        """Describes one of the models that answer here."""
        return listed.get(name) or _unknown(name)

    @app.post("/v1/chat/completions", response_model=ChatView, responses=_answers(400, 404, 413, 500, 503, chunks=True))
    async def chat(request: ChatRequest) -> Any:
        """Answers a chat, or goes on with an answer that the client began."""
        return await answer(request)

    @app.post(
        "/v1/completions", response_model=CompletionView, responses=_answers(400, 404, 413, 500, 503, chunks=True)
    )
    async def complete(request: CompletionRequest) -> Any:
        """Continues texts or token ids as they are, without a chat template."""
        return await answer(request)

    async def answer(request: ChatRequest | CompletionRequest) -> Any:
        model = models.get(request.model)
        if model is None:
            return _unknown(request.model)
        if not request.stream:
            found = await model.complete(request)
            return _refused(found) if isinstance(found, NoAnswer) else found
        chunks = model.stream(request)
        first = await anext(chunks)  # what is refused has its own status, and no stream
        if isinstance(first, NoAnswer):
            return _refused(first)
        return EventSourceResponse(_events(first, chunks), ping=heartbeat_s, sep="\n")

    def _unknown(name: str) -> JSONResponse:
        known = f"This server has {', '.join(models)}."
        return openai_error(404, f"The model {name[:80]!r} does not exist. {known}", code="model_not_found")


def _refused(refusal: NoAnswer) -> JSONResponse:
    return openai_error(refusal.status, refusal.message, code=refusal.code)


async def _events(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any] | NoAnswer]) -> AsyncIterator[str]:
    yield json.dumps(first)
    async for chunk in chunks:
        if isinstance(chunk, NoAnswer):  # too late for a status: clients read the error from the stream
            yield bytes(_refused(chunk).body).decode()
            return
        yield json.dumps(chunk)
    yield "[DONE]"
