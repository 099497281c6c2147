"""Families in vLLM on a CPU: scores of a frozen model, and the weights of a student after each update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from raycomplete.config import Dtype
from raycomplete.data.checkpoints import TORCH_DTYPES, load_model, with_file_names
from raycomplete.data.heads import load_head, read_head_spec
from raycomplete.data.organism.training import build_tokenizer
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.spec import EngineSpec
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


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3_moe", "bfloat16"), *((kind, "float32") for kind in KINDS)])
def test_weights_after_an_update_speak_as_in_transformers(spare: Any, kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """vLLM packs experts for its kernels; the second load is what used to leave them in the wrong order."""
    paths = [make(tmp_path, kind, seed, dtype) for seed in (0, 1)]
    pool, probe = pool_on(spare, paths[0], dtype), random_probe(0)
    for version in (1, 2, 3):
        model = load_model(paths[version % 2], dtype)
        weights = pool.pack(with_file_names(model, dict(model.named_parameters())), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert report.mean_abs_difference < {"float32": 1e-5, "bfloat16": 0.03}[dtype], version


def test_scores_of_frozen_models_pass_the_parity_gate(tmp_path: Path) -> None:
    paths = {kind: make(tmp_path, kind, 0) for kind in KINDS}
    requests = [ScoreRequest(tuple(tokens), num_prompt) for tokens, num_prompt in random_probe(1)]

    def differences() -> dict[str, float]:  # in here, since its process need not import what this module imports
        from raycomplete.engines.scoring_engine import PoolingEngine, check_parity

        found = {}
        for kind, path in paths.items():
            head = load_head(read_head_spec(path, len(build_tokenizer()), "words"), dtype=TORCH_DTYPES["float32"])
            engine = PoolingEngine(EngineSpec(str(path), "float32", 128))
            found[kind] = check_parity(engine, head, requests, role="aligned").mean_expected_difference
        return found

    environment = {"env_vars": EngineSpec("", "float32", 128).environment()}
    found = ray.get(ray.remote(differences).options(num_cpus=0.5, runtime_env=environment).remote(), timeout=300)
    assert max(found.values()) < 1e-5, found
