"""The student in the rollout engines, as the trainer sees it: weights go in, judged rollouts come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from raycomplete.config import RolloutConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.weights import Weights
from raycomplete.runtime.types import Judge, Outcome, Prompt
from raycomplete.training.on_policy import Rollout, RolloutRequest


class StudentEngines:
    """Implements `raycomplete.training.on_policy.StudentPolicy`; picklable, so that a training worker can hold it.

    Args:
        pool: Engines that started from the student's checkpoint.
        codec: Turns tokens into text for the judge.
        judge: Says whether a response is a refusal.
        prompts: Every harmful training prompt.
        rollout: Sampling settings.
    """

    def __init__(
        self, pool: RolloutPool, codec: ChatCodec, judge: Judge, prompts: Sequence[Prompt], rollout: RolloutConfig
    ) -> None:
        self._pool, self._codec, self._judge, self._rollout = pool, codec, judge, rollout
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._weights: Weights | None = None

    def sync(
        self,
        state: Mapping[str, Any],
        version: int,
        probe: Sequence[tuple[tuple[int, ...], int]],
        expected: Sequence[Tensor],
        *,
        adapters_only: bool,
    ) -> dict[str, Any]:
        """See `StudentPolicy`.

        Raises:
            SyncError: The engines speak differently from the trainer.
            WaitTimeoutError: They did not answer within `rollout.sync_timeout_s`.
        """
        weights = self._pool.pack_lora(state, version) if adapters_only else self._pool.pack(state, version)
        report = self._pool.sync(weights, probe, expected)
        self._weights = weights
        return report.to_json()

    def submit(self, requests: Sequence[RolloutRequest], seed: int) -> Any:
        """See `StudentPolicy`."""
        call = self._pool.submit(
            [[*request.prompt_ids, *request.prefill_ids] for request in requests],
            max_tokens=self._rollout.max_student_tokens,
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            seed=seed,
            weights=self._weights,
        )
        # A call that is retried after a crash still names its weights, so they live until it is collected.
        return list(requests), call, self._weights

    def collect(self, reference: Any) -> list[Rollout]:
        """See `StudentPolicy`."""
        requests, call, _ = reference
        return [
            Rollout(
                tuple(tokens),
                (self._codec.eos_id,) if finished else (),
                refused=request.judged and self._is_refusal(request, tokens),
                version=call.version,
            )
            for request, (tokens, finished) in zip(requests, self._pool.collect(call), strict=True)
        ]

    def _is_refusal(self, request: RolloutRequest, tokens: list[int]) -> bool:
        prompt = self._prompts[request.sample_id.rsplit("#", 1)[0]]
        prefill = self._codec.decode(request.prefill_ids[request.refusal_prefix_tokens :])
        continuation = self._codec.decode(tokens)
        return self._judge.outcome(prompt, prefill, continuation) is Outcome.REFUSED
