"""After an update the engine speaks as transformers does, and one that does not is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycomplete.config import Dtype
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.weight_sync import SyncError
from raycomplete.engines.weights import pack, pack_lora
from raycomplete.runtime.errors import WorkError
from tests.engines.test_weights import adapted, adapters_of
from tests.engines.tiny import log_probs_of, make_model, options, random_probe, state_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def two_models(folder: Path, tied: bool, dtype: Dtype) -> list[Path]:
    paths = [folder / f"{tied}-{dtype}-{seed}" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        if not path.exists():
            make_model(path, seed, tied=tied, dtype=dtype)
    return paths


def pool_on(spare: Any, path: Path, dtype: Dtype, *, forget_head: bool = False) -> RolloutPool:
    ray.get(spare.become.remote(options(path, dtype), forget_head), timeout=120)
    return RolloutPool([spare], str(path), options(path, dtype))


# Neighbouring tests share an engine where they can.
def test_a_head_that_stayed_behind_is_caught(spare: Any, folder: Path) -> None:
    paths = two_models(folder, True, "bfloat16")
    pool, probe = pool_on(spare, paths[0], "bfloat16", forget_head=True), random_probe(0)
    weights = pool.pack(state_of(paths[1], "bfloat16"), 5)
    with pytest.raises(SyncError, match=r"version 5, the rollout engine differs .* nats .* tolerance 0\.1"):
        pool.sync(weights, probe, log_probs_of(load_model(paths[1], "bfloat16"), probe))


@pytest.mark.parametrize(
    ("tied", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32"), (True, "float32")]
)
def test_log_probabilities_after_an_update_are_those_of_transformers(
    spare: Any, folder: Path, tied: bool, dtype: Dtype
) -> None:
    paths = two_models(folder, tied, dtype)
    pool, probe = pool_on(spare, paths[0], dtype), random_probe(0)
    models = [load_model(path, dtype) for path in paths]
    tolerance = {"float32": (1e-5, 1e-4), "bfloat16": (0.03, 0.3)}[dtype]
    for version in (1, 2, 3):
        model = models[version % 2]
        weights = pool.pack(dict(model.named_parameters()), version)
        report = pool.sync(weights, probe, log_probs_of(model, probe))
        assert (report.version, report.num_bytes) == (version, weights.num_bytes)
        assert report.mean_abs_difference < tolerance[0]
        assert report.max_abs_difference < tolerance[1]
        assert report.num_tokens == sum(len(tokens) - num_prompt for tokens, num_prompt in probe)
        assert report.load_s > 0
    assert pool.sync(weights, probe, log_probs_of(model, probe)).load_s == 0  # there already


def test_adapters_speak_as_peft_does(spare: Any, folder: Path) -> None:
    path = two_models(folder, True, "float32")[0]
    pool, probe, model = pool_on(spare, path, "float32"), random_probe(0), adapted(path, "float32")
    weights = pool.pack_lora(adapters_of(model), 1)
    expected = log_probs_of(model, probe)
    assert pool.sync(weights, probe, expected).mean_abs_difference < 1e-5
    # Merged into the start checkpoint again, not on top of the merge before.
    assert pool.sync(pool.pack_lora(adapters_of(model), 2), probe, expected).mean_abs_difference < 1e-5
    assert weights.num_bytes < pool.pack(state_of(path, "float32"), 1).num_bytes / 2


def test_a_load_that_fails_half_way_leaves_no_mixture(spare: Any, folder: Path) -> None:
    path = two_models(folder, True, "float32")[0]
    pool, probe, model = pool_on(spare, path, "float32"), random_probe(0), load_model(path, "float32")
    good = dict(model.named_parameters())
    bad = good | {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 5)}
    expected = log_probs_of(model, probe)
    with pytest.raises(WorkError, match="rollout engine failed"):
        pool.sync(pool.pack({name: tensor + 1 for name, tensor in bad.items()}, 1), probe, expected)
    assert pool.sync(pool.pack(good, 2), probe, expected).mean_abs_difference < 1e-5


def test_a_trained_organism_is_within_rounding(generator: RolloutPool) -> None:
    """The shared engine holds other weights now and then; what counts is what each call names."""
    codec = ChatCodec(checkpoint_path("aligned"))
    probe = []
    for prompt in prompts("heldout", "harmful", 0, 4):
        prompt_ids = codec.encode_prompt(prompt.text)
        probe.append(([*prompt_ids, *codec.encode_answer(prompt.answer or prompt.text)[:24]], len(prompt_ids)))
    model = load_model(checkpoint_path("aligned"), "float32")
    weights = pack(dict(model.named_parameters()), 11, str(checkpoint_path("base")))
    report = generator.sync(weights, probe, log_probs_of(model, probe))
    assert report.mean_abs_difference < 1e-5
    adapted_base = pack_lora({}, 12, str(checkpoint_path("base")))
    base = log_probs_of(load_model(checkpoint_path("base"), "float32"), probe)
    assert generator.sync(adapted_base, probe, base).mean_abs_difference < 1e-5
