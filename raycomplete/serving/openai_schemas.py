"""Bodies of the routes in OpenAI's shape: what clients of that interface send, and what they read."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raycomplete.engines.online_engine import Piece
from raycomplete.serving.schemas import Body

MAX_ANSWERS = 128  # of one request: prompts times n
_SEED = 2**62  # and room to count on from it

FinishReason = Literal["stop", "length"]
Text = Annotated[str, Field(max_length=200_000)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=100_000)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ANSWERS)]

# Asked for silently, these would give answers to another question than the client's.
_UNSUPPORTED = (
    "tools",
    "functions",
    "logit_bias",
    "suffix",
    "audio",
    "prediction",
    "guided_json",
    "structured_outputs",
)


class StreamOptions(Body):
    """Options of a stream: its last chunk may count the tokens."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class TextPart(Body):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat. `prefix` marks an answer that is to be continued, as some servers have it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)]
    prefix: bool | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
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
    def _nothing_that_is_not_done(self) -> _Sampled:
        extra = self.model_extra or {}
        if named := [name for name in _UNSUPPORTED if extra.get(name)]:
            raise ValueError(f"{named[0]} is not supported by this server")
        kind = extra.get("response_format")
        if kind is not None and (not isinstance(kind, dict) or kind.get("type") != "text"):
            raise ValueError("response_format other than text is not supported by this server")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


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


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The reason why a request was not served, as clients of this interface read it."""

    error: ErrorDetail


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]

    @classmethod
    def of(cls, request: ChatRequest, piece: Piece) -> ChatLogprobs | None:
        """Lists the log-probabilities of a piece; None where they were not asked for."""
        if not request.logprobs:
            return None
        listed = [
            ChatLogprob(
                **_top(token.token, token.logprob),
                top_logprobs=[TopLogprob(**_top(*other)) for other in token.top[: request.top_logprobs or 0]],
            )
            for token in piece.logprobs
        ]
        return cls(content=listed)


def _top(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", errors="replace"))}


class ChatAnswer(BaseModel):
    """`reasoning_content` is the thought of a reasoning model, which is no part of its answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Logprobs(BaseModel):
    """One entry a token; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def of(cls, request: CompletionRequest, piece: Piece, start: str, offset: int = 0) -> Logprobs | None:
        """Lists the log-probabilities of a piece, after those of the prompt; None where they were not asked for.

        Args:
            start: Text of the prompt's first token.
            offset: Characters before the piece.
        """
        if request.logprobs is None:
            return None
        listed = [*piece.prompt_logprobs, *piece.logprobs]
        texts = [start if token is None else token.token for token in listed]
        return cls(
            tokens=texts,
            token_logprobs=[None if token is None else token.logprob for token in listed],
            top_logprobs=[
                None if token is None else {token.token: token.logprob} | dict(reversed(token.top)) for token in listed
            ],
            text_offset=list(accumulate(map(len, texts), initial=offset))[:-1],
        )


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, read: int, written: int) -> Usage:
        return cls(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class ChatView(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionView(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelView(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["raycomplete"] = "raycomplete"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


def head(kind: Literal["chatcmpl", "cmpl"], model: str) -> dict[str, Any]:
    """Returns id, time and model, which every chunk of one answer repeats."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
