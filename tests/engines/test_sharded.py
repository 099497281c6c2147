"""What engines that are cut over several GPUs are given: arguments for vLLM, and weights as a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycomplete.config import RolloutConfig
from raycomplete.engines import weights
from raycomplete.engines.spec import engine_arguments
from raycomplete.engines.weights import checkpoint_folder

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


@pytest.mark.parametrize(("free", "in_memory"), [(2**40, True), (64 * 2**10, False)])
def test_weights_for_which_memory_has_no_room_go_to_the_disk(
    free: int, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = tmp_path / "shm", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(weights, "_MEMORY", str(memory))
    monkeypatch.setattr(weights.tempfile, "tempdir", str(disk))
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with checkpoint_folder(iter({"a": torch.zeros(2**14)}.items())) as folder:
        assert Path(folder).parent == (memory if in_memory else disk)


def test_engines_that_sleep_are_not_sharded() -> None:
    with pytest.raises(ValueError, match=r"set rollout\.tensor_parallel to 1"):
        RolloutConfig(colocated=True, tensor_parallel=2, lookahead=0)
