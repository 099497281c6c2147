"""Tiny random models and samples for training tests, and scores of frozen models without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raycomplete.config import TrainConfig
from raycomplete.core.heads import Head
from raycomplete.core.loss_reference import reference_loss
from raycomplete.core.loss_types import LossOutput, LossSettings
from raycomplete.data.checkpoints import fingerprint, load_model
from raycomplete.data.head_spec import HeadSpec, load_head, read_head_spec
from raycomplete.data.organism.tokenizer import build_tokenizer
from raycomplete.training.batches import MicroBatch
from raycomplete.training.job import TrainJob
from raycomplete.training.samples import AnchorSample, RecoverySample, SampleSet, write_samples


def make_model(folder: Path, seed: int, *, tied: bool = True) -> Path:
    """A two-layer Llama with the organism's tokenizer, random weights under a seed."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        # Large enough that two seeds give distributions that differ by whole nats.
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    return folder


def head_spec(path: Path) -> HeadSpec:
    """Its head spec."""
    return read_head_spec(
        path, vocab_size=len(build_tokenizer()), model_fingerprint=fingerprint(path), tokenizer_hash="test"
    )


def make_samples(seed: int, *, anchor: int = 10, recovery: int = 10) -> SampleSet:
    """Random token sequences of random lengths."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(5, 90, rng.integers(low, high)))

    return SampleSet(
        anchor=tuple(AnchorSample(f"a{i}", tokens(3, 8), tokens(4, 12)) for i in range(anchor)),
        recovery=tuple(
            RecoverySample(f"r{i}", prompt := tokens(3, 8), prompt, tokens(10, 20), tokens(3, 9))
            for i in range(recovery)
        ),
        profile=tuple(AnchorSample(f"p{i}", tokens(3, 8), tokens(5, 10)) for i in range(3)),
    )


class LocalScores:
    """A frozen model read by transformers in the calling process (a `ScoreSource`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: Any = None

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return list(sequences)

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        if self._model is None:
            self._model = load_model(self.path, "float32").base_model
        states = []
        with torch.no_grad():
            for tokens, num_prompt in reference:
                hidden_TH = self._model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
                states.append(hidden_TH[num_prompt - 1 :].clone())
        return states


def make_job(folder: Path, train: TrainConfig, *, tied: bool = True, objective: str = "completion") -> TrainJob:
    """A job on two tiny models; `folder/base` and `folder/aligned` are made where missing."""
    for seed, role in enumerate(("base", "aligned")):
        if not (folder / role).exists():
            make_model(folder / role, seed, tied=tied)
    samples = folder / "samples.jsonl"
    write_samples(samples, make_samples(0))
    scored = objective == "completion"
    return TrainJob(
        objective=objective,  # type: ignore[arg-type]
        start=folder / "base" if scored else folder / "aligned",
        output=folder / "student",
        folder=folder,
        samples=samples,
        dtype="float32",
        train=train,
        student_head=head_spec(folder / "base"),
        teacher_heads={role: head_spec(folder / role) for role in ("base", "aligned")} if scored else {},
        sources={role: LocalScores(folder / role) for role in ("base", "aligned")} if scored else {},
    )


def plain_loss(job: TrainJob, batch: MicroBatch, settings: LossSettings) -> tuple[Any, LossOutput]:
    """The float64 reference of a batch in plain PyTorch: no DeepSpeed, no micro-batches, no chunks.

    Returns:
        The float64 student, whose parameters take the gradient, and its loss.
    """
    model = load_model(job.start, "float32").double()
    hidden_BTH = model.base_model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).last_hidden_state
    heads = {role: load_head(spec, dtype=torch.float64) for role, spec in job.teacher_heads.items()}
    assert batch.aligned_hidden_NH is not None
    assert batch.base_hidden_PH is not None
    output = reference_loss(
        hidden_BTH.flatten(0, 1)[batch.row_N],
        Head(model.lm_head.weight),
        batch.aligned_hidden_NH.double(),
        heads["aligned"],
        batch.base_hidden_PH.double(),
        heads["base"],
        batch.kind_N,
        batch.weight_N.double(),
        settings,
    )
    return model, output
