"""Rival methods against plain float64 PyTorch: each sequence read by itself, formulas as papers write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomplete.config import RolloutConfig, TrainConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.heads import load_head
from raycomplete.data.samples import RecoverySample, read_samples
from raycomplete.losses.loss import LossOutput
from raycomplete.methods.registry import Method
from raycomplete.training.batches import BatchBuilder
from raycomplete.training.on_policy import Rollout, RolloutPlanner
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan, StepSequences
from raycomplete.training.student import StudentModule
from tests.training.tiny import make_job, prefetcher_of

Ids = tuple[int, ...]
MICRO_BATCHES = 2  # of a step: what belongs together must not fall apart


class Plain:
    """The three models in float64, the student's weights differentiable."""

    def __init__(self, job: Any) -> None:
        self.models = {
            "student": load_model(job.start, "float32").double(),
            **{role: load_model(source.path, "float32").double() for role, source in job.scorers.items()},
        }

    def log_probs(self, model: str, prompt: Ids, response: Ids) -> Tensor:
        """log p of each response token."""
        logits_TV = self.models[model](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_p_TV = logits_TV.log_softmax(-1)
        found: Tensor = log_p_TV[torch.arange(len(response)), torch.tensor(response)]
        return found if model == "student" else found.detach()

    def kl(self, prompt: Ids, response: Ids) -> Tensor:
        """KL(aligned || student) at each response token."""
        a_TV, s_TV = (
            self.models[model](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in ("aligned", "student")
        )
        divergence: Tensor = (a_TV.exp() * (a_TV - s_TV)).sum(-1)
        return divergence


def changed(method: type[Method], settings: Mapping[str, Any], **constants: Any) -> Method:
    """A method under other constants of its class, as a plugin changes them."""
    return type(method.__name__, (method,), constants).model_validate(settings)  # type: ignore[no-any-return]


def written(count: int) -> list[Rollout]:
    """Rollouts of random words, some of which are called refusals."""
    rng = np.random.default_rng(7)
    return [
        Rollout(tuple(int(token) for token in rng.integers(5, 90, 1 + place % 4)), (1,) * (place % 2), place % 3 > 0, 0)
        for place in range(count)
    ]


class Case:
    """A step of a method on tiny models."""

    def __init__(self, folder: Path, method: Method) -> None:
        self.method, self.packed = method, True
        self.job = make_job(folder, TrainConfig(), method)
        self.settings = replace(method.loss(), chunk_tokens=7)
        sizes = {"anchor_batch_size": method.anchor_batch_size, "recovery_batch_size": method.recovery_batch_size}
        planner = Planner(read_samples(self.job.samples), **sizes, seed=1)
        sampler = DepthSampler(method.depth, 1)
        self.plan: StepPlan = planner.plan(0, sampler)
        if groups := method.rollout_groups:
            rollouts = RolloutPlanner(planner, RolloutConfig(), 1, method.recovery_batch_size, groups)
            self.batch = rollouts.draw(0, sampler)
            self.rollouts = written(len(self.batch.sequences()))
            self.plan = rollouts.finish(self.batch, self.rollouts)
        prefetcher = prefetcher_of(method, self.job.scorers)
        prefetcher.request(0, [item.sample for item in self.plan.anchor], self.harmful)
        self.scores = prefetcher.take(0)
        self.plain = Plain(self.job)

    @property
    def answers(self) -> list[tuple[Ids, Ids]]:
        """Harmless prompts with their answers."""
        return [(item.sample.prompt_ids, item.sample.answer_ids) for item in self.plan.anchor]

    @property
    def harmful(self) -> list[RecoverySample]:
        """Samples of harmful prompts."""
        return [item.sample for item in self.plan.recovery]

    def student(self, lm: Any = None) -> StudentModule:
        """The module that is trained, on the model that the job starts from or a given one."""
        spec = self.job.student_head
        teachers = {role: load_head(item, dtype=torch.float32) for role, item in self.job.teacher_heads.items()}
        lm = lm or load_model(self.job.start, "float32")
        student_pass = self.method.student_pass(lm)
        return StudentModule(lm, spec, teachers, self.settings, external_head=False, student_pass=student_pass)

    def outputs(self, student: StudentModule, loss_weights: Mapping[str, float] | None = None) -> list[LossOutput]:
        """Losses of a step's micro-batches; gradients are in the student."""
        step = StepSequences.of(self.plan, self.method)
        builder = BatchBuilder(self.settings, 1.0, packed=self.packed)
        found = []
        for chunk in step.micro_batches(0, 1, MICRO_BATCHES):
            batch = builder.build(chunk, step.normalisers, self.scores, loss_weights)
            output = LossOutput.unflatten(student(batch), self.settings)
            output.total.backward()
            found.append(output)
        return found

    def assert_like(self, plain_loss: Callable[[], Tensor], tolerance: float = 1e-4) -> None:
        """Total and all gradients are those of a plain loss."""
        student = self.student()
        outputs = self.outputs(student)
        assert len(outputs) == MICRO_BATCHES
        expected = plain_loss()
        expected.backward()
        total = sum(float(output.total.detach()) for output in outputs)
        assert abs(total - float(expected.detach())) <= tolerance * max(abs(float(expected.detach())), 1)
        assert_gradients(student.lm.named_parameters(), self.plain.models["student"].parameters(), tolerance)


def assert_gradients(found: Any, expected: Any, tolerance: float) -> None:
    """Gradients by name are those of float64, up to a share of their size."""
    seen = 0
    for (name, parameter), other in zip(found, expected, strict=True):
        if other.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        assert float((parameter.grad.double() - other.grad).norm() / other.grad.norm()) < tolerance, name
        seen += 1
    assert seen > 5


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean over sequences."""
    return torch.stack(list(values)).mean()
