"""Early stopping by the loss on training prompts that are held back from training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raycomplete.config import TrainConfig
from raycomplete.data.samples import SampleSet
from raycomplete.losses.loss import LossOutput
from raycomplete.methods.registry import AnchorItem, Feedback, Method, RecoveryItem
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.step_plan import StepPlan, StepSequences
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher

_NOTICEABLE = 0.99  # a value must fall by a hundredth to count as better


class Validator:
    """Measures the method's terms on held-back samples, and says when nothing gets better any more.

    The value that is watched is the sum of the method's validated terms, with the weights of the run file.
    Every rank measures the same samples: under ZeRO-3 a forward pass needs all ranks anyway.

    Args:
        engine: DeepSpeed engine around the student.
        samples: Its `held_back` is read.
        prefetcher: Scores; asked once, at the first measurement.
        builder: As in training; its scale is not used.
        method: Terms, rows and depths.
        train: Micro-batch and patience.
    """

    def __init__(
        self,
        engine: Any,
        samples: SampleSet,
        prefetcher: TeacherPrefetcher,
        builder: BatchBuilder,
        method: Method,
        train: TrainConfig,
    ) -> None:
        self._engine, self._prefetcher, self._method, self._train = engine, prefetcher, method, train
        self._builder = replace(builder, scale=1.0)
        anchor, recovery = samples.held_back_anchor, samples.held_back_recovery
        depths = np.linspace(method.depth.min, method.depth.max, max(len(recovery), 1)).round().astype(int)
        self._plan = StepPlan(
            tuple(AnchorItem(sample) for sample in anchor),
            tuple(RecoveryItem.cut(sample, int(depth)) for sample, depth in zip(recovery, depths, strict=False)),
        )
        self._batches: list[Any] = []
        self.best: float | None = None
        self.best_step = 0
        self._since = 0

    @property
    def is_over(self) -> bool:
        """True once `patience` measurements in a row brought nothing better."""
        return self._since >= self._train.validation.patience

    def measure(self, step: int) -> dict[str, float]:
        """Measures the student after `step` finished steps, on every rank; the same numbers everywhere."""
        if not self._batches:
            self._batches = self._build()
        terms = self._method.validated_terms
        sums = torch.zeros(len(terms), dtype=torch.float64)
        self._engine.eval()
        with torch.no_grad():
            for batch in self._batches:
                values = self._engine(batch.to(self._engine.device), "loss")
                losses = LossOutput.unflatten(values, self._builder.loss).losses
                sums += torch.stack([losses[name].double() for name in terms]).cpu()
        self._engine.train()
        shared = [sums.tolist()]
        dist.broadcast_object_list(shared, src=0)  # ranks must agree on when to stop
        found: dict[str, float] = dict(zip(terms, shared[0], strict=True))
        weights = self._builder.loss.weights
        value = float(sum(weights[name] * loss for name, loss in found.items()))
        if self.best is None or value < _NOTICEABLE * self.best:
            self.best, self.best_step, self._since = value, step, 0
        else:
            self._since += 1
        return {"validation": value} | {f"validation_{name}": loss for name, loss in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The best value so far and when it was, as plain JSON types."""
        return {"best": self.best, "best_step": self.best_step, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved run."""
        self.best, self.best_step, self._since = state["best"], state["best_step"], state["since"]

    def forget_best(self) -> None:
        """The checkpoint of the best value is gone: the next measurement is the best, and patience begins anew."""
        self.best, self.best_step, self._since = None, 0, 0

    def _build(self) -> list[Any]:
        step = -1  # of no training step
        anchor = [item.sample for item in self._plan.anchor]
        recovery = [item.sample for item in self._plan.recovery]
        self._prefetcher.request(step, anchor, recovery)
        scores = self._prefetcher.take(step)
        step_sequences = StepSequences.of(self._plan, self._method, Feedback())
        sequences, size = step_sequences.local(0, 1), self._train.per_device_batch_size
        return [
            self._builder.build(sequences[start : start + size], step_sequences.normalisers, scores)
            for start in range(0, len(sequences), size)
        ]
