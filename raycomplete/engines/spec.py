"""The one description of a vLLM engine: its model, its limits and what it reserves. Imports neither vllm nor ray.

Scorers, rollout engines, the engines of judges, attackers and chats and the doctor's smoke test all start from an
`EngineSpec`: its `resources` and `environment` make the process, its `arguments` make `vllm.LLM` inside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raycomplete.config import ClusterConfig, Dtype, RunConfig
from raycomplete.runtime.machine import available_cpus

# scorer: reads hidden states of a frozen model. rollout: generates for the run. single: generates with a model that is
# none of the run's generators, on one device (judge, attacker, chat).
EngineRole = Literal["scorer", "rollout", "single"]

OBJECT_STORE_BYTES = 2 * 2**30  # what scores and samples take on one machine
_GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # sequences that decode side by side; the last: the most


@dataclass(frozen=True)
class EngineSpec:
    """One vLLM engine."""

    checkpoint: str
    dtype: Dtype
    max_length: int  # prompt and response together
    use_gpu: bool = False
    gpu_memory_utilization: float = 0.25
    max_num_batched_tokens: int = 8192  # of one forward pass; never less than max_length
    tensor_parallel: int = 1  # GPUs of one node that hold the model together
    cuda_graphs: bool = False  # GPU: steps of decoding are replayed; prompts are read without
    sleeps: bool = False  # GPU: the engine gives memory back after each batch (vLLM's sleep level 1)
    weight_transfer: str | None = None  # vLLM's carrier by which the engine can receive weights
    trust_remote_code: bool = False
    kv_cache_gib: int = 1  # CPU
    threads: int | None = None  # CPU: OpenMP threads; all cores when absent
    num_cpus: float = 0.5  # that Ray reserves
    num_gpus: float = 0.0

    @classmethod
    def from_config(cls, config: RunConfig, role: EngineRole, checkpoint: str | Path, *, use_gpu: bool) -> EngineSpec:
        """Reads the settings of one role from a run file: section `teacher` for a scorer, else `rollout`."""
        section = config.teacher if role == "scorer" else config.rollout
        batched = config.teacher.max_num_batched_tokens if role == "scorer" else cls.max_num_batched_tokens
        tensor_parallel = 1 if role == "single" else section.tensor_parallel
        num_cpus, num_gpus = engine_share(config.cluster, tensor_parallel)
        return cls(
            str(checkpoint),
            config.models.weight_dtype,
            config.models.max_length,
            use_gpu=use_gpu,
            gpu_memory_utilization=section.gpu_memory_utilization,
            tensor_parallel=tensor_parallel,
            cuda_graphs=use_gpu and role == "rollout",
            sleeps=role == "rollout" and config.rollout.colocated,
            trust_remote_code=config.models.trust_remote_code,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_num_batched_tokens=batched,
        )

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `vllm.LLM` that pooling and generating engines share."""
        arguments: dict[str, Any] = {
            "model": self.checkpoint,
            "dtype": self.dtype,
            "max_model_len": self.max_length,
            "max_num_batched_tokens": max(self.max_num_batched_tokens, self.max_length),
            "max_num_seqs": _GRAPH_SIZES[-1],
            "enforce_eager": True,  # start in seconds; these engines serve short runs
            "trust_remote_code": self.trust_remote_code,
            "load_format": "safetensors",  # "auto" reads pickles, or consolidated files as other weights
            "disable_log_stats": True,
            "seed": 0,
        }
        if self.use_gpu:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
            # vLLM would import FlashInfer at every start and time its kernels, for seconds.
            arguments["kernel_config"] = {"enable_flashinfer_autotune": False}
            if self.cuda_graphs:
                # Without them a step of decoding costs its kernel launches, some 10 a layer, whatever the model's size.
                # Nothing is compiled (mode 0), and few sizes are captured, so that the start takes seconds still.
                graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*_GRAPH_SIZES]}
                arguments |= {"enforce_eager": False, "compilation_config": graphs}
        else:
            arguments["kv_cache_memory_bytes"] = self.kv_cache_gib * 2**30
        if self.weight_transfer:
            arguments["weight_transfer_config"] = {"backend": self.weight_transfer}
        if self.tensor_parallel > 1:
            # Shards are processes beside the actor, on the GPUs that Ray gave it. Inside a placement group vLLM would
            # ask Ray to start them, which has no further GPU to give.
            arguments |= {"tensor_parallel_size": self.tensor_parallel, "distributed_executor_backend": "mp"}
        return arguments

    def environment(self) -> dict[str, str]:
        """Returns the environment of the process that hosts the engine; it must be set before vllm is imported."""
        environment = {
            # The engine lives in the actor's own process: one death to notice instead of two, and half the imports.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if self.use_gpu:
            # FlashInfer compiles at first use, which a machine without a network or a compiler cannot do.
            environment["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
            if self.dtype == "float32":
                # vLLM takes Triton for attention in float32, whose products round to 10 bits (TF32): 5e-4 nats, where
                # the parity gate allows 1e-5.
                environment["TRITON_F32_DEFAULT"] = "ieee"
            return environment
        return environment | {
            # Several engines share the cores of one machine; pinning each to the same cores would starve the others.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Idle OpenMP threads sleep instead of spinning: with a second busy process on 2 cores, SmolLM2-135M in bf16
            # generated 134 tokens/s this way and 15 with spinning threads.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(self.threads or available_cpus()),
            "CUDA_VISIBLE_DEVICES": "",
            # oneDNN keeps code for every shape that it has met, 1024 of them: where each step batches another number of
            # tokens, an engine of the organism grew by 380 MB over 4,000 requests, and by 40 with 128 of them.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        }

    def bundle(self) -> dict[str, float]:
        """Returns what the engine reserves, as a bundle of a Ray placement group."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.use_gpu and self.num_gpus > 0 else {})

    def resources(self) -> dict[str, Any]:
        """Returns the options of the Ray actor that hosts the engine: what it reserves, and its environment."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus if self.use_gpu else 0,
            "runtime_env": {"env_vars": self.environment()},
        }


def engine_share(cluster: ClusterConfig, tensor_parallel: int = 1) -> tuple[float, float]:
    """Returns the CPUs and GPUs that one engine reserves; with tensor parallelism it holds whole GPUs."""
    gpus = cluster.gpus_per_engine if tensor_parallel == 1 else float(tensor_parallel)
    return cluster.cpus_per_engine * tensor_parallel, gpus


def object_store_bytes(config: RunConfig, num_parameters: int, dtype: Dtype) -> int:
    """Returns the size of the object store that a run on one machine needs.

    Whole weights of a student that rolls out pass through it: the version that is packed, the one that the engines
    hold, and one for each batch ahead.
    """
    whole = config.rollout.on_policy and not config.train.lora_rank
    versions = config.rollouts_ahead + 2 if whole else 0
    return OBJECT_STORE_BYTES + versions * num_parameters * (4 if dtype == "float32" else 2)
