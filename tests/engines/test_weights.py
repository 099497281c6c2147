"""Packed weights: every bit comes back, adapters merge as in peft, and engines answer as transformers after a load."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.config import Dtype
from raycomplete.data.checkpoints import TORCH_DTYPES, load_model
from raycomplete.engines import weights as weights_module
from raycomplete.engines.rollout_pool import RolloutPool, SyncError
from raycomplete.engines.rollout_worker import RolloutWorker, Sampling
from raycomplete.engines.weights import Weights, checkpoint_folder, checkpoint_tensors, pack, pack_lora
from raycomplete.runtime.errors import WorkError
from tests.engines.tiny import log_probs_of, make_model, options, random_probe, state_of


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts a cluster."""
    return pytest.mark.slow(pytest.mark.usefixtures("ray_cluster")(test))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", 0, tied=True, dtype="bfloat16")


def tensors_of(weights: Weights, dtype: Dtype, *, tied: bool = True) -> dict[str, torch.Tensor]:
    return dict(checkpoint_tensors(weights, TORCH_DTYPES[dtype], tied=tied, timeout_s=60))


def adapted(path: Path, dtype: Dtype) -> Any:
    """A peft model whose adapters are random in both factors."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(load_model(path, dtype), config)


def adapters_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@on_ray
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int64]),
    limit=st.integers(1, 400),
)
@settings(max_examples=25, deadline=None)
def test_chunks_are_bounded_and_hold_every_bit(sizes: list[int], dtype: torch.dtype, limit: int) -> None:
    state = {f"w{index}": (torch.randn(size, 2) * 9).to(dtype) for index, size in enumerate(sizes)}
    before, weights_module._CHUNK_BYTES = weights_module._CHUNK_BYTES, limit
    try:
        weights = pack(state, 3, "/nowhere")
    finally:
        weights_module._CHUNK_BYTES = before
    for chunk in ray.get(list(weights.chunks)):
        assert len(chunk) == 1 or sum(array.nbytes for array in chunk.values()) <= limit
    assert weights.num_bytes == sum(tensor.nbytes for tensor in state.values())
    back = weights_module._fetch(pickle.loads(pickle.dumps(weights)), 60)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


@on_ray
def test_merged_adapters_are_what_peft_merges(path: Path) -> None:
    model = adapted(path, "float32")
    merged = tensors_of(pack_lora(adapters_of(model), 1, str(path)), "float32")
    expected = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_folders_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_MEMORY", str(tmp_path))
    code = (
        "import os, signal, torch\n"
        "from raycomplete.engines import weights\n"
        f"weights._MEMORY = {str(tmp_path)!r}\n"
        "with weights.checkpoint_folder([('w', torch.zeros(4))]):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with checkpoint_folder([("w", torch.ones(4))]) as first:
        assert not left.exists()
        with checkpoint_folder([("w", torch.ones(4))]):
            assert (Path(first) / "model.safetensors").is_file(), "its owner is alive"
    assert not list(tmp_path.iterdir())


@on_ray
def test_a_missing_tensor_is_named_before_anything_is_loaded(path: Path) -> None:
    state = state_of(path, "bfloat16")
    state.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(WorkError, match=r"version 4 .* lack .* 1 in all \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        tensors_of(pack(state, 4, str(path)), "bfloat16")


@on_ray
def test_an_untied_head_may_not_be_missing(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", 0, tied=False, dtype="float32")
    state = state_of(path, "float32")
    state.pop("lm_head.weight")
    with pytest.raises(WorkError, match=r"lm_head\.weight"):
        tensors_of(pack(state, 4, str(path)), "float32", tied=False)


@on_ray
def test_an_adapter_without_its_weight_is_refused(path: Path) -> None:
    adapters = {"base_model.model.model.norm.weight": (torch.zeros(1, 2), torch.zeros(2, 1), 1.0)}
    with pytest.raises(WorkError, match="hold adapters for tensors that are not there"):
        tensors_of(pack_lora(adapters, 1, str(path)), "bfloat16")


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
@on_ray
def test_a_head_that_stayed_behind_is_caught(spare: Any, folder: Path) -> None:
    paths = two_models(folder, True, "bfloat16")
    pool, probe = pool_on(spare, paths[0], "bfloat16", forget_head=True), random_probe(0)
    weights = pool.pack(state_of(paths[1], "bfloat16"), 5)
    with pytest.raises(SyncError, match=r"version 5, the rollout engine differs .* nats .* tolerance 0\.1"):
        pool.sync(weights, probe, log_probs_of(load_model(paths[1], "bfloat16"), probe))


@on_ray
@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        (True, "bfloat16"),
        (False, "float32"),
        pytest.param(False, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param(True, "float32", marks=pytest.mark.exhaustive),
    ],
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


@on_ray
def test_adapters_speak_as_peft_does(spare: Any, folder: Path) -> None:
    path = two_models(folder, True, "float32")[0]
    pool, probe, model = pool_on(spare, path, "float32"), random_probe(0), adapted(path, "float32")
    weights = pool.pack_lora(adapters_of(model), 1)
    expected = log_probs_of(model, probe)
    assert pool.sync(weights, probe, expected).mean_abs_difference < 1e-5
    # Merged into the start checkpoint again, not on top of the merge before.
    assert pool.sync(pool.pack_lora(adapters_of(model), 2), probe, expected).mean_abs_difference < 1e-5
    assert weights.num_bytes < pool.pack(state_of(path, "float32"), 1).num_bytes / 2


@on_ray
def test_a_load_that_fails_half_way_leaves_no_mixture(spare: Any, folder: Path) -> None:
    path = two_models(folder, True, "float32")[0]
    pool, probe, model = pool_on(spare, path, "float32"), random_probe(0), load_model(path, "float32")
    good = dict(model.named_parameters())
    bad = good | {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 5)}
    expected = log_probs_of(model, probe)
    with pytest.raises(WorkError, match="rollout engine failed"):
        pool.sync(pool.pack({name: tensor + 1 for name, tensor in bad.items()}, 1), probe, expected)
    assert pool.sync(pool.pack(good, 2), probe, expected).mean_abs_difference < 1e-5


@pytest.mark.parametrize("shuts_down", [True, False])
def test_an_engine_that_a_load_has_broken_is_shut_down_and_the_cause_is_told(shuts_down: bool) -> None:
    done: list[str] = []

    def load(weights: str, *, timeout_s: float) -> bool:
        broken.is_whole = False
        raise WorkError("The load broke.")

    def shut_down() -> None:
        done.append("shut down")
        if not shuts_down:
            raise RuntimeError

    worker = RolloutWorker(options(Path("model")))
    broken: Any = SimpleNamespace(load=load, is_whole=True, shut_down=shut_down)
    worker._engine = broken
    with pytest.raises(WorkError, match="The load broke"):
        worker.generate("elsewhere", [[1]], Sampling(max_tokens=1))
    assert done == ["shut down"]
    assert worker._engine is None
