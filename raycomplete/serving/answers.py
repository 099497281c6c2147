"""Turns requests in OpenAI's shape into token sequences for one model, and what it says into answers and chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raycomplete.data.chat import ChatCodec
from raycomplete.engines.online_engine import OnlineSampling, Piece
from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.runtime.types import Prompt, TurnRole
from raycomplete.serving.openai_schemas import (
    MAX_ANSWERS,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    ChatView,
    CompletionChoice,
    CompletionRequest,
    CompletionView,
    Logprobs,
    Message,
    NoAnswer,
    Usage,
    head,
)

_DEFAULT_COMPLETION_TOKENS = 16


class TextModel(Protocol):
    """Continues token sequences; `raycomplete.engines.online_engine.OnlineEngine` is one."""

    def generate(self, tokens: Sequence[int], sampling: OnlineSampling) -> AsyncIterator[Piece]:
        """Continues one sequence, in pieces."""


class RefusedRequest(Exception):
    """Says why a request is refused before a model reads it."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.refusal = NoAnswer(status, message, code)


@dataclass(frozen=True)
class AnswerLimits:
    """Limits of one model's answers.

    Attributes:
        max_length: Longest sequence, prompt and answer together, in tokens.
        max_tokens: Longest answer in tokens; a request that asks for more gets as many.
        max_thinking_tokens: Longest thought of a reasoning model before an answer.
        timeout_s: Longest wait for a whole answer, or for the next piece of a stream.
    """

    max_length: int
    max_tokens: int
    max_thinking_tokens: int
    timeout_s: float


@dataclass(frozen=True)
class _Sequence:
    """One answer that is asked for.

    Attributes:
        echo: The prompt's text where it is repeated before the answer, and `start` its first token's.
        reads_only: No token is asked for.
        is_chat: A reasoning model thinks before it answers; a text is continued as it stands.
    """

    tokens: tuple[int, ...]
    sampling: OnlineSampling
    echo: str = ""
    start: str = ""
    reads_only: bool = False
    is_chat: bool = False


@dataclass(frozen=True)
class _Said:
    """One whole answer."""

    piece: Piece
    thought: str | None
    written: int


