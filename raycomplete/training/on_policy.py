"""On-policy training: the student's own rollouts decide what a step trains.

A step starts as a rollout batch: harmful prompts with h cut at a drawn depth. The student continues each of them under
its latest weights. Where it refuses, its refusal is distilled, and what it wrote before becomes part of h; where it
complies, the aligned model's refusal is distilled at the cut. More is rolled out than trained, and rollouts that still
comply are trained first, then those that refuse late: what the student recovers from already teaches it little. Methods
that train rollouts as they are get them in groups with rewards instead. The scheme is ours, not that of arXiv
2511.12155.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomplete.config import RolloutConfig, TrainConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import with_file_names
from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.weight_transfer import WeightTransfer
from raycomplete.engines.weights import SentWeights, Weights, WeightsLostError
from raycomplete.methods.registry import AnchorItem, RecoveryItem, RolloutGroups
from raycomplete.runtime.types import Judge, Outcome, Prompt
from raycomplete.training.batches import answer_batch
from raycomplete.training.checkpoints import from_rank_zero
from raycomplete.training.sampling import tokens_before_refusal
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan
from raycomplete.training.teacher_prefetcher import StepInput, StepSource

_PROBES = 4
_PROBE_TOKENS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """One step before the student has written its part."""

    step: int
    anchor: tuple[AnchorSample, ...]
    recovery: tuple[RecoverySample, ...]
    depths: tuple[int, ...]  # tokens that are kept of the `harmful_ids` of each recovery sample
    is_graded: bool = False  # the student answers the anchor prompts as well

    def sequences(self) -> list[list[int]]:
        """Token ids that the student continues: every recovery sample, then the anchor prompts of a graded batch."""
        recovery = [
            [*sample.prompt_ids, *sample.harmful_ids[:depth]]
            for sample, depth in zip(self.recovery, self.depths, strict=True)
        ]
        return recovery + [list(sample.prompt_ids) for sample in self.anchor if self.is_graded]


@dataclass(frozen=True, slots=True)
class Rollout:
    """The student's continuation of one sequence."""

    token_ids: tuple[int, ...]  # new tokens without end-of-response
    ending_ids: tuple[int, ...]  # end-of-response, where the response ended by itself
    refused: bool
    version: int  # finished training steps of the weights that wrote it
    refusal_start: int | None = None  # tokens before a refusal after h begins; None where the judge finds none


