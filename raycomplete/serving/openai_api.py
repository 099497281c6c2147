"""The interface in OpenAI's shape: its requests, and the routes under which clients ask base, aligned and student."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, model_validator
from sse_starlette import EventSourceResponse

from raycomplete.serving.gate import HEARTBEAT_S, openai_error
from raycomplete.serving.schemas import Body

MAX_ANSWERS = 128  # of one request: prompts times n
_SEED = 2**62  # and room to count on from it
_LENIENT = ConfigDict(extra="ignore", strict=True)

Text = Annotated[str, Field(max_length=200_000)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=100_000)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ANSWERS)]

# Ignoring one of these would answer another question than the client's.
_UNSUPPORTED = (
    *("tools", "functions", "logit_bias", "suffix", "audio", "prediction", "guided_json", "structured_outputs"),
)


class StreamOptions(Body):
    """Options of a stream: its last chunk may count the tokens."""

    model_config = _LENIENT

    include_usage: bool | None = None


class TextPart(Body):
    """A part of a message; only text is read."""

    model_config = _LENIENT

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat. `prefix` marks an answer that is to be continued, as some servers have it."""

    model_config = _LENIENT

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)]
    prefix: bool | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class _Sampled(Body):
    """Settings that chats and completions have in common. Keys that are not named here are ignored."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(max_length=1024)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 when absent")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 sample from all tokens")
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="answers to each prompt; answer i under seed + i")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, lt=_SEED)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> _Sampled:
        extra = self.model_extra or {}
        if named := [name for name in _UNSUPPORTED if extra.get(name)]:
            raise ValueError(f"{named[0]} is not supported by this server")
        kind = extra.get("response_format")
        if kind is not None and (not isinstance(kind, dict) or kind.get("type") != "text"):
            raise ValueError("response_format other than text is not supported by this server")
        return self


class ChatRequest(_Sampled):
    """A chat to be answered.

    A last message of the assistant is continued where `continue_final_message` is true and `add_generation_prompt`
    false, or where it has `prefix: true`.
    """

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(_Sampled):
    """One or several texts, or sequences of token ids, to be continued as they are."""

    prompt: Text | TokenIds | Prompts | PromptIds
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="16 when absent; 0 with echo only")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


@dataclass(frozen=True)
class NoAnswer:
    """The reason why a request gets no answer, with the HTTP status. It travels between processes as a value."""

    status: int
    message: str
    code: str | None = None


Asked = ChatRequest | CompletionRequest
Answers = Callable[[Asked], AsyncIterator[dict[str, Any] | NoAnswer]]
"""A model: yields the whole answer as one item, or chunks where the request streams; `NoAnswer` is the last item."""

_CHUNKS = {"type": "string", "description": "`data:` lines with chunks, the last of them [DONE]"}


def add_openai(api: APIRouter, models: Mapping[str, Answers], *, max_length: int) -> None:
    """Adds the routes in OpenAI's shape for models by name, which read sequences of at most `max_length` tokens."""
    common = {"object": "model", "created": int(time.time()), "owned_by": "raycomplete", "max_model_len": max_length}
    listed = {name: {"id": name, **common} for name in models}

    error = {"model": dict[str, Any], "description": "An error in OpenAI's shape."}
    errors: dict[int | str, dict[str, Any]] = {"4XX": error, "5XX": error}
    chunks = {200: {"content": {"text/event-stream": {"schema": _CHUNKS}}}}
    answers: dict[str, Any] = {"response_model": dict[str, Any], "responses": errors | chunks}

    @api.get("/v1/models", responses=errors)
    def list_models() -> dict[str, Any]:
        """Lists the models that answer here."""
        return {"object": "list", "data": list(listed.values())}

    @api.get("/v1/models/{name}", response_model=dict[str, Any], responses=errors)
    def get_model(name: str) -> Any:
        """Describes one of the models that answer here."""
        return listed.get(name) or unknown(name)

    @api.post("/v1/chat/completions", **answers)
    async def chat(request: ChatRequest) -> Any:
        """Answers a chat, or goes on with an answer that the client began."""
        return await answer(request)

    @api.post("/v1/completions", **answers)
    async def complete(request: CompletionRequest) -> Any:
        """Continues texts or token ids as they are, without a chat template."""
        return await answer(request)

    async def answer(request: Asked) -> Any:
        if request.model not in models:
            return unknown(request.model)
        items = models[request.model](request)
        first = await anext(items)  # a refusal has its own status, and no stream
        if isinstance(first, NoAnswer):
            return _refused(first)
        if request.stream:
            return EventSourceResponse(_events(first, items), ping=HEARTBEAT_S, sep="\n")
        return JSONResponse(first)

    def unknown(name: str) -> JSONResponse:
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
