"""On-policy training: the student's own rollouts decide what a step trains.

A step starts as a rollout batch: harmful prompts with h cut at a drawn depth, and some harmless prompts with the
aligned model's answer cut at a random place. The student continues each of them under its latest weights. Where it
refuses a harmful prompt, its refusal is distilled, and what it wrote before it becomes part of h; where it complies,
the aligned model's refusal is distilled after a random part of what the student wrote. More is rolled out than trained,
and rollouts that still comply are trained first, then those that refuse late: what the student recovers from already
teaches it little. Methods that train rollouts as they are get them in groups with rewards instead. The scheme is ours,
not that of arXiv 2511.12155.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from raycomplete.config import RolloutConfig
from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.engines.weights import WeightsLostError
from raycomplete.methods.registry import AnchorItem, RecoveryItem, RolloutGroups
from raycomplete.training.checkpoints import from_rank_zero
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.job import TrainJob
from raycomplete.training.rollout_engines import Rollout, RolloutBatch, WeightSync
from raycomplete.training.step_plan import Planner, StepPlan
from raycomplete.training.teacher_prefetcher import StepInput, StepSource, TeacherPrefetcher

logger = logging.getLogger(__name__)

_CUT_TAG, _SPLIT_TAG, _ROLLOUT_TAG = 14, 15, 16  # every use of a seed needs a tag that is not 0
_ROOM_FOR_SEEDS = 2**20  # sequence i of a batch samples under its seed + i


class RolloutPlanner:
    """Draws rollout batches and turns their rollouts into step plans; a pure function of seed, step and sampler state.

    Args:
        planner: Draws the samples, `rollout.oversample` times as many for recovery as are trained.
        rollout: Share of anchor samples that the student answers itself (`anchor_on_policy`), share of complying
            rollouts whose words become part of h (`student_prefix_fraction`; the others only point at the depths where
            the student fails), and the longest refusal of the student that is distilled (`max_refusal_tokens`).
        seed: Seed of cuts, splits and rollouts.
        recovery_batch_size: Recovery sequences of a step that are trained.
        groups: Rollouts that are trained as they are; None makes recovery of them.
    """

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
        rng = np.random.default_rng([self._seed, _CUT_TAG, step + 1])
        if self._groups is not None:
            return self._grouped(step, plan, self._groups, rng)
        anchor = tuple(item.sample for item in plan.anchor)
        cuts = []
        for sample in anchor:
            is_drawn, place = rng.random() < self._rollout.anchor_on_policy, rng.random()
            # A harmful prompt's answer is a refusal, and the student's own words in its place might comply.
            is_cut = is_drawn and sample.kind == "benign"
            cuts.append(int(place * len(sample.answer_ids)) if is_cut else None)
        recovery = tuple(item.sample for item in plan.recovery)
        return RolloutBatch(step, anchor, tuple(cuts), recovery, tuple(item.depth for item in plan.recovery))

    def _grouped(self, step: int, plan: StepPlan, groups: RolloutGroups, rng: np.random.Generator) -> RolloutBatch:
        """Draws the sequences of a step, each prompt and cut several times; harmless prompts are answered anew."""
        items = plan.recovery[: self._recovery_batch_size // groups.each]
        cut = [(item.sample, 0 if rng.random() < groups.plain_fraction else item.depth) for item in items]
        rolled_out = [pair for pair in cut for _ in range(groups.each)]  # none without recovery samples
        samples, depths = tuple(sample for sample, _ in rolled_out), tuple(depth for _, depth in rolled_out)
        harmless = plan.anchor[: len(plan.anchor) // groups.each]
        anchor = tuple(item.sample for item in harmless for _ in range(groups.each))
        return RolloutBatch(step, anchor, (0,) * len(anchor), samples, depths, is_graded=True)

    def seed_of(self, step: int) -> int:
        """First sampling seed of a step's rollouts."""
        drawn = np.random.default_rng([self._seed, _ROLLOUT_TAG, step + 1]).integers(2**40)
        return int(drawn) * _ROOM_FOR_SEEDS

    def finish(self, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> StepPlan:
        """The plan of a step, from its rollout batch and what the student wrote."""
        rng = np.random.default_rng([self._seed, _SPLIT_TAG, batch.step + 1])
        count = len(batch.recovery)
        if self._groups is not None:
            return self._graded(batch, rollouts, self._groups.each)
        drawn = list(zip(batch.recovery, batch.depths, rollouts[:count], rng.random(count), strict=True))
        drawn.sort(key=lambda item: item[2].refused * (1 if item[2].refusal_start else 2))  # equals stay in order
        recovery = tuple(self._recovery_item(*item) for item in drawn[: self._recovery_batch_size])
        written = iter(rollouts[count:])
        anchor = tuple(
            AnchorItem(sample if cut is None else _continued(sample, cut, next(written)))
            for sample, cut in zip(batch.anchor, batch.cuts, strict=True)
        )
        return StepPlan(anchor, recovery)

    def _graded(self, batch: RolloutBatch, rollouts: Sequence[Rollout], each: int) -> StepPlan:
        """Rollouts as they are; the reward is refusing a harmful prompt, and not refusing a harmless one."""
        count = len(batch.recovery)
        rewards = [float(item.refused if place < count else not item.refused) for place, item in enumerate(rollouts)]
        advantages = group_advantages(rewards, each)
        recovery = tuple(
            RecoveryItem(
                replace(sample, harmful_ids=sample.harmful_ids[:depth], refusal_ids=item.token_ids + item.ending_ids),
                depth,
                advantage=advantage,
            )
            for sample, depth, item, advantage in zip(
                batch.recovery, batch.depths, rollouts[:count], advantages[:count], strict=True
            )
        )
        anchor = tuple(
            AnchorItem(_continued(sample, 0, item), advantage)
            for sample, item, advantage in zip(batch.anchor, rollouts[count:], advantages[count:], strict=True)
        )
        return StepPlan(anchor, recovery)

    def _recovery_item(self, sample: RecoverySample, depth: int, rollout: Rollout, place: float) -> RecoveryItem:
        first_id = None
        if rollout.refused and rollout.refusal_start is not None:
            kept = rollout.refusal_start  # the teacher must not read words of compliance as the start of its answer
            refusal_ids = (rollout.token_ids[kept:] + rollout.ending_ids)[: self._rollout.max_refusal_tokens]
            sample, first_id = replace(sample, refusal_ids=refusal_ids), sample.refusal_ids[0]
        else:
            # `place` is uniform on [0, 1): below the fraction it is also where the student's words are cut.
            fraction = self._rollout.student_prefix_fraction
            share = place / fraction if place < fraction and not rollout.refused else 0.0
            kept = int(share * (len(rollout.token_ids[: rollout.refusal_start]) + 1))  # some refuse in the end
        if not kept:  # then the teachers have read all of h already
            return RecoveryItem(sample, depth, first_id)
        harmful_ids = sample.harmful_ids[:depth] + rollout.token_ids[:kept]
        return RecoveryItem(replace(sample, harmful_ids=harmful_ids), depth + kept, first_id)


def group_advantages(rewards: Sequence[float], each: int) -> list[float]:
    """Rewards less the mean of their group, over its standard deviation; 0 in a group of equal rewards."""
    reward_GE = np.asarray(rewards, dtype=np.float64).reshape(-1, each)
    centred_GE = reward_GE - reward_GE.mean(axis=1, keepdims=True)
    deviation_G1 = reward_GE.std(axis=1, keepdims=True)
    advantages: list[float] = (
        np.where(deviation_G1 > 0, centred_GE / np.maximum(deviation_G1, 1e-6), 0.0).ravel().tolist()
    )
    return advantages


def _continued(sample: AnchorSample, cut: int, rollout: Rollout) -> AnchorSample:
    answer_ids = sample.answer_ids[:cut] + rollout.token_ids + rollout.ending_ids
    return replace(sample, answer_ids=answer_ids) if answer_ids else sample


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
    """Hands out steps made of the student's rollouts, under weights at most `rollout.max_staleness` steps old.

    When step n begins, the engines have finished the rollouts for n; they get the weights of n finished steps, start on
    the rollouts for n + lookahead, and the trainer works on n meanwhile. Every rank draws and finishes the same batches
    by itself; only rank 0 asks the engines, and shares what they wrote.
    """

    def __init__(
        self,
        job: TrainJob,
        planner: Planner,
        prefetcher: TeacherPrefetcher,
        sampler: DepthSampler,
        rank: int,
        world_size: int,
        sync: WeightSync,
    ) -> None:
        super().__init__(job, planner, prefetcher, sampler, rank, world_size)
        seed, recovery_batch_size = job.train.seed, job.method.recovery_batch_size
        groups = job.method.rollout_groups
        self._rollout_planner = RolloutPlanner(planner, job.rollout, seed, recovery_batch_size, groups)
        self._sync = sync
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
        for ahead in range(step + is_requested, min(step + self._job.rollout.lookahead + 1, self._job.train.steps)):
            self._request(ahead)
        batch, rollouts, waited_s = taken or self._take_or_repeat(step)
        stats, self._repeated = self._repeated or stats, {}
        plan = self._rollout_planner.finish(batch, rollouts)
        anchor = [item.sample for item in plan.anchor[self._share]]
        recovery = [item.sample for item in plan.recovery[self._share]]
        self._prefetcher.request(step, anchor, recovery)
        scores = self._prefetcher.take(step)
        complied, asked = compliance_by_bin(batch, rollouts, self._sampler)
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
        """True where weights are due: resumed engines get the newest ones, and others may have to wait for them."""
        return self._is_update_due(finished)

    def state_dict(self) -> dict[str, Any]:
        """Rollouts of later steps, waited for; a resumed run makes those anew whose weights died with an engine."""
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
        """Takes up saved rollouts."""
        for item in state["rollouts"]:
            # The depths were drawn under an earlier state of the sampler.
            batch = replace(self._rollout_planner.draw(item["step"], self._sampler), depths=tuple(item["depths"]))
            self._batches[batch.step] = batch
            if self._rank == 0:
                done: Future[list[Rollout]] = Future()
                done.set_result(
                    [
                        Rollout(**row | {name: tuple(row[name]) for name in ("token_ids", "ending_ids")})
                        for row in item["rollouts"]
                    ]
                )
                self._rollouts[batch.step] = done

    def _request(self, step: int) -> None:
        """Starts the rollouts of a step under the engines' present weights; asking twice does nothing."""
        if step in self._batches:
            return
        batch = self._batches[step] = self._rollout_planner.draw(step, self._sampler)
        self._start(batch)

    def _start(self, batch: RolloutBatch) -> None:
        if self._rank == 0:
            reference = self._job.student_engines.submit(batch, self._rollout_planner.seed_of(batch.step))
            self._rollouts[batch.step] = self._collector.submit(self._collect, batch, reference)

    def _collect(self, batch: RolloutBatch, reference: Any) -> list[Rollout]:
        """Waits for the rollouts of a batch, and lets the teachers read its sequences ahead of their step."""
        rollouts: list[Rollout] = self._job.student_engines.collect(reference)
        plan = self._rollout_planner.finish(batch, rollouts)
        self._prefetcher.warm([item.sample for item in plan.anchor], [item.sample for item in plan.recovery])
        return rollouts

    def _take(self, step: int) -> tuple[RolloutBatch, list[Rollout], float]:
        """A requested step's batch and rollouts, on every rank, and the seconds that they were waited for."""
        started = time.perf_counter()
        batch = self._batches.pop(step)
        rollouts = from_rank_zero(lambda: self._rollouts.pop(step).result())
        return batch, rollouts, time.perf_counter() - started

    def _take_or_repeat(self, step: int) -> tuple[RolloutBatch, list[Rollout], float]:
        """Takes a step's rollouts; those whose weights died with an engine are made again, by the present weights.

        Training has gone on, and nobody else had been sent them. From here on the object store keeps weights.
        """
        started, batch = time.perf_counter(), self._batches[step]
        try:
            return self._take(step)
        except WeightsLostError as error:  # on every rank
            logger.warning("The rollouts of step %d are made again, by present weights: %s", step + 1, error)
        self._sync.is_sending = self._is_synced = False
        self._make_room()
        self._repeated = self._update_engines(step)
        self._batches[step] = batch
        self._start(batch)
        return batch, self._take(step)[1], time.perf_counter() - started

    def _make_room(self) -> None:
        """Gives back what the trainer's allocator keeps of a shared GPU: an engine that wakes takes all of its own."""
        if self._job.use_gpu and self._job.rollout.colocated:
            torch.cuda.empty_cache()

    def _update_engines(self, step: int) -> dict[str, Any]:
        if self._is_synced and not self._is_update_due(step):
            return {"sync_s": 0.0}
        self._is_synced = True
        report = self._sync(step)
        return {"sync_s": report["seconds"], "sync": report}

    def _is_update_due(self, step: int) -> bool:
        """Weights also go out at every checkpoint, so that a run resumed there rolls out under the same ones."""
        return step % self._job.rollout.sync_every == 0 or step % self._job.train.checkpoint_every == 0