class StudentEngines:
    """Rollout engines that hold the student; picklable, so that training workers can use them."""

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
        self._may_start_again = False  # engines to which weights were sent
        self.is_sending = pool.options.spec.weight_transfer is not None  # from device to device; alike on every rank

    def attach(
        self, engine: Any, lm: Any, train: TrainConfig, samples: Sequence[AnchorSample], *, packed: bool
    ) -> None:
        """Names the trainer's student, whose weights `update` hands over, in a training worker.

        The first few samples are the probe that proves an update; with `packed` they share rows, as in training.
        """
        self._engine, self._lm, self._train = engine, lm, train
        self.is_sending = self.is_sending and not train.lora_rank
        cut = [
            AnchorSample(sample.sample_id, sample.prompt_ids, sample.answer_ids[:_PROBE_TOKENS])
            for sample in samples[:_PROBES]
        ]
        self._probe = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in cut]
        self._batch = answer_batch(cut, packed=packed)
        self._lengths = [len(sample.answer_ids) for sample in cut]

    def update(self, version: int) -> dict[str, Any]:
        """Gives the engines the present weights, proves that they use them, and returns the report for metrics.jsonl.

        Every rank must call this. Weights go from device to device until that fails once, then through the object
        store. `version` counts the finished training steps.
        """
        # Imported here because the driver imports this file as well, and only training workers import DeepSpeed.
        from raycomplete.training.deepspeed_engine import gathered_adapters, gathered_state

        started, report, stage = time.perf_counter(), None, self._train.zero_stage
        expected = self._log_probs()
        if self.is_sending:
            sent: Any = gathered_state(self._lm, stage, copied=False)
            report = from_rank_zero(lambda: self._sent(with_file_names(self._lm, sent), version, expected))
        if report is None:
            self.is_sending = False
            lora = self._train.lora_rank > 0
            state: Any = gathered_adapters(self._lm) if lora else gathered_state(self._lm, stage)
            report = from_rank_zero(
                lambda: self._stored(state if lora else with_file_names(self._lm, state), version, expected)
            )
        return report | {"seconds": time.perf_counter() - started}

    def _sent(self, state: Mapping[str, Tensor], version: int, expected: Sequence[Tensor]) -> dict[str, Any] | None:
        """Sends weights from device to device; None where that failed."""
        self._may_start_again = True
        try:
            self._transfer = self._transfer or WeightTransfer(self._pool)
            started = time.perf_counter()
            weights = self._transfer.send(state, version)
            seconds = time.perf_counter() - started
            report = asdict(self._pool.sync(weights, self._probe, expected)) | {"load_s": seconds}
        except Exception as error:  # of vLLM, NCCL or CUDA: the object store needs none of them
            logger.warning("From step %d on weights go through the object store: %s", version, error, exc_info=True)
            return None
        self._weights = weights
        return report

    def _stored(self, state: Mapping[str, Any], version: int, expected: Sequence[Tensor]) -> dict[str, Any]:
        """Hands over whole weights, or LoRA adapters (A, B, scale) by weight, through the object store."""
        if self._transfer is not None:  # it failed, or an engine died: a group of processes holds memory of the device
            self._transfer.close()
            self._transfer = None
        if self._may_start_again:  # which takes longer than an update
            self._pool.wait_until_ready(self._start_timeout_s)
            self._may_start_again = False
        weights = self._pool.pack_lora(state, version) if self._train.lora_rank else self._pool.pack(state, version)
        report = self._pool.sync(weights, self._probe, expected)
        self._weights = weights
        return asdict(report)

    def _log_probs(self) -> list[Tensor]:
        """The trainer's log-probabilities of each probe's response tokens, nats."""
        self._engine.eval()
        with torch.no_grad():
            (log_probs_N,) = self._engine(self._batch.to(self._engine.device), "log_probs")
        self._engine.train()
        return list(log_probs_N.float().cpu().split(self._lengths))

    def submit(self, batch: RolloutBatch, seed: int) -> Any:
        """Starts the rollouts of a batch under the newest weights, and returns what `collect` waits for."""
        call = self._pool.submit(
            batch.sequences(),
            max_tokens=self._rollout.max_student_tokens,
            temperature=self._rollout.temperature,
            seed=seed,
            weights=self._weights,
        )
        # A call that is retried after a crash still names its weights, so they live until it is collected.
        return batch, call, self._weights

    def collect(self, reference: Any) -> list[Rollout]:
        """Waits for the judged rollouts of a batch, in the order of `RolloutBatch.sequences`."""
        batch, call, _ = reference
        rollouts = []
        for place, (tokens, finished) in enumerate(self._pool.collect(call)):
            start, prefill = None, ""
            if place < len(batch.recovery):
                sample = batch.recovery[place]
                # The judge does not read the refusal prefix: that imitates what it looks for.
                prefill = self._codec.decode(sample.harmful_ids[sample.refusal_prefix_tokens : batch.depths[place]])
                start = tokens_before_refusal(self._judge, self._codec, tokens)
            else:
                sample = batch.anchor[place - len(batch.recovery)]
            prompt = self._prompts[sample.prompt_id]
            refused = self._judge.outcome(prompt, prefill, self._codec.decode(tokens)) is Outcome.REFUSED
            ending = (self._codec.eos_id,) if finished else ()
            rollouts.append(Rollout(tuple(tokens), ending, refused, call.version, start))
        return rollouts


logger = logging.getLogger(__name__)

_CUT_TAG, _ROLLOUT_TAG = 14, 16  # every use of a seed needs a tag that is not 0
_ROOM_FOR_SEEDS = 2**20  # sequence i of a batch samples under its seed + i


