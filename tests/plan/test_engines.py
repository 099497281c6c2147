"""Products, traffic, transfers and memory of engines by formula against independent counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from raycomplete.plan.catalogue import find_hardware, preset, shape_from_config
from raycomplete.plan.engines import PlannedEngine, sync_bytes, sync_s
from raycomplete.plan.workload import Sequences
from tests.plan.conftest import PRODUCTS, a_request

H100 = find_hardware("h100")


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
    assert PlannedEngine(shape, PRODUCTS, "bfloat16").prefill_s((group,)) == pytest.approx(flops / 1e15, rel=1e-12)


def test_decoding_reads_weights_and_cached_keys_once_a_token() -> None:
    shape = preset("8B")
    hardware = replace(H100, call_s=0.0, bandwidth_share=1.0, decode_call_s=0.0)
    seconds = PlannedEngine(shape, hardware, "bfloat16").decode_step_s(16, 1000)
    weights = (shape.num_parameters - 128256 * 4096) * 2  # one row of the embedding is read, all of the head
    keys = 16 * 1000 * 32 * 2 * 8 * 128 * 2
    assert seconds == pytest.approx((weights + keys) / 3350e9, rel=1e-12)


def test_tensor_parallel_reduces_the_residual_stream_twice_a_layer() -> None:
    engine = PlannedEngine(preset("70B"), replace(H100, link_share=1.0), "bfloat16", parallel=4)
    assert engine.reduce_s(1000) == pytest.approx(80 * 2 * (2 * 3 / 4) * 1000 * 8192 * 2 / 450e9)


def test_an_update_carries_all_weights_or_adapters_only() -> None:
    asked = a_request()
    moved = sync_bytes(asked)
    assert moved == preset("8B").num_parameters * 2
    assert sync_bytes(a_request("train.lora_rank=8")) < moved / 100
    assert sync_bytes(a_request("rollout.on_policy=false")) == 0
    one, two = (sync_s(asked, devices) for devices in (8, 9))  # of nodes with eight devices each
    assert two - one == pytest.approx(moved / 6.25e9)


def test_engines_hold_their_share_of_weights_and_keys() -> None:
    shape = preset("70B")
    scorer = PlannedEngine(shape, H100, "bfloat16", parallel=4).scorer_memory()
    assert scorer["weights"] == (shape.num_parameters - 128256 * 8192) * 2 / 4
    assert scorer["KV cache"] == 8192 * 80 * 2 * 8 * 128 * 2 / 4
    rollout = PlannedEngine(preset("8B"), H100, "bfloat16").rollout_memory(Sequences(500, 60, 40))
    assert rollout["KV cache"] == 256 * 100 * 32 * 2 * 8 * 128 * 2, "256 of 500 at a time"
