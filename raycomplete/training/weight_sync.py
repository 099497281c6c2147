"""Hands the student's weights from the trainer to the rollout engines, whatever way they are sharded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from raycomplete.data.samples import AnchorSample
from raycomplete.runtime.errors import WorkError
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.deepspeed_engine import gathered_adapters, gathered_state
from raycomplete.training.on_policy import StudentPolicy
from raycomplete.training.step_plan import AnchorItem, StepPlan

_PROBES = 4
_PROBE_TOKENS = 16


class WeightSync:
    """One update after another; every rank must call it, since ZeRO-3 gathers shards from all of them.

    Args:
        engine: DeepSpeed engine around the student.
        lm: The student's language model (with adapters, where it has some).
        policy: The rollout engines.
        samples: Anchor samples; the first few are the probe that proves an update.
        zero_stage: Of the run.
        adapters_only: Whether only LoRA adapters are trained, which are then all that travels.
        packed: Whether the probe's sequences may share rows, as in training.
    """

    def __init__(
        self,
        engine: Any,
        lm: Any,
        policy: StudentPolicy,
        samples: tuple[AnchorSample, ...],
        *,
        zero_stage: int,
        adapters_only: bool,
        packed: bool,
    ) -> None:
        self._engine, self._lm, self._policy = engine, lm, policy
        self._zero_stage = zero_stage
        self._adapters_only = adapters_only
        cut = [
            AnchorSample(sample.sample_id, sample.prompt_ids, sample.answer_ids[:_PROBE_TOKENS])
            for sample in samples[:_PROBES]
        ]
        self._probe = [(sample.prompt_ids + sample.answer_ids, len(sample.prompt_ids)) for sample in cut]
        items = [AnchorItem(sample) for sample in cut]
        self._builder = BatchBuilder(penalty=False, contrastive=False, scale=1.0, packed=packed)
        self._batch = self._builder.build(items, StepPlan(tuple(items), ()), None)
        self._lengths = [len(sample.answer_ids) for sample in cut]

    def __call__(self, version: int) -> dict[str, Any]:
        """Sends the present weights as `version` and returns the report, on every rank.

        Raises:
            WorkError: The engines did not take the weights, or speak differently from the trainer.
        """
        started = time.perf_counter()
        expected = self._own_log_probs()
        state: Mapping[str, Any] | None
        if self._adapters_only:
            state = gathered_adapters(self._lm)
        else:
            state = gathered_state(self._engine, self._lm, self._zero_stage)
        outcome: list[Any] = [None, None]
        if state is not None:
            try:
                report = self._policy.sync(state, version, self._probe, expected, adapters_only=self._adapters_only)
                outcome = [report | {"seconds": time.perf_counter() - started}, None]
            except Exception as error:  # told to the other ranks first: they wait in the broadcast below
                outcome = [None, error]
        failure = outcome[1]
        shared = [outcome[0], None if failure is None else str(failure)]
        dist.broadcast_object_list(shared, src=0)
        if failure is not None:
            raise failure
        if shared[1] is not None:
            raise WorkError(f"Rank 0 could not update the rollout engines ({shared[1]}).")
        result: dict[str, Any] = shared[0]
        return result

    def _own_log_probs(self) -> list[torch.Tensor]:
        self._engine.eval()
        with torch.no_grad():
            (log_probs_N,) = self._engine(self._batch.to(self._engine.device), "log_probs")
        self._engine.train()
        return list(log_probs_N.float().cpu().split(self._lengths))
