"""Tiny random models that vLLM runs on a CPU, and what transformers says about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raycomplete.config import Dtype, RolloutConfig
from raycomplete.data.checkpoints import TORCH_DTYPES, load_model
from raycomplete.data.organism.toy import build_tokenizer
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.spec import EngineSpec

Probe = list[tuple[list[int], int]]


def make_model(folder: Path, seed: int, *, tied: bool, dtype: Dtype, kind: str = "llama", **values: Any) -> Path:
    """A two-layer model with the organism's tokenizer; vLLM's CPU attention knows no head narrower than 32."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.15,  # large enough that two seeds differ by more than a nat
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **values,
    )
    AutoModelForCausalLM.from_config(config).to(TORCH_DTYPES[dtype]).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def state_of(path: Path, dtype: Dtype) -> dict[str, torch.Tensor]:
    """Returns the state that a trainer gathers: parameters by name, a tied head left out."""
    return dict(load_model(path, dtype).named_parameters())


def random_probe(seed: int, count: int = 6) -> Probe:
    """Token sequences of random length with a prompt of random length."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(5, 90, rng.integers(10, 24)).tolist(), int(rng.integers(1, 8))) for _ in range(count)]


def log_probs_of(model: Any, probe: Sequence[tuple[Sequence[int], int]]) -> list[torch.Tensor]:
    """Log-probabilities of the responses by transformers, computed from float32 logits."""
    rows = []
    for tokens, num_prompt in probe:
        with torch.inference_mode():
            log_probs_TV = model(torch.tensor([list(tokens)])).logits[0, :-1].float().log_softmax(-1)
        targets_T = torch.tensor(list(tokens[num_prompt:]))
        rows.append(log_probs_TV[num_prompt - 1 :].gather(1, targets_T[:, None])[:, 0])
    return rows


def options(path: Path | str = "", dtype: Dtype = "float32", **rollout: Any) -> RolloutOptions:
    """Options of a CPU engine with limits that suit a test."""
    return RolloutOptions(
        spec=EngineSpec(str(path), dtype, 128),
        stop_ids=(int(build_tokenizer().eos_token_id),),
        rollout=RolloutConfig(**rollout),
    )
