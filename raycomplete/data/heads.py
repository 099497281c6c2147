"""Reads the output head of a checkpoint, which turns a model's final hidden states into logits.

A pooling engine carries no lm_head, so the trainer multiplies hidden states with a head of its own. Everything that
can silently go wrong there (tied or untied weight, bias, scale, softcap, padding rows) is read here once, by the facts
in `raycomplete.data.families`, and compared with transformers by `raycomplete.engines.scoring_engine`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from raycomplete.data.checkpoints import fingerprint, tensor_files
from raycomplete.data.families import EMBEDDINGS, HEAD_BIAS, HEADS, head_scale, head_softcap, is_tied, text_config
from raycomplete.losses.heads import Head
from raycomplete.runtime.errors import CheckpointError


@dataclass(frozen=True)
class HeadSpec:
    """Recipe of one model's logits: softcap(scale * (hidden @ weight^T + bias))."""

    path: str
    weight_key: str
    bias_key: str | None
    tied: bool
    scale: float
    softcap: float | None
    vocab_size: int
    hidden_size: int
    model_fingerprint: str
    tokenizer_hash: str


def read_head_spec(path: Path, vocab_size: int, tokenizer_hash: str) -> HeadSpec:
    """Reads the head spec of a checkpoint folder."""
    config = text_config(json.loads((path / "config.json").read_text()))
    files = tensor_files(path)
    tied = is_tied(config, files)
    candidates = EMBEDDINGS if tied else HEADS
    # A tied checkpoint may store only one of the two names.
    key = next((name for name in (*candidates, *(HEADS if tied else ())) if name in files), None)
    if key is None:
        raise CheckpointError(f"The checkpoint {path} has no output head under any of {', '.join(candidates)}.")
    with safe_open(files[key], framework="pt") as tensors:
        rows, hidden_size = tensors.get_slice(key).get_shape()
    if rows < vocab_size:
        raise CheckpointError(
            f"The head of {path} has {rows} rows for a tokenizer of {vocab_size} tokens.",
            "The tokenizer beside the weights belongs to another model.",
        )
    return HeadSpec(
        path=str(path),
        weight_key=key,
        bias_key=HEAD_BIAS if HEAD_BIAS in files else None,
        tied=tied,
        scale=head_scale(config),
        softcap=head_softcap(config),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        model_fingerprint=fingerprint(path),
        tokenizer_hash=tokenizer_hash,
    )


def load_head(spec: HeadSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Head:
    """Loads the frozen head of a checkpoint, padding rows dropped."""
    files = tensor_files(Path(spec.path))

    def tensor(key: str) -> torch.Tensor:
        with safe_open(files[key], framework="pt") as tensors:
            rows: torch.Tensor = tensors.get_slice(key)[: spec.vocab_size]
            return rows.to(device=device, dtype=dtype)

    return Head(
        weight_VH=tensor(spec.weight_key),
        bias_V=tensor(spec.bias_key) if spec.bias_key else None,
        scale=spec.scale,
        softcap=spec.softcap,
    )
