"""Carriers of weights: who may use which, and that vLLM unpacks what they carry."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from raycomplete.config import parse
from raycomplete.engines import weight_transfer
from raycomplete.engines.weight_transfer import (
    EnginePlace,
    NcclCarrier,
    choose_backend,
    placement_problem,
    widest_first,
)

MODELS = {"base": "organism:base", "aligned": "organism:aligned", "dtype": "bfloat16"}
WHOLE = {"gpus_per_engine": 1, "gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("num_gpus", "sections", "backend", "why"),
    [
        (1, {}, "ipc", ""),
        (2, {"cluster": WHOLE}, "nccl", ""),
        (2, {"cluster": WHOLE, "rollout": {"num_engines": 2}}, "nccl", ""),
        (4, {"rollout": {"tensor_parallel": 2}}, "nccl", ""),
        (2, {"rollout": {"colocated": True}, "cluster": WHOLE}, "ipc", ""),
        (2, {}, "ipc", ""),  # shares of 0.2 and 0.4 are packed onto one card
        (0, {}, None, "no GPU"),
        (2, {"cluster": WHOLE, "train": {"lora_rank": 4}}, None, "adapters"),
        (2, {"cluster": WHOLE, "rollout": {"on_policy": False}}, None, "does not roll out"),
        (1, {"rollout": {"num_engines": 2}}, None, "serves one engine"),
        (1, {"rollout": {"tensor_parallel": 2}}, None, "serves one engine"),
    ],
)
def test_the_carrier_follows_devices_and_the_run_file(
    num_gpus: int, sections: dict[str, Any], backend: str | None, why: str
) -> None:
    sections = sections | {"rollout": {"on_policy": True, **sections.get("rollout", {})}}
    config = parse({"models": MODELS, "data": {}, **sections}, "test")
    found, said = choose_backend(config, num_gpus=num_gpus, vllm_version="0.32.0")
    assert found == backend
    assert why in said
    assert bool(said) is (backend is None)


def test_a_vllm_whose_transfer_nobody_has_read_takes_the_object_store() -> None:
    config = parse({"models": MODELS, "data": {}, "rollout": {"on_policy": True}}, "test")
    for version in ("0.31.2", "0.33.0", "0.320.0", ""):
        found, why = choose_backend(config, num_gpus=1, vllm_version=version)
        assert found is None
        assert version in why


@pytest.mark.parametrize(
    ("backend", "engines", "suits"),
    [
        ("nccl", [("b",)], True),
        ("nccl", [("b", "c"), ("d",)], True),
        ("nccl", [("b",), ("a",)], False),
        ("nccl", [("b",), ("b",)], False),
        ("ipc", [("a",)], True),
        ("ipc", [("b",)], False),
        ("ipc", [("a",), ("a",)], False),
    ],
)
def test_devices_that_do_not_suit_a_carrier_are_told(backend: str, engines: list[tuple[str, ...]], suits: bool) -> None:
    places = [EnginePlace("x", devices) for devices in engines]
    assert bool(placement_problem(backend, "a", places)) is not suits


# Producer and consumer of vLLM on the CPU: streams and devices are stood in for, the wire is real.
STATE = {
    "a": torch.arange(3.0),  # an odd number of bfloat16 before int64
    "b": torch.arange(3),
    "c": torch.randn(5, 3).T,
    "d": torch.randn(2).to(torch.bfloat16),
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.distributed.weight_transfer import packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    real_empty = torch.empty
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda tensor: (None, (tensor,)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **values: real_empty(*size, **values))
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda place: nullcontext())
    for name in ("current_device", "synchronize", "current_stream", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda *place, name=name: 0 if name == "current_device" else stream)
    monkeypatch.setattr(
        weight_transfer,
        "_on_device",
        lambda tensors, dtype, _: (
            (name, item.to(weight_transfer._dtype(item, dtype))) for name, item in tensors.items()
        ),
    )
    return packed_tensor


def same_as_sent(found: dict[str, torch.Tensor]) -> bool:
    expected = {name: item.bfloat16() if item.is_floating_point() else item for name, item in STATE.items()}
    return found.keys() == expected.keys() and all(
        found[name].dtype == item.dtype and torch.equal(found[name], item) for name, item in expected.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [10, 2**20])
def test_what_nccl_carries_is_what_vllm_unpacks(on_cpu: Any, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    sent: list[torch.Tensor] = []
    carrier, found = NcclCarrier(), {}
    infos = carrier.infos([EnginePlace("x", ("b", "c")), EnginePlace("y", ("d",))])
    assert [info["rank_offset"] for info in infos] == [1, 3]
    assert {info["world_size"] for info in infos} == {4}
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

    assert NCCLWeightTransferInitInfo(**infos[0]).master_port > 0
    carrier._group = SimpleNamespace(broadcast=lambda tensor, src: sent.append(tensor.clone()))

    def update(info: dict[str, Any], beside: Any) -> None:
        beside()
        arrived = iter(sent)
        described = zip(info["names"], info["shapes"], info["dtype_names"], strict=True)
        on_cpu.packed_nccl_broadcast_consumer(
            iterator=((name, (shape, getattr(torch, dtype))) for name, shape, dtype in described),
            group=SimpleNamespace(broadcast=lambda tensor, src: tensor.copy_(next(arrived))),
            src=0,
            post_unpack_func=lambda tensors: found.update({name: item.clone() for name, item in tensors}),
            buffer_size_bytes=infos[0]["packed_buffer_size_bytes"],
            num_buffers=infos[0]["packed_num_buffers"],
            device="cpu",
        )

    carrier.send(widest_first(STATE, torch.bfloat16), torch.bfloat16, update)
    assert same_as_sent(found)
    assert (len(sent) > 1) is (chunk_bytes == 10)
