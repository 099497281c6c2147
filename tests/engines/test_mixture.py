"""Mixtures of experts in vLLM on a CPU: scores of a frozen one, and the weights of a student after each update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import Dtype
from raycomplete.data.checkpoints import load_model, with_file_names
from tests.engines.test_weights import pool_on
from tests.engines.tiny import log_probs_of, make_model, random_probe
from tests.training.tiny import MIXTURES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen3_moe", "float32"), ("qwen3_moe", "bfloat16"), ("mixtral", "float32")]
)
def test_experts_after_an_update_speak_as_in_transformers(
    ray_cluster: None, spare: Any, kind: str, dtype: Dtype, tmp_path: Path
) -> None:
    """vLLM packs experts for its kernels; the second load is what used to leave them in the wrong order."""
    values: dict[str, Any] = {"tied": False, "dtype": dtype, "kind": kind, **MIXTURES[kind]}
    paths = [make_model(tmp_path / str(seed), seed, **values) for seed in (0, 1)]
    pool, probe = pool_on(spare, paths[0], dtype), random_probe(0)
    for version in (1, 2, 3):
        model = load_model(paths[version % 2], dtype)
        weights = pool.pack(with_file_names(model, dict(model.named_parameters())), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert report.mean_abs_difference < {"float32": 1e-5, "bfloat16": 0.03}[dtype], version