class RolloutPlanner:
    """Draws rollout batches and turns their rollouts into plans; a pure function of seed, step and sampler state."""

    def __init__(
        self,
        planner: Planner,
        rollout: RolloutConfig,
        seed: int,
        recovery_batch_size: int,
        groups: RolloutGroups | None = None,
    ) -> None:
        self._planner, self._rollout = planner, rollout
        self._seed, self._recovery_batch_size, self._groups = seed, recovery_batch_size, groups

    def draw(self, step: int, sampler: DepthSampler) -> RolloutBatch:
        """The rollout batch of a step under the sampler's present state."""
        plan = self._planner.plan(step, sampler)
        if self._groups is None:
            recovery = tuple(item.sample for item in plan.recovery)
            depths = tuple(item.depth for item in plan.recovery)
            return RolloutBatch(step, tuple(item.sample for item in plan.anchor), recovery, depths)
        # Each prompt and cut several times; the student answers harmless prompts, too.
        rng, each = np.random.default_rng([self._seed, _CUT_TAG, step + 1]), self._groups.each
        items = plan.recovery[: self._recovery_batch_size // each]
        cut = [(item.sample, 0 if rng.random() < self._groups.plain_fraction else item.depth) for item in items]
        repeated = [pair for pair in cut for _ in range(each)]  # none without recovery samples
        recovery, depths = tuple(sample for sample, _ in repeated), tuple(depth for _, depth in repeated)
        harmless = plan.anchor[: len(plan.anchor) // each]
        anchor = tuple(item.sample for item in harmless for _ in range(each))
        return RolloutBatch(step, anchor, recovery, depths, is_graded=True)

    def seed_of(self, step: int) -> int:
        """First sampling seed of a step's rollouts."""
        drawn = np.random.default_rng([self._seed, _ROLLOUT_TAG, step + 1]).integers(2**40)
        return int(drawn) * _ROOM_FOR_SEEDS

    def finish(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> StepPlan:
        """The plan of a step, from its rollout batch and what the student wrote."""
        if self._groups is not None:
            return self._graded(batch, rollouts, self._groups.each)
        drawn = list(zip(batch.recovery, batch.depths, rollouts, strict=True))
        drawn.sort(key=lambda item: item[2].refused * (1 if item[2].refusal_start else 2))  # equals stay in order
        recovery = tuple(self._recovery_item(*item) for item in drawn[: self._recovery_batch_size])
        return StepPlan(tuple(AnchorItem(sample) for sample in batch.anchor), recovery)

    def _graded(self, batch: RolloutBatch, rollouts: Sequence[Rollout], each: int) -> StepPlan:
        """Rollouts as they are; the reward is refusing a harmful prompt, and not refusing a harmless one."""
        count = len(batch.recovery)
        rewards = [float(item.refused if place < count else not item.refused) for place, item in enumerate(rollouts)]
        advantages = group_advantages(rewards, each)
        written = [item.token_ids + item.ending_ids for item in rollouts]
        recovery = [
            RecoveryItem(
                replace(sample, harmful_ids=sample.harmful_ids[:depth], refusal_ids=ids), depth, advantage=advantage
            )
            for sample, depth, ids, advantage in zip(
                batch.recovery, batch.depths, written[:count], advantages[:count], strict=True
            )
        ]
        anchor = [
            AnchorItem(replace(sample, answer_ids=ids or sample.answer_ids), advantage)
            for sample, ids, advantage in zip(batch.anchor, written[count:], advantages[count:], strict=True)
        ]
        return StepPlan(tuple(anchor), tuple(recovery))

    def _recovery_item(self, sample: RecoverySample, depth: int, rollout: Rollout) -> RecoveryItem:
        if not rollout.refused or rollout.refusal_start is None:
            return RecoveryItem(sample, depth)
        kept = rollout.refusal_start  # the teacher must not read words of compliance as the start of its answer
        refusal_ids = (rollout.token_ids[kept:] + rollout.ending_ids)[: self._rollout.max_refusal_tokens]
        first_id, sample = sample.refusal_ids[0], replace(sample, refusal_ids=refusal_ids)
        if kept:  # else the teachers have read all of h already
            sample = replace(sample, harmful_ids=sample.harmful_ids[:depth] + rollout.token_ids[:kept])
        return RecoveryItem(sample, depth + kept, first_id)


def _restored(row: dict[str, Any]) -> Rollout:
    return Rollout(**row | {name: tuple(row[name]) for name in ("token_ids", "ending_ids")})


def group_advantages(rewards: Sequence[float], each: int) -> list[float]:
    """Rewards less the mean of their group, over its standard deviation; 0 in a group of equal rewards."""
    reward_GE = np.asarray(rewards, dtype=np.float64).reshape(-1, each)
    centred_GE = reward_GE - reward_GE.mean(axis=1, keepdims=True)
    deviation_G1 = reward_GE.std(axis=1, keepdims=True)
    advantages_GE = np.where(deviation_G1 > 0, centred_GE / np.maximum(deviation_G1, 1e-6), 0.0)
    return [float(advantage) for advantage in advantages_GE.ravel()]


def compliance_by_bin(
    batch: RolloutBatch, rollouts: Sequence[Rollout], sampler: DepthSampler
) -> tuple[list[float], list[int]]:
    """Counts answers that comply, and all answers, by depth bin of the cut [num_bins each].

    Cuts before the first bin, of prompts that a group asks plainly or where h is shorter, count in none.
    """
    complied, asked = [0.0] * sampler.num_bins, [0] * sampler.num_bins
    rollouts = rollouts[: len(batch.recovery)]
    for sample, depth, rollout in zip(batch.recovery, batch.depths, rollouts, strict=True):
        reached = depth - sample.refusal_prefix_tokens
        if reached >= sampler.bin_ranges[0][0]:
            index = sampler.bin_of(reached)
            complied[index] += not rollout.refused
            asked[index] += 1
    return complied, asked


class OnPolicySource(StepSource):
    """Yields steps made of the student's rollouts.

    When step n begins, the engines have finished the rollouts for n; they get the weights of n finished steps, start on
    the rollouts for n + `TrainJob.rollouts_ahead`, and the trainer works on n meanwhile. Every rank draws and finishes
    the same batches by itself; only rank 0 asks the engines, and shares what they wrote.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        seed, method = self.job.train.seed, self.job.method
        size, groups = method.recovery_batch_size, method.rollout_groups
        self._rollout_planner = RolloutPlanner(self.planner, self.job.rollout, seed, size, groups)
        self._engines: StudentEngines = self.job.student_engines
        self._batches: dict[int, RolloutBatch] = {}  # steps whose rollouts are asked for
        self._rollouts: dict[int, Future[list[Rollout]]] = {}  # the same steps, on rank 0
        self._collector = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._is_synced = False
        self._repeated: dict[str, Any] = {}  # measurements of an update that was made again within a step

    def next(self, step: int) -> StepInput:
        """Waits for the input of a step and asks for the rollouts of later ones; every rank must call this."""
        is_requested = step in self._batches
        taken = self._take_or_repeat(step) if is_requested else None
        self._make_room()
        stats = self._repeated or self._update_engines(step)
        for ahead in range(step + is_requested, min(step + self.job.rollouts_ahead + 1, self.job.train.steps)):
            if ahead not in self._batches:
                self._start(self._rollout_planner.draw(ahead, self.sampler))
        batch, rollouts, waited_s = taken or self._take_or_repeat(step)
        stats, self._repeated = self._repeated or stats, {}
        plan = self._rollout_planner.finish(batch, rollouts)
        anchor = [item.sample for item in plan.anchor[self.share]]
        recovery = [item.sample for item in plan.recovery[self.share]]
        self.prefetcher.request(step, anchor, recovery)
        scores = self.prefetcher.take(step)
        complied, asked = compliance_by_bin(batch, rollouts, self.sampler)
        continued = rollouts[: len(batch.recovery)]  # of harmful prompts, plain ones of a group too
        stats |= {
            "rollout_wait_s": waited_s,
            "teacher_wait_s": scores.wait_s,
            "staleness": max((step - rollout.version for rollout in rollouts), default=0),
            "rollout_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
            "late_refusals": sum(rollout.refused and bool(rollout.refusal_start) for rollout in rollouts),
            "compliance": sum(not rollout.refused for rollout in continued) / max(len(continued), 1),
            "depth_compliance": [part / count if count else None for part, count in zip(complied, asked, strict=True)],
        }
        return StepInput(plan, scores, stats, (complied, asked))

    def can_stop(self, finished: int) -> bool:
        """Training may stop only at a weight update, because resumed engines load the newest weights."""
        return self._is_update_due(finished)

    def state_dict(self) -> dict[str, Any]:
        """Waits for pending rollouts and returns them. On resume, rollouts made with lost weights are made again."""
        return {
            "rollouts": [
                {
                    "step": step,
                    "depths": list(self._batches[step].depths),
                    "rollouts": [asdict(rollout) for rollout in future.result()],
                }
                for step, future in sorted(self._rollouts.items())
                if not isinstance(future.exception(), WeightsLostError)
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for item in state["rollouts"]:
            # The depths were drawn under an earlier state of the sampler.
            batch = replace(self._rollout_planner.draw(item["step"], self.sampler), depths=tuple(item["depths"]))
            self._batches[batch.step] = batch
            if self.rank == 0:
                done: Future[list[Rollout]] = Future()
                done.set_result([_restored(row) for row in item["rollouts"]])
                self._rollouts[batch.step] = done

    def _start(self, batch: RolloutBatch) -> None:
        """Starts rollouts under the engines' present weights."""
        self._batches[batch.step] = batch
        if self.rank == 0:
            reference = self._engines.submit(batch, self._rollout_planner.seed_of(batch.step))
            self._rollouts[batch.step] = self._collector.submit(self._collect, batch, reference)

    def _collect(self, batch: RolloutBatch, reference: Any) -> list[Rollout]:
        """Waits for the rollouts of a batch, and lets the teachers read its sequences ahead of their step."""
        rollouts = self._engines.collect(reference)
        plan = self._rollout_planner.finish(batch, rollouts)
        self.prefetcher.warm([item.sample for item in plan.anchor], [item.sample for item in plan.recovery])
        return rollouts

    def _take(self, step: int) -> tuple[RolloutBatch, list[Rollout], float]:
        """A requested step's batch and rollouts, on every rank, and the seconds that they were waited for."""
        started = time.perf_counter()
        batch = self._batches.pop(step)
        rollouts = from_rank_zero(lambda: self._rollouts.pop(step).result())
        return batch, rollouts, time.perf_counter() - started

    def _take_or_repeat(self, step: int) -> tuple[RolloutBatch, list[Rollout], float]:
        """Takes a step's rollouts; those whose weights died with an engine are made again, by the present weights."""
        started, batch = time.perf_counter(), self._batches[step]
        try:
            return self._take(step)
        except WeightsLostError as error:  # on every rank
            logger.warning("The rollouts of step %d are made again, by present weights: %s", step + 1, error)
        self._engines.is_sending = self._is_synced = False  # from here on the object store keeps weights
        self._make_room()
        self._repeated = self._update_engines(step)
        self._start(batch)
        return batch, self._take(step)[1], time.perf_counter() - started

    def _make_room(self) -> None:
        """Gives back what the trainer's allocator keeps of a shared GPU: an engine that wakes takes all of its own."""
        if self.job.use_gpu and self.job.rollout.colocated:
            torch.cuda.empty_cache()

    def _update_engines(self, step: int) -> dict[str, Any]:
        if self._is_synced and not self._is_update_due(step):
            return {"sync_s": 0.0}
        self._is_synced = True
        report = self._engines.update(step)
        return {"sync_s": report["seconds"], "sync": report}

    def _is_update_due(self, step: int) -> bool:
        """Weights also go out at every checkpoint, so that a run resumed there rolls out under the same ones."""
        return step % self.job.rollout.sync_every == 0 or step % self.job.train.checkpoint_every == 0
