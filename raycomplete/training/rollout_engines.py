"""The student in the rollout engines, as the trainer uses it: weights go in, judged rollouts come out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from raycomplete.config import RolloutConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import with_file_names
from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.weight_transfer import WeightTransfer
from raycomplete.engines.weights import SentWeights, Weights
from raycomplete.runtime.types import Judge, Outcome, Prompt
from raycomplete.training.batches import answer_batch
from raycomplete.training.checkpoints import from_rank_zero
from raycomplete.training.job import TrainJob
from raycomplete.training.sampling import tokens_before_refusal

_PROBES = 4
_PROBE_TOKENS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """One step as it is before the student has written its part.

    Attributes:
        step: Number of the step, counted from 0.
        anchor: Anchor samples as drawn.
        cuts: Tokens that are kept of each anchor answer; None keeps the aligned model's whole answer.
        recovery: Recovery samples as drawn.
        depths: Tokens that are kept of the `harmful_ids` of each recovery sample.
        is_graded: Harmless answers are judged as well.
    """

    step: int
    anchor: tuple[AnchorSample, ...]
    cuts: tuple[int | None, ...]
    recovery: tuple[RecoverySample, ...]
    depths: tuple[int, ...]
    is_graded: bool = False

    def sequences(self) -> list[list[int]]:
        """Token ids that the student continues: every recovery sample, then the anchor samples that are cut."""
        recovery = [
            [*sample.prompt_ids, *sample.harmful_ids[:depth]]
            for sample, depth in zip(self.recovery, self.depths, strict=True)
        ]
        anchor = [
            [*sample.prompt_ids, *sample.answer_ids[:cut]]
            for sample, cut in zip(self.anchor, self.cuts, strict=True)
            if cut is not None
        ]
        return recovery + anchor


@dataclass(frozen=True, slots=True)
class Rollout:
    """The student's continuation of one sequence.

    Attributes:
        token_ids: New tokens without end-of-response.
        ending_ids: End-of-response, where the response ended by itself.
        refused: The judge called the continuation of a harmful prompt a refusal, or the answer to a harmless one where
            the batch is graded.
        version: Finished training steps of the weights that wrote it.
        refusal_start: Tokens before a refusal begins; None where there is none, or the judge cannot tell.
    """

    token_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]
    refused: bool
    version: int
    refusal_start: int | None = None


class StudentEngines:
    """Rollout engines that hold the student; picklable, so that a training worker can use them.

    Args:
        pool: Engines that started from the student's checkpoint.
        codec: Turns tokens into text for the judge.
        judge: Says whether a response is a refusal.
        prompts: Every training prompt.
        rollout: Sampling settings.
        start_timeout_s: Longest wait for engines that start again after weights could not be sent to them.
    """

    def __init__(
        self,
        pool: RolloutPool,
        codec: ChatCodec,
        judge: Judge,
        prompts: Sequence[Prompt],
        rollout: RolloutConfig,
        *,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._start_timeout_s = start_timeout_s
        self._pool, self._codec, self._judge, self._rollout = pool, codec, judge, rollout
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._weights: Weights | SentWeights | None = None
        self._transfer: WeightTransfer | None = None  # from the first send on, in the process that sends
        self._may_start_anew = False  # engines to which weights were sent

    @property
    def sends_weights(self) -> bool:
        """True where the engines can receive weights from the trainer's device."""
        return self._pool.options.spec.weight_transfer is not None

    def send(
        self,
        state: Mapping[str, Tensor],
        version: int,
        probe: Sequence[tuple[tuple[int, ...], int]],
        expected: Sequence[Tensor],
    ) -> dict[str, Any]:
        """Sends the engines whole weights from device to device; else as `sync`, which ends this way."""
        self._may_start_anew = True
        self._transfer = self._transfer or WeightTransfer(self._pool)
        started = time.perf_counter()
        weights = self._transfer.send(state, version)
        seconds = time.perf_counter() - started
        report = self._pool.sync(weights, probe, expected)
        self._weights = weights
        return asdict(report) | {"load_s": seconds}

    def sync(
        self,
        state: Mapping[str, Any],
        version: int,
        probe: Sequence[tuple[tuple[int, ...], int]],
        expected: Sequence[Tensor],
        *,
        adapters_only: bool,
    ) -> dict[str, Any]:
        """Gives the engines the student's weights, proves that they use them, and returns the report for metrics.jsonl.

        Args:
            state: Weights by name, or LoRA adapters (A, B, scale) by the name of the weight they belong to.
            version: Finished training steps of these weights.
            probe: Pairs (token ids, number of prompt tokens).
            expected: The trainer's log-probabilities of the response tokens of each probe.
            adapters_only: `state` holds adapters.

        Raises:
            SyncError: The engines' log-probabilities differ from the trainer's.
            WaitTimeoutError: They did not answer within `rollout.sync_timeout_s`.
        """
        if self._transfer is not None:  # it failed, or an engine died: a group of processes holds memory of the device
            self._transfer.close()
            self._transfer = None
        if self._may_start_anew:  # which takes longer than an update
            self._pool.wait_until_ready(self._start_timeout_s)
            self._may_start_anew = False
        weights = self._pool.pack_lora(state, version) if adapters_only else self._pool.pack(state, version)
        report = self._pool.sync(weights, probe, expected)
        self._weights = weights
        return asdict(report)

    def submit(self, batch: RolloutBatch, seed: int) -> Any:
        """Starts the rollouts of a batch under the weights synchronised last, and returns what `collect` waits for."""
        call = self._pool.submit(
            batch.sequences(),
            max_tokens=self._rollout.max_student_tokens,
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            seed=seed,
            weights=self._weights,
        )
        # A call that is retried after a crash still names its weights, so they live until it is collected.
        return batch, call, self._weights

    def collect(self, reference: Any) -> list[Rollout]:
        """Waits for the rollouts of a batch, in the order of `RolloutBatch.sequences`; harmful prompts are judged."""
        batch, call, _ = reference
        answers = self._pool.collect(call)
        recovery = zip(batch.recovery, batch.depths, answers, strict=False)
        refused = [self._is_refusal(sample, depth, tokens) for sample, depth, (tokens, _) in recovery]
        starts = [tokens_before_refusal(self._judge, self._codec, tokens) for tokens, _ in answers[: len(refused)]]
        others = answers[len(refused) :]
        refused += self._refused_harmless(batch, others) if batch.is_graded else [False] * len(others)
        judged = zip(answers, refused, starts + [None] * len(others), strict=True)
        return [
            Rollout(tuple(tokens), (self._codec.eos_id,) if finished else (), is_refusal, call.version, start)
            for (tokens, finished), is_refusal, start in judged
        ]

    def _refused_harmless(self, batch: RolloutBatch, answers: Sequence[tuple[Sequence[int], bool]]) -> list[bool]:
        cut = [sample for sample, cut in zip(batch.anchor, batch.cuts, strict=True) if cut is not None]
        return [
            self._judge.outcome(self._prompts[sample.prompt_id], "", self._codec.decode(tokens)) is Outcome.REFUSED
            for sample, (tokens, _) in zip(cut, answers, strict=True)
        ]

    def _is_refusal(self, sample: RecoverySample, depth: int, tokens: Sequence[int]) -> bool:
        """Asks the judge, who does not read a refusal prefix: it imitates what the judge looks for."""
        prefill = self._codec.decode(sample.harmful_ids[sample.refusal_prefix_tokens : depth])
        prompt = self._prompts[sample.prompt_id]
        return self._judge.outcome(prompt, prefill, self._codec.decode(tokens)) is Outcome.REFUSED