class Answerer:
    """Answers requests with one model."""

    def __init__(self, codec: ChatCodec, model: TextModel, limits: AnswerLimits) -> None:
        self._codec, self._model, self._limits = codec, model, limits

    async def complete(self, request: ChatRequest | CompletionRequest) -> ChatView | CompletionView | NoAnswer:
        """Returns the whole answer."""
        try:
            sequences = self._sequences(request, streams=False)
            async with asyncio.timeout(self._limits.timeout_s), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._say(sequence)) for sequence in sequences]
        except BaseExceptionGroup as errors:
            return _refusal(errors.exceptions[0], self._limits)
        except Exception as error:
            return _refusal(error, self._limits)
        said = [task.result() for task in tasks]
        usage = Usage.of(_num_read(request, sequences), sum(answer.written for answer in said))
        if isinstance(request, ChatRequest):
            chat = [
                ChatChoice(
                    index=index,
                    message=ChatAnswer(content=answer.piece.text, reasoning_content=answer.thought),
                    logprobs=ChatLogprobs.of(request, answer.piece),
                    finish_reason=answer.piece.finish_reason or "length",
                )
                for index, answer in enumerate(said)
            ]
            return ChatView(**head("chatcmpl", request.model), choices=chat, usage=usage)
        texts = [
            CompletionChoice(
                index=index,
                text=sequence.echo + answer.piece.text,
                logprobs=Logprobs.of(request, answer.piece, sequence.start),
                finish_reason=answer.piece.finish_reason or "length",
            )
            for index, (sequence, answer) in enumerate(zip(sequences, said, strict=True))
        ]
        return CompletionView(**head("cmpl", request.model), choices=texts, usage=usage)

    async def stream(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        """Yields chunks; the first item tells by its kind whether there is an answer. A refusal is the last item."""
        try:
            async with aclosing(self._chunks(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseExceptionGroup as errors:
            yield _refusal(errors.exceptions[0], self._limits)
        except Exception as error:
            yield _refusal(error, self._limits)

    async def _chunks(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
        sequences = self._sequences(request, streams=True)
        is_chat = isinstance(request, ChatRequest)
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        common = {**head("chatcmpl" if is_chat else "cmpl", request.model), "object": kind}
        written, offsets = 0, [0] * len(sequences)
        if is_chat:
            for index in range(len(sequences)):
                start = {"index": index, "delta": {"role": "assistant", "content": ""}}
                yield common | {"choices": [start | {"logprobs": None, "finish_reason": None}]}
        merged = _merged([self._pieces(sequence) for sequence in sequences], self._limits.timeout_s)
        async with aclosing(merged) as items:
            async for index, (piece, thought, count) in items:
                written += count
                if isinstance(request, ChatRequest):
                    delta = {"reasoning_content": thought} if thought is not None else {"content": piece.text}
                    choice: dict[str, Any] = {"index": index, "delta": delta}
                    logprobs: ChatLogprobs | Logprobs | None = ChatLogprobs.of(request, piece)
                else:
                    text = ("" if offsets[index] else sequences[index].echo) + piece.text
                    choice = {"index": index, "text": text}
                    logprobs = Logprobs.of(request, piece, sequences[index].start, offsets[index])
                    offsets[index] += len(text)
                choice |= {"logprobs": logprobs and logprobs.model_dump(), "finish_reason": piece.finish_reason}
                yield common | {"choices": [choice]}
        if request.counts_usage:
            usage = Usage.of(_num_read(request, sequences), written)
            yield common | {"choices": [], "usage": usage.model_dump()}

    async def _say(self, sequence: _Sequence) -> _Said:
        thoughts, written, whole = [], 0, Piece("")
        async for piece, thought, count in self._pieces(sequence):
            written += count
            thoughts += [] if thought is None else [thought]
            whole = piece
        return _Said(whole, "".join(thoughts) or None, written)

    async def _pieces(self, sequence: _Sequence) -> AsyncIterator[tuple[Piece, str | None, int]]:
        """Yields pieces of thought and answer: (piece, thought where it is one, tokens written)."""
        tokens, frame = sequence.tokens, self._codec.frame
        if frame is not None and frame.thinks and sequence.is_chat and frame.may_think(tokens):
            thought = await self._think(sequence)
            if thought:
                tokens = (*tokens, *thought)
                yield Piece(""), self._codec.decode(thought), len(thought)
        async for piece in self._model.generate(tokens, sequence.sampling):
            if sequence.reads_only:  # vLLM refuses to generate no token at all
                piece = Piece("", prompt_logprobs=piece.prompt_logprobs, finish_reason="length")
            yield piece, None, len(piece.token_ids)

    async def _think(self, sequence: _Sequence) -> tuple[int, ...]:
        """Returns the thought before an answer, closed; empty where the model answers at once."""
        frame, budget = self._codec.frame, self._limits.max_thinking_tokens
        assert frame is not None
        sampling = sequence.sampling._replace(
            max_tokens=budget + len(frame.closing),
            stop=(),
            stop_ids=frame.answer_mark if len(frame.answer_mark) == 1 else (),
            logprobs=None,
            streams=False,
        )
        said = [piece async for piece in self._model.generate(sequence.tokens, sampling)][-1]
        thought, _ = frame.split(sequence.tokens, said.token_ids)
        mark = frame.answer_mark
        ends = next((at for at in range(len(thought)) if thought[at : at + len(mark)] == mark), None)
        if ends is None:
            return (*thought[:budget], *frame.closing) if thought else ()
        lead = next(at for at in range(len(frame.closing)) if frame.closing[at : at + len(mark)] == mark)
        return (*thought[:ends], *frame.closing[lead:])

    def _sequences(self, request: ChatRequest | CompletionRequest, *, streams: bool) -> list[_Sequence]:
        """Encodes a request, and refuses what does not fit."""
        sampling = OnlineSampling(
            max_tokens=1,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            top_k=max(request.top_k or 0, 0),
            seed=request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            stop=request.stops,
            streams=streams,
        )
        if isinstance(request, ChatRequest):
            if request.top_logprobs and not request.logprobs:
                raise RefusedRequest("top_logprobs needs logprobs: true.")
            sampling = sampling._replace(logprobs=(request.top_logprobs or 0) if request.logprobs else None)
            prompts = [_Sequence(tuple(self._chat_tokens(request)), sampling, is_chat=True)]
            asked = request.max_completion_tokens or request.max_tokens
        else:
            sampling = sampling._replace(
                logprobs=request.logprobs, prompt_logprobs=request.logprobs if request.echo else None
            )
            prompts = [self._text_tokens(prompt, request, sampling) for prompt in _prompts(request)]
            asked = _DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else max(request.max_tokens, 1)
            if request.max_tokens == 0 and not request.echo:
                raise RefusedRequest("max_tokens must be at least 1, got 0; only echo goes without new tokens.")
        if len(prompts) * (request.n or 1) > MAX_ANSWERS:
            raise RefusedRequest(f"prompts times n must be at most {MAX_ANSWERS}.")
        found = []
        for prompt in prompts:
            fitted = self._fitted(prompt, asked)
            for number in range(request.n or 1):
                seed = None if request.seed is None else request.seed + number
                found.append(replace(fitted, sampling=fitted.sampling._replace(seed=seed)))
        return found

    def _fitted(self, sequence: _Sequence, asked: int | None) -> _Sequence:
        limits, frame, read = self._limits, self._codec.frame, len(sequence.tokens)
        thinks = frame is not None and frame.thinks and sequence.is_chat and frame.may_think(sequence.tokens)
        longest = limits.max_length
        if thinks and frame is not None:
            longest -= limits.max_thinking_tokens + len(frame.closing)
        room, wanted = longest - read, min(asked or limits.max_tokens, limits.max_tokens)
        if room < (wanted if asked else 1):
            raise RefusedRequest(
                f"This model's maximum context length is {longest} tokens. The request has {read} tokens of prompt and "
                f"asks for {wanted if asked else 1} more.",
                code="context_length_exceeded",
            )
        if not sequence.tokens:
            raise RefusedRequest("The prompt is empty.")
        return replace(sequence, sampling=sequence.sampling._replace(max_tokens=min(wanted, room)))

    def _chat_tokens(self, request: ChatRequest) -> list[int]:
        messages, answer = list(request.messages), ""
        goes_on, starts = request.continue_final_message, request.add_generation_prompt
        if goes_on and (starts is None or starts):
            raise RefusedRequest("continue_final_message needs add_generation_prompt: false.")
        if messages[-1].role == "assistant":
            if not (goes_on or messages[-1].prefix):
                raise RefusedRequest(
                    "The last message is the assistant's. To continue it, send continue_final_message: true and "
                    "add_generation_prompt: false."
                )
            answer = messages.pop().text
        elif goes_on:
            raise RefusedRequest("continue_final_message needs a last message of the assistant.")
        elif starts is False:
            raise RefusedRequest("add_generation_prompt: false needs a last message of the assistant.")
        prompt = conversation(messages)
        if not answer:
            return prompt.encoded(self._codec)
        codec = self._codec.with_thinking(False)
        return [*prompt.encoded(codec), *codec.encode_answer(answer)]

    def _text_tokens(self, prompt: str | list[int], request: CompletionRequest, sampling: OnlineSampling) -> _Sequence:
        tokens = self._codec.encode_text(prompt) if isinstance(prompt, str) else prompt
        if (largest := max(tokens, default=0)) >= self._codec.vocab_size:
            raise RefusedRequest(f"The token id {largest} is out of this model's vocabulary.")
        if not request.echo:
            return _Sequence(tuple(tokens), sampling)
        echo = prompt if isinstance(prompt, str) else self._codec.decode(tokens)
        return _Sequence(tuple(tokens), sampling, echo, self._codec.decode(tokens[:1]), request.max_tokens == 0)


def conversation(messages: Sequence[Message]) -> Prompt:
    """Returns the messages of a chat as a prompt.

    Raises:
        RefusedRequest: They do not go from user to assistant and back, after system messages, and end with the user.
    """
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    asked, count = roles[first:], len(roles) - first
    if asked != [("user", "assistant")[index % 2] for index in range(count)] or count % 2 == 0:
        found = ", ".join(roles) or "none"
        raise RefusedRequest(
            "Conversation roles must alternate user/assistant/user/assistant after a system message, and end with the "
            f"user (found: {found[:500]})."
        )
    system = "\n\n".join(message.text for message in messages[:first])
    turns: list[tuple[TurnRole, str]] = [
        ("user" if index % 2 == 0 else "assistant", message.text) for index, message in enumerate(messages[first:])
    ]
    return Prompt("", turns[-1][1], "benign", system=system or None, earlier=tuple(turns[:-1]))


def _num_read(request: ChatRequest | CompletionRequest, sequences: Sequence[_Sequence]) -> int:
    """Counts the tokens of the prompts, each of which is asked `n` times."""
    return sum(len(sequence.tokens) for sequence in sequences[:: request.n or 1])


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _refusal(error: BaseException, limits: AnswerLimits) -> NoAnswer:
    if isinstance(error, RefusedRequest):
        return error.refusal
    if isinstance(error, TimeoutError):
        return NoAnswer(503, f"The model did not answer within {limits.timeout_s:g} s (serve.chat_timeout_s).")
    if isinstance(error, RaycompleteError):
        return NoAnswer(400 if isinstance(error, RefusedError) else 503, str(error))
    raise error


async def _merged(
    streams: Sequence[AsyncIterator[tuple[Piece, str | None, int]]], timeout_s: float
) -> AsyncGenerator[tuple[int, tuple[Piece, str | None, int]], None]:
    """Yields the items of several streams as they come, with the number of their stream."""
    items: asyncio.Queue[Any] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[tuple[Piece, str | None, int]]) -> None:
        try:
            async for item in stream:
                items.put_nowait((index, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await asyncio.wait_for(items.get(), timeout_s)
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
