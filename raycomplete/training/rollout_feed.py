"""Keeps the next steps' rollouts under way while the trainer works on this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from raycomplete.runtime.errors import WorkError
from raycomplete.training.depth_sampler import DepthSampler
from raycomplete.training.on_policy import Rollout, RolloutBatch, RolloutBatcher, StudentPolicy
from raycomplete.training.step_plan import StepPlan
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher


@dataclass(frozen=True)
class RolledOut:
    """A step whose rollouts are there."""

    plan: StepPlan
    rollout_batch: RolloutBatch
    rollouts: tuple[Rollout, ...]


class RolloutFeed:
    """Rank 0 asks the engines and tells the other ranks; every rank drafts and finishes the same plans by itself.

    Args:
        policy: The rollout engines.
        batcher: Drafts and finishes plans.
        warm: Told the samples of a step as soon as its rollouts are there, so that they are scored ahead.
        rank: Of this worker.
    """

    def __init__(
        self, policy: StudentPolicy, batcher: RolloutBatcher, warm: Callable[[StepPlan], None], rank: int
    ) -> None:
        self._policy, self._batcher, self._warm, self._rank = policy, batcher, warm, rank
        self._batches: dict[int, RolloutBatch] = {}
        self._rollouts: dict[int, Future[list[Rollout]]] = {}  # on rank 0
        self._waiter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self.wait_s = 0.0

    @property
    def steps(self) -> list[int]:
        """Steps that are under way or there."""
        return sorted(self._batches)

    def request(self, step: int, sampler: DepthSampler) -> None:
        """Starts the rollouts of a step under the engines' present weights; asking twice does nothing."""
        if step in self._batches:
            return
        rollout_batch = self._batches[step] = self._batcher.rollout_batch(step, sampler)
        if self._rank == 0:
            reference = self._policy.submit(rollout_batch.requests(), self._batcher.seed_of(step))
            self._rollouts[step] = self._waiter.submit(self._finish, rollout_batch, reference)

    def take(self, step: int) -> RolledOut:
        """Waits for the rollouts of a requested step, on every rank; the waiting time is added to `wait_s`.

        Raises:
            WorkError: The engines failed or did not answer in time.
        """
        started = time.perf_counter()
        rollout_batch = self._batches.pop(step)
        failure: Exception | None = None
        shared: list[Any] = [None]
        if self._rank == 0:
            try:
                shared = [self._rollouts.pop(step).result()]
            except Exception as error:  # told to the other ranks first: they wait in the broadcast below
                failure = error
        dist.broadcast_object_list(shared, src=0)
        if failure is not None:
            raise failure
        if shared[0] is None:
            raise WorkError(f"Rank 0 got no rollouts for step {step + 1}.", "See its error; resume with --resume.")
        rollouts: list[Rollout] = shared[0]
        self.wait_s += time.perf_counter() - started
        return RolledOut(self._batcher.finish(rollout_batch, rollouts), rollout_batch, tuple(rollouts))

    def state_dict(self) -> list[dict[str, Any]]:
        """Rollouts of later steps, waited for, as plain JSON types: a resumed run goes on with them. On rank 0."""
        return [
            {
                "step": step,
                "depths": list(self._batches[step].depths),
                "rollouts": [asdict(rollout) for rollout in future.result()],
            }
            for step, future in sorted(self._rollouts.items())
        ]

    def load_state_dict(self, state: list[dict[str, Any]], sampler: DepthSampler) -> None:
        """Takes up saved rollouts; every rank calls it with the same state."""
        for item in state:
            rollout_batch = self._batcher.rollout_batch(item["step"], sampler)
            # The depths were drawn under an earlier state of the sampler.
            rollout_batch = RolloutBatch(
                rollout_batch.step,
                rollout_batch.anchor,
                rollout_batch.cuts,
                rollout_batch.recovery,
                tuple(item["depths"]),
            )
            self._batches[rollout_batch.step] = rollout_batch
            if self._rank == 0:
                done: Future[list[Rollout]] = Future()
                done.set_result([_rollout(row) for row in item["rollouts"]])
                self._rollouts[rollout_batch.step] = done

    def _finish(self, rollout_batch: RolloutBatch, reference: Any) -> list[Rollout]:
        rollouts = self._policy.collect(reference)
        self._warm(self._batcher.finish(rollout_batch, rollouts))
        return rollouts


def warm_scores(prefetcher: TeacherPrefetcher) -> Callable[[StepPlan], None]:
    """Lets the scorers read the samples of a plan ahead of the step that needs them."""

    def warm(plan: StepPlan) -> None:
        prefetcher.warm([item.sample for item in plan.anchor], [item.sample for item in plan.recovery])

    return warm


def _rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(tuple(row["token_ids"]), tuple(row["ending_ids"]), row["refused"], row["version"])