class WeightSync:
    """Sends the student's weights, or its LoRA adapters, from the trainer to the engines, however they are sharded.

    The first few `samples` are the probe that proves an update; with `packed` they share rows, as in training.
    """

    def __init__(self, job: TrainJob, engine: Any, lm: Any, samples: Sequence[AnchorSample], *, packed: bool) -> None:
        self._job, self._engine, self._lm = job, engine, lm
        cut = [
            AnchorSample(sample.sample_id, sample.prompt_ids, sample.answer_ids[:_PROBE_TOKENS])
            for sample in samples[:_PROBES]
        ]
        self._probe = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in cut]
        self._batch = answer_batch(cut, packed=packed)
        self._lengths = [len(sample.answer_ids) for sample in cut]
        self.is_sending = True  # where the engines can receive weights; the same on every rank

    def __call__(self, version: int) -> dict[str, Any]:
        """Gives the engines the present weights as `version`; every rank must call this, and each gets the report.

        They go from device to device until that fails once, and through the object store else.

        Raises:
            WorkError: The engines did not take the weights, or their log-probabilities differ from the trainer's.
        """
        started = time.perf_counter()
        expected = self._log_probs()
        self.is_sending = self.is_sending and self._job.student_engines.sends_weights and not self._job.train.lora_rank
        report = self._sent(version, expected) if self.is_sending else None
        if report is None:
            self.is_sending, report = False, self._packed(version, expected)
        return report | {"seconds": time.perf_counter() - started}

    def _sent(self, version: int, expected: Sequence[Tensor]) -> dict[str, Any] | None:
        """Returns the report of weights that were sent, or None on every rank where that failed."""
        from raycomplete.training.deepspeed_engine import gathered_state  # see `_packed`

        state: Any = gathered_state(self._lm, self._job.train.zero_stage, copied=False)

        def send() -> dict[str, Any] | None:
            try:
                named = with_file_names(self._lm, state)
                sent: dict[str, Any] = self._job.student_engines.send(named, version, self._probe, expected)
                return sent
            except Exception as error:  # of vLLM, NCCL or CUDA: the object store needs none of them
                told = "From step %d on weights go through the object store: %s"
                logger.warning(told, version, error, exc_info=True)
                return None

        return from_rank_zero(send)

    def _packed(self, version: int, expected: Sequence[Tensor]) -> dict[str, Any]:
        """Returns the report of weights that went through the object store."""
        # Here, because the driver imports this file as well, and DeepSpeed is imported on training workers only.
        from raycomplete.training.deepspeed_engine import gathered_adapters, gathered_state

        job, adapters_only = self._job, self._job.train.lora_rank > 0
        state: Any = gathered_adapters(self._lm) if adapters_only else gathered_state(self._lm, job.train.zero_stage)

        def send() -> dict[str, Any]:
            engines: StudentEngines = job.student_engines
            named = state if adapters_only else with_file_names(self._lm, state)
            return engines.sync(named, version, self._probe, expected, adapters_only=adapters_only)

        return from_rank_zero(send)

    def _log_probs(self) -> list[Tensor]:
        """The trainer's log-probabilities of each probe's response tokens, nats."""
        self._engine.eval()
        with torch.no_grad():
            (log_probs_N,) = self._engine(self._batch.to(self._engine.device), "log_probs")
        self._engine.train()
        return list(log_probs_N.float().cpu().split(self._lengths))
