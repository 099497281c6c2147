"""The vLLM engine that answers requests as they come: whatever is at work at a step is batched together."""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import DataError, WorkError

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class OnlineSampling(NamedTuple):
    """Settings for continuing one sequence. Temperature 0 is greedy; `logprobs` counts the likeliest tokens to name."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # beside those that end a response
    logprobs: int | None = None  # of new tokens; 0 names the token itself alone
    prompt_logprobs: int | None = None  # of the prompt's own tokens
    streams: bool = False  # a piece a step instead of one at the end


class TokenLogprob(NamedTuple):
    """A token as text, its log-probability in nats at temperature 1, and the likeliest tokens in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer."""

    text: str  # new text; what could still become a stop string is held back
    token_ids: tuple[int, ...] = ()  # new tokens, the one that ends the response included
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # in the first piece; None for the prompt's first token
    finish_reason: Literal["stop", "length"] | None = None  # set in the last piece


_Asked: TypeAlias = tuple[str, list[int], OnlineSampling]  # a request by its identity
_Answer: TypeAlias = tuple[asyncio.AbstractEventLoop, "asyncio.Queue[Piece | Exception]"]  # where pieces are awaited


class OnlineEngine:
    """Generates with one model for many callers; start it in a process whose environment is `spec.environment()`.

    vLLM works in a thread of its own, which alone touches it.
    """

    def __init__(self, spec: EngineSpec, stop_ids: Sequence[int], *, timeout_s: float) -> None:
        self._stop_ids = list(stop_ids)
        self._inbox: queue.SimpleQueue[_Asked | str | None] = queue.SimpleQueue()  # a text ends the request of that id
        self._answers: dict[str, _Answer] = {}
        self._failure: Exception | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(spec, started), name="online-engine", daemon=True)
        self._thread.start()
        try:
            started.result(timeout=timeout_s)
        except TimeoutError as error:
            problem = f"After {timeout_s:.0f} s the engine of {spec.checkpoint} has not started."
            raise WorkError(problem, "Raise cluster.start_timeout_s if it was working.") from error

    def check(self) -> None:
        """Raises an error where the engine has failed."""
        if self._failure is not None or not self._thread.is_alive():
            words = "The engine has failed" + (f" ({self._failure})" if self._failure else "") + "."
            raise WorkError(words, "It is started again; ask again in a minute.")

    async def generate(self, tokens: Sequence[int], sampling: OnlineSampling) -> AsyncIterator[Piece]:
        """Continues one sequence. Closing the iterator aborts the request."""
        identity, pieces = uuid.uuid4().hex, asyncio.Queue[Piece | Exception]()
        self._answers[identity] = asyncio.get_running_loop(), pieces
        ended = False
        try:
            self.check()  # after it is listed, so that a failure in between is not missed
            self._inbox.put((identity, list(tokens), sampling))
            while not ended:
                piece = await pieces.get()
                ended = isinstance(piece, Exception) or piece.finish_reason is not None
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self._answers.pop(identity, None)
            if not ended:
                self._inbox.put(identity)

    def stop(self) -> None:
        """Ends the thread, and with it what is at work."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _work(self, spec: EngineSpec, started: Future[None]) -> None:
        import torch  # which those who only read `Piece` need not

        from raycomplete.engines.rollout_worker import RolloutEngine
        from raycomplete.engines.vllm_start import start_llm

        try:
            engine = start_llm(spec, RolloutEngine.arguments(spec)).llm_engine
            started.set_result(None)
            # vLLM (seen in 0.32) ranks prompt tokens in a function that torch would compile at first use: see
            # `RolloutEngine.log_probs`.
            with torch.compiler.set_stance("force_eager"):
                while self._take(engine):
                    for output in engine.step():
                        self._deliver(output.request_id, _piece(output))
        except Exception as error:
            self._failure = error
            if not started.done():
                started.set_exception(error)
        failure = WorkError("The engine ended before the answer did.", "Ask again.")
        for identity in list(self._answers):
            self._deliver(identity, failure)

    def _take(self, engine: Any) -> bool:
        """Hands the engine what came in, and waits where it has nothing to do; False where it should end."""
        from vllm import TokensPrompt

        while not (self._inbox.empty() and engine.has_unfinished_requests()):
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, str):
                engine.abort_request([item])
                continue
            identity, tokens, sampling = item
            try:
                engine.add_request(identity, TokensPrompt(prompt_token_ids=tokens), self._parameters(sampling))
            except Exception as error:  # of this request: the others go on
                self._deliver(identity, DataError(f"The engine refuses the request: {error}"))
        return True

    def _parameters(self, sampling: OnlineSampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        values = sampling._asdict()
        streams, stop_ids = values.pop("streams"), values.pop("stop_ids")
        if sampling.temperature == 0:
            values |= {"top_p": 1.0, "top_k": 0, "seed": None}
        kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
        return SamplingParams(
            **values | {"stop": list(sampling.stop)}, stop_token_ids=[*self._stop_ids, *stop_ids], output_kind=kind
        )

    def _deliver(self, identity: str, piece: Piece | Exception) -> None:
        answer = self._answers.get(identity)
        if answer is not None:
            with suppress(RuntimeError):  # the loop of the one who asked is closed
                answer[0].call_soon_threadsafe(answer[1].put_nowait, piece)


def _piece(output: Any) -> Piece | Exception:
    """Makes a piece of vLLM's output."""
    found = output.outputs[0]
    reason = found.finish_reason
    if reason not in (None, "stop", "length"):
        return WorkError(f"The engine ended the answer early ({reason}).", "Ask again.")
    token_ids = tuple(found.token_ids)
    ranked = [_token_logprob(token, position) for token, position in zip(token_ids, found.logprobs or (), strict=False)]
    of_prompt = [
        None if position is None else _token_logprob(token, position)
        for token, position in zip(output.prompt_token_ids or (), output.prompt_logprobs or (), strict=False)
    ]
    return Piece(found.text, token_ids, tuple(ranked), tuple(of_prompt), reason)


def _token_logprob(token: int, position: Any) -> TokenLogprob:
    """Reads vLLM's mapping of token id to log-probability, in which a token may be there beside the likeliest ones."""
    texts = {
        key: (item.decoded_token or "", max(float(item.logprob), _LEAST_LOGPROB)) for key, item in position.items()
    }
    top = sorted(position, key=lambda key: position[key].rank or 0)
    return TokenLogprob(*texts[token], tuple(texts[key] for key in top))
