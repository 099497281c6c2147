"""How every vLLM engine of raycomplete is started, on a CPU or a GPU. Imports neither vllm nor ray."""

from __future__ import annotations

import os
from typing import Any

from raycomplete.config import Dtype
from raycomplete.runtime.machine import available_cpus


def engine_environment(*, use_gpu: bool, kv_cache_gib: int = 1, threads: int | None = None) -> dict[str, str]:
    """Environment of a process that hosts an engine; must be set before vllm is imported.

    Args:
        use_gpu: False selects the settings of a CPU machine.
        kv_cache_gib: CPU only: key-value cache of one engine in GiB.
        threads: CPU only: OpenMP threads of one engine; all cores when absent.
    """
    environment = {
        # The engine lives in the actor's own process: one death to notice instead of two, and half the imports.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if use_gpu:
        # FlashInfer compiles at first use, which a machine without a network or a compiler cannot do.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
        return environment
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        # Several engines share the cores of one machine; pinning each to the same cores would starve the others.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Idle OpenMP threads sleep instead of spinning: with a second busy process on 2 cores, SmolLM2-135M in bf16
        # generated 134 tokens/s this way and 15 with spinning threads.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads or available_cpus()),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return environment


def engine_arguments(
    path: str,
    *,
    dtype: Dtype,
    max_length: int,
    use_gpu: bool,
    gpu_memory_utilization: float,
    max_num_batched_tokens: int,
    trust_remote_code: bool,
    tensor_parallel: int = 1,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that pooling and generating engines share."""
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": dtype,
        "max_model_len": max_length,
        "max_num_batched_tokens": max(max_num_batched_tokens, max_length),
        "max_num_seqs": 256,
        "enforce_eager": True,  # start in seconds; these engines serve short runs and changing weights
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # "auto" falls back to pickles, and takes consolidated files for other weights
        "disable_log_stats": True,
        "seed": 0,
    }
    if use_gpu:
        arguments["gpu_memory_utilization"] = gpu_memory_utilization
    if tensor_parallel > 1:
        # Shards are processes beside the actor, on the GPUs that Ray gave it. Inside a placement group vLLM would ask
        # Ray to start them, which has no further GPU to give.
        arguments |= {"tensor_parallel_size": tensor_parallel, "distributed_executor_backend": "mp"}
    return arguments
