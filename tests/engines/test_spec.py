"""The description of an engine: what a run file makes of it, and what vLLM, Ray and the process get from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import RolloutConfig, RunConfig, parse
from raycomplete.engines.scoring_engine import cache_bytes
from raycomplete.engines.spec import EngineRole, EngineSpec, object_store_bytes

SPEC = EngineSpec("/nowhere", "bfloat16", 64, use_gpu=True, gpu_memory_utilization=0.5, max_num_batched_tokens=512)


def config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "models": {"base": "organism:base", "aligned": "organism:aligned", "dtype": "float32"},
        "data": {},
    }
    return parse(tree | sections, "test")


def test_arguments_for_vllm_are_these() -> None:
    assert SPEC.arguments() == {
        "model": "/nowhere",
        "dtype": "bfloat16",
        "max_model_len": 64,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 256,
        "enforce_eager": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "seed": 0,
        "gpu_memory_utilization": 0.5,
        "kernel_config": {"enable_flashinfer_autotune": False},
    }
    cut = replace(SPEC, tensor_parallel=4)
    assert cut.arguments() == SPEC.arguments() | {"tensor_parallel_size": 4, "distributed_executor_backend": "mp"}
    longer = replace(SPEC, max_length=1024, use_gpu=False).arguments()
    assert longer["max_num_batched_tokens"] == 1024
    assert not longer.keys() & {"gpu_memory_utilization", "kernel_config"}


def test_rollouts_on_a_gpu_decode_by_cuda_graphs_and_nothing_else_does() -> None:
    for use_gpu, role, expected in (
        (True, "rollout", True),
        (True, "scorer", False),
        (True, "single", False),
        (False, "rollout", False),
    ):
        spec = EngineSpec.from_config(config(), role, "/model", use_gpu=use_gpu)  # type: ignore[arg-type]
        assert spec.cuda_graphs is expected
        arguments = spec.arguments()
        assert arguments["enforce_eager"] is not expected
        assert ("compilation_config" in arguments) is expected
    graphs = replace(SPEC, cuda_graphs=True).arguments()
    assert graphs["compilation_config"]["mode"] == 0, "no engine compiles anything at its start"
    assert graphs["compilation_config"]["cudagraph_capture_sizes"][-1] == graphs["max_num_seqs"]


@pytest.mark.parametrize(
    ("sections", "versions"),
    [
        ({}, 0),
        ({"rollout": {"on_policy": True}}, 3),
        ({"rollout": {"on_policy": True, "colocated": True}}, 2),
        ({"rollout": {"on_policy": True}, "train": {"lora_rank": 8}}, 0),
    ],
)
def test_whole_weights_of_a_student_that_rolls_out_pass_through_the_object_store(
    sections: dict[str, Any], versions: int
) -> None:
    assert object_store_bytes(config(**sections), 10**9, "bfloat16") == 2 * 2**30 + versions * 2 * 10**9


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("scorer", {"max_num_batched_tokens": 128, "gpu_memory_utilization": 0.3, "tensor_parallel": 2, "num_gpus": 2}),
        ("rollout", {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.4, "sleeps": True, "num_gpus": 0.7}),
        ("single", {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.4, "sleeps": False, "num_gpus": 0.7}),
    ],
)
def test_each_role_reads_its_section(role: EngineRole, expected: dict[str, Any]) -> None:
    one = config(
        models={"base": "b", "aligned": "a", "dtype": "float32", "max_length": 99, "trust_remote_code": True},
        teacher={"max_num_batched_tokens": 128, "gpu_memory_utilization": 0.3, "tensor_parallel": 2},
        rollout={"gpu_memory_utilization": 0.4, "colocated": True},
        cluster={"gpus_per_engine": 0.7},
    )
    spec = EngineSpec.from_config(one, role, "/model", use_gpu=True)
    assert {name: getattr(spec, name) for name in expected} == expected
    assert (spec.checkpoint, spec.dtype, spec.max_length, spec.trust_remote_code) == ("/model", "float32", 99, True)
    assert spec.bundle() == {"CPU": 0.5 * spec.tensor_parallel, "GPU": expected["num_gpus"]}


def test_an_engine_on_a_cpu_sees_no_gpu_and_reserves_none() -> None:
    spec = EngineSpec.from_config(config(), "rollout", "/model", use_gpu=False)
    environment = replace(spec, threads=3).environment()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert spec.arguments()["kv_cache_memory_bytes"] == 2**30
    assert "kv_cache_memory_bytes" not in replace(spec, use_gpu=True).arguments(), "there it is a share of the device"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert int(environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) <= 128, "or memory grows with every batch size"
    assert "CUDA_VISIBLE_DEVICES" not in SPEC.environment()
    assert replace(SPEC, dtype="float32").environment()["TRITON_F32_DEFAULT"] == "ieee", "products are not rounded"
    assert spec.bundle() == {"CPU": 0.5}
    resources = spec.resources()
    assert (resources["num_cpus"], resources["num_gpus"]) == (0.5, 0)
    assert resources["runtime_env"] == {"env_vars": spec.environment()}


SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


@pytest.mark.parametrize(
    ("change", "longest", "batched", "expected"),
    [
        ({}, 256, 8192, 2 * 8192 * 30 * 2 * 3 * 64 * 2),
        ({}, 9000, 8192, 2 * 9000 * 30 * 2 * 3 * 64 * 2),
        ({}, 64, 64, 2 * 256 * 30 * 2 * 3 * 64 * 2),  # vLLM starts with 3 blocks at least
        ({"num_key_value_heads": 9, "head_dim": 256}, 256, 8192, 2**30),
        ({"model_type": "mamba"}, 256, 8192, 2**30),
    ],
)
def test_the_cache_of_a_scorer_on_a_cpu_holds_what_it_reads_at_a_time(
    tmp_path: Path, change: dict[str, Any], longest: int, batched: int, expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | change))
    spec = EngineSpec(str(tmp_path), "bfloat16", longest, max_num_batched_tokens=batched)
    assert cache_bytes(spec) == expected


def test_engines_that_sleep_are_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"set rollout\.tensor_parallel to 1"):
        RolloutConfig(colocated=True, tensor_parallel=2)
