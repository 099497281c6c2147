"""Products, traffic and transfers by formula against independent counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from raycomplete.config import TrainConfig
from raycomplete.plan.hardware import find_hardware
from raycomplete.plan.shapes import preset, shape_from_config
from raycomplete.plan.speed import (
    Factors,
    Network,
    collectives_s,
    decode_step_s,
    loss_s,
    prefill_s,
    sync_bytes,
    sync_s,
    tensor_parallel_s,
)
from raycomplete.plan.workload import Sequences
from raycomplete.runtime.errors import ConfigError

H100 = find_hardware("h100")
# Only products take time.
PRODUCTS = replace(
    H100, memory_bandwidth=float("inf"), call_s=0.0, product_share=1.0, softmax_per_s=float("inf"), bfloat16_flops=1e15
)


def test_forward_products_are_those_that_torch_counts() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
    )
    config._attn_implementation = "eager"  # whose products are all counted
    model = LlamaForCausalLM(config).model
    tokens = 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape = shape_from_config(config.to_dict(), "tiny")
    norms = 2 * tokens * (shape.num_layers * 2 + 1) * shape.hidden_size  # weights that no product multiplies with
    # Eager attention computes the whole T x T, which is a mean context of T; rotary angles are a small product more.
    assert shape.forward_flops(tokens, tokens) - norms == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_prefill_is_two_products_a_weight_and_attention_over_half_the_sequence() -> None:
    shape, group = preset("8B"), Sequences(64, 1025, 0)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    norms = (2 * 32 + 1) * 4096
    flops = 64 * 1024 * (2 * (matrices + norms) + 32 * 4 * 4096 * 512)
    assert prefill_s(shape, PRODUCTS, Factors(), (group,), dtype="bfloat16") == pytest.approx(flops / 1e15, rel=1e-12)


def test_the_loss_is_five_products_with_base_and_four_without() -> None:
    models = dict.fromkeys(("student", "aligned", "base"), preset("8B"))
    one = 2 * 8192 * 128256 * 4096 / 1e15
    factors = replace(Factors(), loss_share=1.0)
    both = loss_s(TrainConfig(), PRODUCTS, factors, 8192, 8192, models, "bfloat16")
    aligned_only = loss_s(TrainConfig(), PRODUCTS, factors, 8192, 0, models, "bfloat16")
    frozen_head = loss_s(TrainConfig(lora_rank=8), PRODUCTS, factors, 8192, 8192, models, "bfloat16")
    assert [both / one, aligned_only / one, frozen_head / one] == pytest.approx([5, 4, 4], rel=1e-12)


def test_decoding_reads_weights_and_cached_keys_once_a_token() -> None:
    shape = preset("8B")
    hardware = replace(H100, call_s=0.0)
    factors = replace(Factors(), bandwidth_share=1.0, decode_call_s=0.0)
    seconds = decode_step_s(shape, hardware, factors, 16, 1000, dtype="bfloat16")
    weights = (shape.num_parameters - 128256 * 4096) * 2  # one row of the embedding is read, all of the head
    keys = 16 * 1000 * 32 * 2 * 8 * 128 * 2
    assert seconds == pytest.approx((weights + keys) / 3350e9, rel=1e-12)


def test_collectives_move_what_a_ring_moves() -> None:
    factors = replace(Factors(), link_share=1.0)
    weights, gradients = 16e9, 16e9
    inside = collectives_s(H100, factors, weights, gradients, 1, 8, 8, 1)
    assert inside == pytest.approx(2 * 16e9 * 7 / 8 / 450e9)
    assert collectives_s(H100, factors, weights, gradients, 3, 8, 8, 1) == pytest.approx(1.5 * inside), (
        "ZeRO-3 of the paper"
    )
    across = collectives_s(H100, factors, weights, gradients, 1, 16, 8, 1)
    assert across == pytest.approx(2 * 16e9 * 15 / 16 / 50e9)
    assert collectives_s(H100, factors, weights, gradients, 3, 1, 8, 1) == 0
    reduced = tensor_parallel_s(preset("70B"), H100, factors, 1000, "bfloat16", 4)
    assert reduced == pytest.approx(80 * 2 * (2 * 3 / 4) * 1000 * 8192 * 2 / 450e9)


def test_an_update_carries_all_weights_or_adapters_only() -> None:
    student = preset("8B")
    moved = sync_bytes(student, TrainConfig(), "bfloat16")
    assert moved == student.num_parameters * 2
    assert sync_bytes(student, TrainConfig(lora_rank=8), "bfloat16") < moved / 100
    one, two = (sync_s(moved, H100, Factors(), Network(6.25e9), engine_nodes=count, nodes=8) for count in (1, 2))
    assert two - one == pytest.approx(moved / 6.25e9)


def test_unknown_hardware_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no hardware 'h20'\. Did you mean 'h200'"):
        find_hardware("h20")
    assert find_hardware("H100").label == H100.label
