"""Families in vLLM on a CPU: scores of a frozen model, and the weights of a student after each update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import Dtype
from raycomplete.data.checkpoints import load_model, with_file_names
from tests.engines.test_weights import pool_on
from tests.engines.tiny import log_probs_of, make_model, random_probe
from tests.training.tiny import MIXTURES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
KINDS: dict[str, dict[str, Any]] = {
    **MIXTURES,
    "gemma2": {"head_dim": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8},
}


def make(folder: Path, kind: str, seed: int, dtype: Dtype = "float32") -> Path:
    path = folder / f"{kind}-{seed}-{dtype}"
    return make_model(path, seed, tied=kind.startswith("gemma"), dtype=dtype, kind=kind, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("qwen3_moe", "bfloat16"), *(pytest.param(kind, "float32", marks=pytest.mark.exhaustive) for kind in KINDS)],
)
def test_weights_after_an_update_speak_as_in_transformers(spare: Any, kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """vLLM packs experts for its kernels; the second load is what used to leave them in the wrong order."""
    paths = [make(tmp_path, kind, seed, dtype) for seed in (0, 1)]
    pool, probe = pool_on(spare, paths[0], dtype), random_probe(0)
    for version in (1, 2, 3):
        model = load_model(paths[version % 2], dtype)
        weights = pool.pack(with_file_names(model, dict(model.named_parameters())), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert report.mean_abs_difference < {"float32": 1e-5, "bfloat16": 0.03}[dtype], version
