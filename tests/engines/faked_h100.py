"""Builds vLLM's configuration of every kind of engine as on an H100, on a machine without one: `python faked_h100.py`.

What a CPU build of vLLM lacks for CUDA is stubbed before vLLM is imported, and the platform answers as an H100 would.
Prints one JSON object: by engine, what the device's code would be started with.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from dataclasses import replace
from typing import Any
from unittest.mock import patch

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
for name in ("_C_stable_libtorch", "_C", "_moe_C", "_moe_C_stable_libtorch", "cumem_allocator"):
    module = types.ModuleType(f"vllm.{name}")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    sys.modules[module.__name__] = module

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import NonNvmlCudaPlatform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class FakedH100(NonNvmlCudaPlatform):
    """An H100 by its answers."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 * 2**30

    @classmethod
    def device_count(cls) -> int:
        return 2

    def is_sleep_mode_available(self) -> bool:
        return True

    def is_cumem_allocator_available(self) -> bool:
        return True

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return True


vllm.platforms._current_platform = FakedH100()  # before anything of vLLM takes hold of the real one

from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from raycomplete.config import parse  # noqa: E402
from raycomplete.engines.rollout_worker import RolloutEngine  # noqa: E402
from raycomplete.engines.scoring_engine import PoolingEngine  # noqa: E402
from raycomplete.engines.spec import EngineSpec  # noqa: E402


def describe(arguments: dict[str, Any]) -> dict[str, Any]:
    config = EngineArgs(**arguments).create_engine_config()
    with patch("vllm.config.vllm.HAS_TRITON", True):  # it has none without a driver
        v2_runner = bool(config.use_v2_model_runner)
    compilation, cache, scheduler = config.compilation_config, config.cache_config, config.scheduler_config
    return {
        "device": config.device_config.device_type,
        "worker": config.parallel_config.worker_cls,
        "executor": str(config.parallel_config.distributed_executor_backend),
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "dtype": str(config.model_config.dtype),
        "eager": config.model_config.enforce_eager,
        "sleeps": config.model_config.enable_sleep_mode,
        "task": str(getattr(config.model_config.pooler_config, "task", None)),
        "compiles": int(compilation.mode) if compilation.mode is not None else None,
        "graphs": compilation.cudagraph_mode.name,
        "graph_sizes": list(compilation.cudagraph_capture_sizes or []),
        "memory": cache.gpu_memory_utilization,
        "prefix_caching": bool(cache.enable_prefix_caching),
        "chunked_prefill": bool(scheduler.enable_chunked_prefill),
        "batched_tokens": scheduler.max_num_batched_tokens,
        "v2_runner": v2_runner,
        "weight_transfer": getattr(config.weight_transfer_config, "backend", None),
        "autotunes": config.kernel_config.enable_flashinfer_autotune,
    }


def main(checkpoint: str) -> None:
    common: dict[str, Any] = {"use_gpu": True, "max_num_batched_tokens": 4096}
    rollout = EngineSpec(checkpoint, "bfloat16", 256, cuda_graphs=True, weight_transfer="nccl", **common)
    models = {"base": checkpoint, "aligned": checkpoint, "dtype": "bfloat16", "max_length": 256}
    run = {"models": models, "data": {}, "rollout": {"on_policy": True, "colocated": True}}
    colocated = EngineSpec.from_config(parse(run, "colocated"), "rollout", checkpoint, use_gpu=True)
    colocated = replace(colocated, weight_transfer="ipc")
    engines = {
        "scorer": PoolingEngine.arguments(EngineSpec(checkpoint, "bfloat16", 256, **common)),
        "rollout": RolloutEngine.arguments(rollout),
        "colocated": RolloutEngine.arguments(colocated),
        "judge": RolloutEngine.arguments(EngineSpec(checkpoint, "bfloat16", 256, **common)),
        "sharded": RolloutEngine.arguments(
            EngineSpec(checkpoint, "bfloat16", 256, cuda_graphs=True, tensor_parallel=2, **common)
        ),
    }
    print(json.dumps({name: describe(arguments) for name, arguments in engines.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
