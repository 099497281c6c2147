"""The student's own rollouts: asked for ahead of the trainer, judged, and turned into training items.

A step starts as a rollout_batch: harmful prompts with a base continuation cut at a drawn depth, and some anchor prompts with
the aligned model's answer cut at a random place. The student goes on from each cut under its latest weights. Where it
refuses a harmful prompt, the refusal it wrote is distilled; where it goes on complying, so is the aligned model's
refusal after a random part of what it wrote. More is rolled out than trained: what is recovered already teaches little,
so rollouts that still comply are trained first. The scheme is ours, not that of arXiv 2511.12155.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.step_plan import AnchorItem, Planner, RecoveryItem, StepPlan

_CUT_TAG, _SPLIT_TAG, _ROLLOUT_TAG = 14, 15, 16  # every use of a seed needs a tag that is not 0
_ROOM_FOR_SEEDS = 2**20  # sequence i of a batch samples under its seed + i


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """What the student is asked to continue.

    Attributes:
        sample_id: Of the sample it came from.
        prompt_ids: Tokens up to where the response starts.
        prefill_ids: First tokens of the response.
        judged: Whether refusing counts: true on harmful prompts.
        refusal_prefix_tokens: How many tokens at the start of the prefill imitate a refusal, which no judge is to read.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    prefill_ids: tuple[int, ...]
    judged: bool
    refusal_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the student wrote.

    Attributes:
        token_ids: Without end-of-response.
        ending_ids: End-of-response, where the response ended by itself.
        refused: The judge's word on a judged request.
        version: Finished steps of the weights that wrote it.
    """

    token_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]
    refused: bool
    version: int


class StudentPolicy(Protocol):
    """The engines that hold the student. Implemented by `raycomplete.training.student_engines.StudentEngines`."""

    def sync(
        self,
        state: Mapping[str, Any],
        version: int,
        probe: Sequence[tuple[tuple[int, ...], int]],
        expected: Sequence[Tensor],
        *,
        adapters_only: bool,
    ) -> dict[str, Any]:
        """Gives the engines the student's weights and proves that they use them.

        Args:
            state: Weights by name, or LoRA adapters (A, B, scale) by the name of the weight they belong to.
            version: Finished steps of these weights.
            probe: (token ids, number of prompt tokens).
            expected: The trainer's own log-probabilities of each probe's response tokens.
            adapters_only: Whether `state` holds adapters.

        Returns:
            What `metrics.jsonl` keeps of it.
        """

    def submit(self, requests: Sequence[RolloutRequest], seed: int) -> Any:
        """Starts rollouts under the weights synchronised last, and returns a reference."""

    def collect(self, reference: Any) -> list[Rollout]:
        """Waits for the rollouts of a reference."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """A step before the student has written its part.

    Attributes:
        step: Which one.
        anchor: Samples as drawn.
        cuts: Kept tokens of each anchor answer; None keeps the aligned model's whole answer.
        recovery: Samples as drawn.
        depths: Where each h is cut.
    """

    step: int
    anchor: tuple[AnchorSample, ...]
    cuts: tuple[int | None, ...]
    recovery: tuple[RecoverySample, ...]
    depths: tuple[int, ...]

    def requests(self) -> list[RolloutRequest]:
        """What the student is asked for: recovery first, then the anchors that are cut."""
        recovery = [
            RolloutRequest(
                sample.sample_id,
                sample.prompt_ids,
                sample.harmful_ids[:depth],
                judged=True,
                refusal_prefix_tokens=sample.refusal_prefix_tokens,
            )
            for sample, depth in zip(self.recovery, self.depths, strict=True)
        ]
        anchor = [
            RolloutRequest(sample.sample_id, sample.prompt_ids, sample.answer_ids[:cut], judged=False)
            for sample, cut in zip(self.anchor, self.cuts, strict=True)
            if cut is not None
        ]
        return recovery + anchor


class RolloutBatcher:
    """Drafts steps and finishes them; a pure function of seed, step and sampler state.

    Args:
        planner: Draws the samples, `oversample` times as many for recovery as are trained.
        seed: Of cuts and splits.
        recovery_batch: Recovery sequences of a step that are trained.
        anchor_share: Share of anchor samples that the student answers itself.
        student_prefix_fraction: Share of complying rollouts whose words become part of h; the others only point at the cuts where
            the student fails.
        max_refusal_tokens: Longest refusal of the student that is distilled.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        seed: int,
        recovery_batch: int,
        anchor_share: float,
        student_prefix_fraction: float,
        max_refusal_tokens: int,
    ) -> None:
        self._planner = planner
        self._recovery_batch = recovery_batch
        self._seed = seed
        self._anchor_share = anchor_share
        self._own_words = student_prefix_fraction
        self._max_refusal_tokens = max_refusal_tokens

    def rollout_batch(self, step: int, sampler: DepthSampler) -> RolloutBatch:
        """The rollout_batch of a step under the sampler's present state."""
        plan = self._planner.plan(step, sampler)
        rng = np.random.default_rng([self._seed, _CUT_TAG, step + 1])
        anchor = tuple(item.sample for item in plan.anchor)
        cuts = []
        for sample in anchor:
            chosen, place = rng.random() < self._anchor_share, rng.random()
            # A harmful prompt's answer is a refusal, and the student's own words in its place might comply.
            is_own = chosen and sample.kind == "benign"
            cuts.append(int(place * len(sample.answer_ids)) if is_own else None)
        recovery = tuple(item.sample for item in plan.recovery)
        return RolloutBatch(step, anchor, tuple(cuts), recovery, tuple(item.depth for item in plan.recovery))

    def seed_of(self, step: int) -> int:
        """First sampling seed of a step's rollouts."""
        drawn = np.random.default_rng([self._seed, _ROLLOUT_TAG, step + 1]).integers(2**40)
        return int(drawn) * _ROOM_FOR_SEEDS

    def finish(self, rollout_batch: RolloutBatch, rollouts: Sequence[Rollout]) -> StepPlan:
        """The plan of a step, from its rollout_batch and what the student wrote."""
        rng = np.random.default_rng([self._seed, _SPLIT_TAG, rollout_batch.step + 1])
        count = len(rollout_batch.recovery)
        drawn = list(
            zip(rollout_batch.recovery, rollout_batch.depths, rollouts[:count], rng.random(count), strict=True)
        )
        chosen = sorted(drawn, key=lambda item: item[2].refused)[: self._recovery_batch]  # sorted keeps equals in order
        recovery = [self._recovery(*item) for item in chosen]
        written = iter(rollouts[count:])
        anchor = [
            AnchorItem(sample if cut is None else _continued(sample, cut, next(written)))
            for sample, cut in zip(rollout_batch.anchor, rollout_batch.cuts, strict=True)
        ]
        return StepPlan(tuple(anchor), tuple(recovery))

    def _recovery(self, sample: RecoverySample, depth: int, rollout: Rollout, place: float) -> RecoveryItem:
        if rollout.refused:
            refusal = (rollout.token_ids + rollout.ending_ids)[: self._max_refusal_tokens]
            return RecoveryItem(replace(sample, refusal_ids=refusal), depth)
        # `place` is uniform on [0, 1): below student_prefix_fraction it is also where the student's words are cut.
        share = place / self._own_words if place < self._own_words else 0.0
        kept = int(share * (len(rollout.token_ids) + 1))
        harmful = sample.harmful_ids[:depth] + rollout.token_ids[:kept]
        return RecoveryItem(replace(sample, harmful_ids=harmful), depth + kept)


def _continued(sample: AnchorSample, cut: int, rollout: Rollout) -> AnchorSample:
    answer = sample.answer_ids[:cut] + rollout.token_ids + rollout.ending_ids
    return replace(sample, answer_ids=answer) if answer else sample


def compliance_by_bin(
    rollout_batch: RolloutBatch, rollouts: Sequence[Rollout], sampler: DepthSampler
) -> tuple[list[float], list[int]]:
    """How often the student did not refuse, and how often it was asked, by depth bin of the prefill."""
    complied, asked = [0.0] * sampler.num_bins, [0] * sampler.num_bins
    count = len(rollout_batch.recovery)
    for sample, depth, rollout in zip(rollout_batch.recovery, rollout_batch.depths, rollouts[:count], strict=True):
        index = sampler.bin_of(max(depth - sample.refusal_prefix_tokens, sampler.bin_ranges[0][0]))
        complied[index] += not rollout.refused
        asked[index] += 1
    return complied, asked
