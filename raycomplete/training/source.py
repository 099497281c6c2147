"""Where a step's sequences and scores come from: samples drawn before training, or the student's own rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from raycomplete.config import RolloutConfig, TrainConfig
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.on_policy import compliance_by_bin
from raycomplete.training.rollout_feed import RolledOut, RolloutFeed
from raycomplete.training.step_plan import Planner, StepPlan
from raycomplete.training.teacher_prefetcher import Scores, TeacherPrefetcher
from raycomplete.training.weight_sync import WeightSync


@dataclass(frozen=True)
class StepInput:
    """What a step trains on.

    Attributes:
        plan: Sequences of all workers.
        scores: Of this worker's share; None in SFT.
        stats: For the row of metrics.
        compliance: (times the student complied, times it was asked) by depth bin; None off-policy.
    """

    plan: StepPlan
    scores: Scores | None
    stats: dict[str, Any] = field(default_factory=dict)
    compliance: tuple[list[float], list[int]] | None = None


class StepSource(Protocol):
    """Hands out the steps in order; every rank calls it for every step."""

    def next(self, step: int) -> StepInput:
        """Waits for the input of a step and asks for later ones."""

    def can_stop(self, finished: int) -> bool:
        """Whether a run resumed after so many steps goes on as one that never stopped."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON types; complete on rank 0."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved run; every rank gets what rank 0 saved."""


class FixedSource:
    """Samples that were drawn before training, scored `prefetch` steps ahead.

    Args:
        planner: Draws the samples of a step.
        sampler: Draws their depths.
        prefetcher: Scores; None in SFT.
        share: (rank, world size).
        prefetch: Steps scored ahead.
        steps: Of the whole run.
    """

    def __init__(
        self,
        planner: Planner,
        sampler: DepthSampler,
        prefetcher: TeacherPrefetcher | None,
        *,
        share: tuple[int, int],
        prefetch: int,
        steps: int,
    ) -> None:
        self._planner, self._sampler, self._prefetcher = planner, sampler, prefetcher
        self._share = slice(share[0], None, share[1])
        self._prefetch, self._steps = prefetch, steps

    def next(self, step: int) -> StepInput:
        """See `StepSource`."""
        plan = self._planner.plan(step, self._sampler)
        if self._prefetcher is None:
            return StepInput(plan, None, {"teacher_wait_s": 0.0})
        for ahead in range(step, min(step + 1 + self._prefetch, self._steps)):
            if not self._prefetcher.is_requested(ahead):
                anchor, recovery = self._planner.samples_of(ahead)
                self._prefetcher.request(ahead, anchor[self._share], recovery[self._share])
        waited = self._prefetcher.wait_s
        scores = self._prefetcher.take(step)
        return StepInput(plan, scores, {"teacher_wait_s": self._prefetcher.wait_s - waited})

    def can_stop(self, finished: int) -> bool:
        """See `StepSource`."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the samples of a step are a function of seed, step and sampler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""


class OnPolicySource:
    """The student's own rollouts, under weights at most `rollout.max_staleness` steps old.

    When step n begins, the engines have finished the rollouts for n; they get the weights of n finished steps, start on
    the rollouts for n + lookahead, and the trainer works on n meanwhile.

    Args:
        rollouts: Rollouts of this and later steps.
        sync: Sends the student's weights to the engines.
        prefetcher: Scores.
        sampler: Draws depths.
        rollout: When weights are sent and how far ahead is rolled out.
        train: Number of steps, and when checkpoints are written.
        share: (rank, world size).
    """

    def __init__(
        self,
        rollouts: RolloutFeed,
        sync: WeightSync,
        prefetcher: TeacherPrefetcher,
        sampler: DepthSampler,
        rollout: RolloutConfig,
        train: TrainConfig,
        *,
        share: tuple[int, int],
    ) -> None:
        self._rollouts, self._sync, self._prefetcher, self._sampler = rollouts, sync, prefetcher, sampler
        self._rollout, self._train = rollout, train
        self._share = slice(share[0], None, share[1])
        self._synced = False

    def next(self, step: int) -> StepInput:
        """See `StepSource`."""
        waited = (self._rollouts.wait_s, self._prefetcher.wait_s)
        rolled = self._rollouts.take(step) if step in self._rollouts.steps else None
        stats = self._update_engines(step)
        first = step if rolled is None else step + 1
        for ahead in range(first, min(step + self._rollout.lookahead + 1, self._train.steps)):
            self._rollouts.request(ahead, self._sampler)
        rolled = rolled or self._rollouts.take(step)
        anchor = [item.sample for item in rolled.plan.anchor[self._share]]
        recovery = [item.sample for item in rolled.plan.recovery[self._share]]
        self._prefetcher.request(step, anchor, recovery)
        scores = self._prefetcher.take(step)
        stats |= {
            "rollout_wait_s": self._rollouts.wait_s - waited[0],
            "teacher_wait_s": self._prefetcher.wait_s - waited[1],
        }
        compliance = compliance_by_bin(rolled.rollout_batch, rolled.rollouts, self._sampler)
        return StepInput(rolled.plan, scores, stats | self._measured(step, rolled, compliance), compliance)

    def can_stop(self, finished: int) -> bool:
        """See `StepSource`. Resumed engines get the newest weights, which the others may have to wait for."""
        return self._is_update_due(finished)

    def state_dict(self) -> dict[str, Any]:
        """See `StepSource`."""
        return {"rollouts": self._rollouts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `StepSource`."""
        self._rollouts.load_state_dict(state["rollouts"], self._sampler)

    def _update_engines(self, step: int) -> dict[str, Any]:
        if self._synced and not self._is_update_due(step):
            return {"sync_s": 0.0}
        self._synced = True
        report = self._sync(step)
        return {"sync_s": report["seconds"], "sync": report}

    def _is_update_due(self, step: int) -> bool:
        """Weights also go out at every checkpoint, so that a run resumed there rolls out under the same ones."""
        return step % self._rollout.sync_every == 0 or step % self._train.checkpoint_every == 0

    def _measured(self, step: int, rolled: RolledOut, compliance: tuple[list[float], list[int]]) -> dict[str, Any]:
        complied, asked = compliance
        return {
            "staleness": max((step - rollout.version for rollout in rolled.rollouts), default=0),
            "rollout_tokens": sum(len(rollout.token_ids) for rollout in rolled.rollouts),
            "compliance": sum(complied) / max(sum(asked), 1),
            "depth_compliance": [
                value / count if count else None for value, count in zip(complied, asked, strict=True)
            ],
        }
