"""Answers requests in OpenAI's shape with one model: encodes them, generates, and builds the answer or its chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import prepare_models
from raycomplete.data.remote import is_remote
from raycomplete.engines.cluster import uses_gpu
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.online_engine import OnlineEngine, OnlineSampling, Piece
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import RaycompleteError, RefusedError
from raycomplete.runtime.types import ModelRole, Prompt, TurnRole
from raycomplete.serving.openai_api import MAX_ANSWERS, Asked, ChatRequest, CompletionRequest, Message, NoAnswer

TIMEOUT_S = 600.0  # longest wait for a whole answer, or for the next piece of a stream
_CHAT_TOKENS, _COMPLETION_TOKENS = 256, 16  # of a request that names no number

_Item = tuple[Piece, str | None, int]
"""A piece of an answer, the thought before it, and the number of tokens that both took."""


class RefusedRequest(RefusedError):
    """A request that is refused before a model reads it."""

    code: str | None = None


@dataclass(frozen=True)
class _Sequence:
    """One answer that is asked for."""

    tokens: tuple[int, ...]
    sampling: OnlineSampling
    echo: str = ""  # the prompt's text, where it is repeated before the answer
    start: str = ""  # text of the prompt's first token
    reads_only: bool = False  # no token is asked for
    thinks: bool = False


class ModelServer:
    """A model of the run behind an engine of its own: what Ray Serve makes a replica of.

    It must start in a process whose environment is that of `EngineSpec`.
    """

    def __init__(self, config: RunConfig, role: ModelRole) -> None:
        config = resolve_dtype(config, Console(quiet=True))
        local = [name for name in ("aligned", role) if not is_remote(getattr(config.models, name))]
        models = prepare_models(config, roles=list(dict.fromkeys(local)), remote=True)
        spec = EngineSpec.from_config(config, "single", models.paths[role], use_gpu=uses_gpu(config.cluster))
        self._engine = OnlineEngine(spec, sorted(models.codec.eos_ids), timeout_s=config.cluster.start_timeout_s)
        thought = config.evaluation.max_thinking_tokens
        self._answerer = Answerer(models.codec, self._engine, config.models.max_length, thought)

    async def answer(self, request: Asked) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        async for item in self._answerer.answer(request):
            yield item

    def check_health(self) -> None:
        """Fails where the engine failed, which makes Serve replace the replica."""
        self._engine.check()


class Answerer:
    """Answers requests with one model, whose prompt and answer together may have `max_length` tokens.

    `model.generate(tokens, sampling)` yields pieces, as `OnlineEngine` does.
    """

    def __init__(
        self, codec: ChatCodec, model: Any, max_length: int, max_thought: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._codec, self._model = codec, model
        self._max_length, self._max_thought, self._timeout_s = max_length, max_thought, timeout_s

    async def answer(self, request: Asked) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        """Yields the whole answer, or chunks where the request streams; a refusal is the last item."""
        try:
            async with aclosing(self._items(request)) as items:
                async for item in items:
                    yield item
        except TimeoutError:
            yield NoAnswer(503, f"The model did not answer within {self._timeout_s:g} s.")
        except RaycompleteError as error:
            yield NoAnswer(400 if isinstance(error, RefusedError) else 503, str(error), getattr(error, "code", None))

    async def _items(self, request: Asked) -> AsyncGenerator[dict[str, Any], None]:
        sequences, is_chat = self._sequences(request), isinstance(request, ChatRequest)
        kind = "chat.completion" if is_chat else "text_completion"
        head: dict[str, Any] = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if is_chat and request.stream else kind,
            "created": int(time.time()),
            "model": request.model,
        }
        if is_chat and request.stream:
            for index in range(len(sequences)):
                delta = {"role": "assistant", "content": ""}
                first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield head | {"choices": [first]}
        written, offsets, whole = 0, [0] * len(sequences), {}
        merged = _merged([self._pieces(sequence) for sequence in sequences], self._timeout_s)
        async with aclosing(merged) as items:
            async for index, (piece, thought, count) in items:
                written += count
                choice: dict[str, Any] = {"index": index}
                if isinstance(request, ChatRequest):
                    said = {"content": piece.text, "reasoning_content": thought}
                    if not request.stream:
                        choice["message"] = {"role": "assistant", **said}
                    else:
                        choice["delta"] = {"content": piece.text} if thought is None else {"reasoning_content": thought}
                    choice["logprobs"] = _chat_logprobs(request, piece)
                else:
                    text = ("" if offsets[index] else sequences[index].echo) + piece.text
                    choice["text"] = text
                    choice["logprobs"] = _logprobs(request, piece, sequences[index].start, offsets[index])
                    offsets[index] += len(text)
                choice["finish_reason"] = piece.finish_reason
                if request.stream:
                    yield head | {"choices": [choice]}
                whole[index] = choice
        read = sum(len(sequence.tokens) for sequence in sequences[:: request.n or 1])  # a prompt is read once for its n
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        if not request.stream:
            yield head | {"choices": [whole[index] for index in sorted(whole)], "usage": usage}
        elif request.stream_options is not None and request.stream_options.include_usage:
            yield head | {"choices": [], "usage": usage}

    async def _pieces(self, sequence: _Sequence) -> AsyncIterator[_Item]:
        tokens, thought, count = sequence.tokens, None, 0
        if sequence.thinks and (ids := await self._think(sequence)):
            tokens, thought, count = (*tokens, *ids), self._codec.decode(ids), len(ids)
            if sequence.sampling.streams:
                yield Piece(""), thought, count
                thought, count = None, 0
        async for piece in self._model.generate(tokens, sequence.sampling):
            if sequence.reads_only:  # vLLM refuses to generate no token at all
                piece = Piece("", prompt_logprobs=piece.prompt_logprobs, finish_reason="length")
            yield piece, thought, count + len(piece.token_ids)

    async def _think(self, sequence: _Sequence) -> tuple[int, ...]:
        """Returns the thought before an answer, closed; empty where the model answers at once."""
        frame, budget = self._codec.frame, self._max_thought
        assert frame is not None
        mark = frame.answer_mark
        sampling = sequence.sampling._replace(
            max_tokens=budget + len(frame.closing),
            stop=(),
            stop_ids=mark if len(mark) == 1 else (),
            logprobs=None,
            streams=False,
        )
        said = [piece async for piece in self._model.generate(sequence.tokens, sampling)][-1]
        thought, _ = frame.split(sequence.tokens, said.token_ids)
        ends = next((at for at in range(len(thought)) if thought[at : at + len(mark)] == mark), None)
        if ends is None:
            return (*thought[:budget], *frame.closing) if thought else ()
        lead = next(at for at in range(len(frame.closing)) if frame.closing[at : at + len(mark)] == mark)
        return (*thought[:ends], *frame.closing[lead:])

    def _sequences(self, request: Asked) -> list[_Sequence]:
        """Encodes a request, and refuses what does not fit."""
        sampling = OnlineSampling(
            max_tokens=1,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            top_k=max(request.top_k or 0, 0),
            seed=request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            streams=bool(request.stream),
        )
        if isinstance(request, ChatRequest):
            if request.top_logprobs and not request.logprobs:
                raise RefusedRequest("top_logprobs needs logprobs: true.")
            sampling = sampling._replace(logprobs=(request.top_logprobs or 0) if request.logprobs else None)
            tokens, frame = tuple(self._chat_tokens(request)), self._codec.frame
            thinks = frame is not None and frame.thinks and frame.may_think(tokens)
            prompts = [_Sequence(tokens, sampling, thinks=thinks)]
            asked = request.max_completion_tokens or request.max_tokens or _CHAT_TOKENS
        else:
            if request.max_tokens == 0 and not request.echo:
                raise RefusedRequest("max_tokens must be at least 1, got 0; only echo goes without new tokens.")
            sampling = sampling._replace(
                logprobs=request.logprobs, prompt_logprobs=request.logprobs if request.echo else None
            )
            given: Any = request.prompt
            texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
            prompts = [self._text_tokens(text, request, sampling) for text in texts]
            asked = _COMPLETION_TOKENS if request.max_tokens is None else max(request.max_tokens, 1)
        if len(prompts) * (request.n or 1) > MAX_ANSWERS:
            raise RefusedRequest(f"prompts times n must be at most {MAX_ANSWERS}.")
        found = []
        for prompt in prompts:
            count = min(asked, self._room(prompt))
            for number in range(request.n or 1):
                seed = None if request.seed is None else request.seed + number
                found.append(replace(prompt, sampling=prompt.sampling._replace(max_tokens=count, seed=seed)))
        return found

    def _room(self, sequence: _Sequence) -> int:
        """Counts the tokens that the context leaves for an answer."""
        if not sequence.tokens:
            raise RefusedRequest("The prompt is empty.")
        longest = self._max_length
        if sequence.thinks and self._codec.frame is not None:
            longest -= self._max_thought + len(self._codec.frame.closing)
        if longest <= len(sequence.tokens):
            error = RefusedRequest(
                f"This model's maximum context length is {longest} tokens, and the prompt has {len(sequence.tokens)}."
            )
            error.code = "context_length_exceeded"
            raise error
        return longest - len(sequence.tokens)

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
        prompt = _conversation(messages)
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


def _conversation(messages: Sequence[Message]) -> Prompt:
    """Makes a prompt of a chat, whose turns must alternate after system messages and end with the user."""
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    turns: list[tuple[TurnRole, str]] = [
        ("user" if index % 2 == 0 else "assistant", message.text) for index, message in enumerate(messages[first:])
    ]
    if roles[first:] != [role for role, _ in turns] or len(turns) % 2 == 0:
        raise RefusedRequest(
            "Conversation roles must alternate user/assistant/user/assistant after a system message, and end with the "
            f"user (found: {(', '.join(roles) or 'none')[:500]})."
        )
    system = "\n\n".join(message.text for message in messages[:first])
    return Prompt("", turns[-1][1], "benign", system=system or None, earlier=tuple(turns[:-1]))


def _chat_logprobs(request: ChatRequest, piece: Piece) -> dict[str, Any] | None:
    if not request.logprobs:
        return None

    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", errors="replace"))}

    count = request.top_logprobs or 0
    return {
        "content": [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(*other) for other in token.top[:count]]}
            for token in piece.logprobs
        ]
    }


def _logprobs(request: CompletionRequest, piece: Piece, start: str, offset: int) -> dict[str, Any] | None:
    """Lists the log-probabilities of a piece after those of the prompt, whose first token, `start`, has none."""
    if request.logprobs is None:
        return None
    listed = [*piece.prompt_logprobs, *piece.logprobs]
    texts = [start if token is None else token.token for token in listed]
    return {
        "tokens": texts,
        "token_logprobs": [None if token is None else token.logprob for token in listed],
        "top_logprobs": [
            None if token is None else {token.token: token.logprob} | dict(reversed(token.top)) for token in listed
        ],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
    }


async def _merged(streams: Sequence[AsyncIterator[_Item]], timeout_s: float) -> AsyncGenerator[tuple[int, _Item], None]:
    """Yields the items of several streams as they come, with the number of their stream."""
    items: asyncio.Queue[Any] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[_Item]) -> None:
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
