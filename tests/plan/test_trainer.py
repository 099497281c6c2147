"""Memory and seconds by formula against published formulas, the trainer's own rules, and bytes of real tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raycomplete.config import Dtype, TrainConfig
from raycomplete.losses.chunked_pass import rows_per_chunk
from raycomplete.plan.catalogue import find_hardware, preset, shape_from_config
from raycomplete.plan.trainer import chunk_rows, collectives_s, loss_bytes, loss_s, states_bytes
from raycomplete.plan.workload import Workload
from tests.plan.conftest import PRODUCTS, a_request

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=211,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [  # (weights + gradients + optimizer) bytes of 7.5B parameters on 64 devices; the paper has 2-byte gradients
        (1, 2 + 4 + 12 / 64),
        (2, 2 + (4 + 12) / 64),
        (3, (2 + 4 + 12) / 64),
    ],
)
def test_zero_stages_follow_the_paper(stage: int, expected: float) -> None:
    parts = states_bytes(7.5e9, "bfloat16", stage, 64)
    assert sum(parts.values()) == pytest.approx(7.5e9 * expected, rel=1e-12)
    # With gradients in two bytes as in the paper's Figure 1: 31.4, 16.6 and 1.9 GB.
    halved = sum(parts.values()) - parts["gradients"] / 2
    assert halved / 1e9 == pytest.approx({1: 31.4, 2: 16.6, 3: 1.9}[stage], abs=0.06)


def test_stage_0_shards_nothing_in_float32_and_runs_as_stage_1_in_bfloat16() -> None:
    assert sum(states_bytes(100, "float32", 0, 8).values()) == 100 * 16
    assert states_bytes(100, "bfloat16", 0, 8) == states_bytes(100, "bfloat16", 1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_bytes_of_a_real_optimizer(dtype: Dtype) -> None:
    model = LlamaForCausalLM(TINY).to(getattr(torch, dtype))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = size(value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    masters = size(trained) if dtype == "bfloat16" else 0
    expected = {"weights": weights, "gradients": size(p.grad for p in trained), "optimizer": moments + masters}
    shape = shape_from_config(TINY.to_dict(), "tiny")
    assert states_bytes(shape.num_parameters, dtype, 0, 1) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_saves(dtype: Dtype) -> None:
    tokens = 512
    model = LlamaForCausalLM(TINY).to(getattr(torch, dtype)).train()
    held = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []  # alive, so that no address is used twice
    ids_BT = torch.randint(0, TINY.vocab_size, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=ids_BT, use_cache=False)
    shape = shape_from_config(TINY.to_dict(), "tiny")
    expected = tokens * shape.num_layers * shape.activation_bytes_per_token(dtype)
    assert expected == pytest.approx(sum(saved.values()), rel=0.15)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab_size", [211, 49152, 128256, 40_000_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_follow_the_rule_of_the_loss(dtype: Dtype, vocab_size: int, device: str) -> None:
    expected = rows_per_chunk("auto", vocab_size, getattr(torch, dtype), torch.device(device))
    assert chunk_rows(TrainConfig(), vocab_size, dtype, is_gpu=device == "cuda") == expected


ALL_8B = dict.fromkeys(("student", "aligned", "base"), preset("8B"))


def test_loss_buffers_are_three_chunks_of_logits_and_the_head_gradient_twice() -> None:
    work = Workload((), {}, None, loss_rows=8192, base_rows=8192, micro_batches=1)
    parts = loss_bytes(a_request("train.loss_chunk_tokens=1024", shapes=ALL_8B), work, 1)
    assert parts["loss chunk"] == 3 * 1024 * 128256 * 2 + 8192 * 4 * 4096 * 2
    assert parts["head gradient"] == 128256 * 4096 * (4 + 2)
    assert loss_bytes(a_request("train.lora_rank=8", shapes=ALL_8B), work, 1)["head gradient"] == 0


def test_the_loss_is_five_products_with_base_and_four_without() -> None:
    one = 2 * 8192 * 128256 * 4096 / 1e15
    asked = a_request(shapes=ALL_8B, hardware=PRODUCTS)
    both, aligned_only = loss_s(asked, 8192, 8192), loss_s(asked, 8192, 0)
    frozen_head = loss_s(asked.with_train(lora_rank=8), 8192, 8192)
    assert [both / one, aligned_only / one, frozen_head / one] == pytest.approx([5, 4, 4], rel=1e-12)


def test_an_adversary_of_suffixes_reads_its_share_of_the_samples_again() -> None:
    rollout = ["refusal_prefix_fraction=0.5", "mid_answer_fraction=0", "prompt_augmentation.fraction=0.25"]
    settings = [f"rollout.{setting}" for setting in rollout]
    plain, two, four = (
        a_request(*settings, f"method.suffix_adversary.steps={steps}").workload(8) for steps in (0, 2, 4)
    )
    assert (plain.passes, plain.launches) == (1, 1)
    assert (two.launches, four.launches) == (3, 5)
    anchor, recovery = plain.trained
    read = recovery.count * 0.25 * 0.5 * (recovery.prompt + 20 - 1)
    assert two.passes - 1 == pytest.approx(2 * 2 / 3 * read / (anchor.tokens + recovery.tokens))
    assert four.passes - 1 == pytest.approx(2 * (two.passes - 1))
    more = a_request(*settings, "method.suffix_adversary.steps=2", "rollout.prompt_augmentation.recovery_fraction=0.5")
    assert more.workload(8).passes - 1 == pytest.approx(2 * (two.passes - 1))


def test_collectives_move_what_a_ring_moves() -> None:
    h100 = replace(find_hardware("h100"), link_share=1.0)
    weights, gradients = 16e9, 16e9
    inside = collectives_s(h100, weights, gradients, 1, 8, 8, 1)
    assert inside == pytest.approx(2 * 16e9 * 7 / 8 / 450e9)
    assert collectives_s(h100, weights, gradients, 3, 8, 8, 1) == pytest.approx(1.5 * inside), "ZeRO-3 of the paper"
    assert collectives_s(h100, weights, gradients, 1, 16, 8, 1) == pytest.approx(2 * 16e9 * 15 / 16 / 50e9)
    assert collectives_s(h100, weights, gradients, 3, 1, 8, 1) == 0
