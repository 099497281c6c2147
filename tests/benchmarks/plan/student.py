"""The student of a training worker and the batches of one step, with random teachers: the loss costs the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES, load_model
from raycomplete.data.heads import load_head, read_head_spec
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.training.batches import BatchBuilder, MicroBatch, teacher_contexts
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.step_plan import Planner, StepSequences
from raycomplete.training.student import HeadSettings, StudentModule
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher
from tests.benchmarks.plan.cases import Case


def random_tokens(rng: Any, count: int) -> tuple[int, ...]:
    """Ids that every tokenizer here has."""
    return tuple(int(token) for token in rng.integers(5, 200, count))


def student_and_batches(case: Case, micro_batches: int) -> tuple[StudentModule, list[MicroBatch]]:
    """The module that a training worker wraps, and the micro-batches of one step."""

    config, dtype = case.config, case.config.models.dtype
    method, rng = config.method, np.random.default_rng(0)
    spec = read_head_spec(case.path, ChatCodec(case.path).vocab_size, "benchmark")
    lm = load_model(case.path, dtype)
    lm.train()
    teachers = {role: load_head(spec, dtype=TORCH_DTYPES[dtype]) for role in ("aligned", "base")}
    loss = method.loss(config.train)
    head = HeadSettings(spec.scale, spec.softcap, spec.vocab_size)
    module = StudentModule(lm, head, teachers, loss, external_head=False)
    prompts = [random_tokens(rng, case.prompt) for _ in range(case.batch)]
    samples = SampleSet(
        anchor=tuple(AnchorSample(f"a{i}", p, random_tokens(rng, case.answer)) for i, p in enumerate(prompts)),
        recovery=tuple(
            RecoverySample(f"r{i}", p, p, random_tokens(rng, case.answer), random_tokens(rng, 24))
            for i, p in enumerate(prompts)
        ),
    )
    planner = Planner(
        samples,
        anchor_batch_size=case.batch,
        recovery_batch_size=case.batch,
        seed=0,
    )
    source = _RandomScores(spec.hidden_size, TORCH_DTYPES[dtype])
    builder = BatchBuilder(loss, scale=float(micro_batches))
    sources: Any = {"aligned": source, "base": source}
    prefetcher = TeacherPrefetcher(sources, partial(teacher_contexts, builder, method))
    prefetcher.request(0, *planner.samples_of(0))
    step = StepSequences.of(planner.plan(0, DepthSampler(method.depth, 0)), method)
    scores, chunks = prefetcher.take(0), step.micro_batches(0, 1, micro_batches)
    return module, [builder.build(chunk, step.normalisers, scores) for chunk in chunks]


class _RandomScores:
    """Hidden states of no model (stands in for a `TeacherClient`): the loss costs the same."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        self._hidden_size, self._dtype = hidden_size, dtype

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return list(sequences)

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Nothing runs ahead here."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        return [torch.randn(len(ids) - prompt, self._hidden_size).to(self._dtype) for ids, prompt in reference]
