"""What engines that are cut over several GPUs are given: arguments for vLLM, and weights as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycomplete.config import RolloutConfig
from raycomplete.engine_options import engine_arguments
from raycomplete.rollout.weights import checkpoint_folder

ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_length": 64,
    "use_gpu": True,
    "gpu_memory_utilization": 0.5,
    "max_num_batched_tokens": 512,
    "trust_remote_code": False,
}


def test_only_sharded_engines_start_processes_beside_the_actor() -> None:
    alone, cut = (engine_arguments("/nowhere", **ENGINE, tensor_parallel=count) for count in (1, 4))
    assert cut == alone | {"tensor_parallel_size": 4, "distributed_executor_backend": "mp"}


def test_every_bit_of_the_weights_is_in_the_folder_for_as_long_as_it_is_read() -> None:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(5, 3).bfloat16(), "b.weight": torch.randn(3, 4).T, "c": torch.arange(3)}
    with checkpoint_folder(iter(tensors.items())) as folder:
        found = load_file(f"{folder}/model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not Path(folder).exists()


def test_engines_that_sleep_are_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"set rollout\.tensor_parallel to 1"):
        RolloutConfig(colocated=True, tensor_parallel=2, lookahead=0)
