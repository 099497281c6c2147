"""Memory against real tensors and the ZeRO paper, products against torch's counter, and refusals with a remedy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from raycomplete.config import Dtype, load_run_file
from raycomplete.losses.chunked_pass import rows_per_chunk
from raycomplete.plan.catalogue import find_hardware, preset, shape_from_config
from raycomplete.plan.estimate import (
    Request,
    choose_layout,
    chunk_rows,
    engine_memory,
    engine_s,
    make_plan,
    memory_of,
    states_bytes,
    step_s,
    sync_bytes,
    worker_memory,
)
from raycomplete.runtime.errors import SetupError
from tests.plan.conftest import JOBS, a_request, of_all

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=211,
    tie_word_embeddings=True,
)
SHAPE = shape_from_config(TINY.to_dict(), "tiny")


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_stages_follow_the_paper(stage: int, gigabytes: float) -> None:
    parts = states_bytes(7.5e9, "bfloat16", stage, 64)
    halved = sum(parts.values()) - parts["gradients"] / 2  # the paper has gradients in two bytes
    assert halved / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert states_bytes(100, "bfloat16", 0, 8) == states_bytes(100, "bfloat16", 1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_bytes_of_a_real_optimizer(dtype: Dtype) -> None:
    model = LlamaForCausalLM(TINY).to(getattr(torch, dtype))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for name, v in state.items() if name != "step")
    whole = sum(parameter.nbytes for parameter in trained)
    masters = whole if dtype == "bfloat16" else 0
    expected = {"weights": weights, "gradients": whole, "optimizer": moments + masters}
    assert states_bytes(SHAPE.num_parameters, dtype, 0, 1) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_saves(dtype: Dtype) -> None:
    tokens = 512
    model = LlamaForCausalLM(TINY).to(getattr(torch, dtype)).train()
    held = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.randint(0, TINY.vocab_size, (1, tokens)), use_cache=False)
    expected = tokens * SHAPE.num_layers * SHAPE.activation_bytes_per_token(dtype)
    assert expected == pytest.approx(sum(saved.values()), rel=0.15)


def test_forward_products_are_those_that_torch_counts() -> None:
    config = LlamaConfig(**TINY.to_dict())
    config._attn_implementation = "eager"  # whose products are all counted
    model, tokens = LlamaForCausalLM(config).model, 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    norms = 2 * tokens * (SHAPE.num_layers * 2 + 1) * SHAPE.hidden_size  # weights that no product multiplies with
    # Eager attention computes the whole T x T, which is a mean context of T; rotary angles are a small product more.
    assert SHAPE.forward_flops(tokens, tokens) - norms == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab_size", [211, 49152, 128256, 40_000_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_follow_the_rule_of_the_loss(dtype: Dtype, vocab_size: int, device: str) -> None:
    expected = rows_per_chunk("auto", vocab_size, getattr(torch, dtype), torch.device(device))
    assert chunk_rows(vocab_size, dtype, is_gpu=device == "cuda") == expected


def test_engines_hold_their_share_of_weights_and_keys() -> None:
    asked = a_request()
    scorer = engine_memory(asked, "aligned", 1, 4)
    assert scorer["weights"] == (preset("70B").num_parameters - 128256 * 8192) * 2 / 4
    assert scorer["KV cache"] == 8192 * 80 * 2 * 8 * 128 * 2 / 4
    rollout = engine_memory(asked, "rollout", 1, 1)  # prompts of 64 with 65.5 tokens of h, and 64 new tokens
    assert rollout["KV cache"] == 256 * 193.5 * 32 * 2 * 8 * 128 * 2, "256 of 512 at a time"
    assert sync_bytes(asked) == preset("8B").num_parameters * 2
    assert sync_bytes(a_request("train.lora_rank=8")) < sync_bytes(asked) / 100


def test_time_is_operations_by_reached_peak_and_bytes_by_bandwidth() -> None:
    asked = a_request(shapes=of_all("8B"))
    scored = asked.work.scored["aligned"]
    flops = sum(2.0 * preset("8B").body_parameters * item.tokens for item in scored)
    assert engine_s(asked, "aligned", 2) == pytest.approx(flops / (2 * 989e12 * 0.7), rel=0.02), "attention is small"
    weights = 64 * preset("8B").num_parameters * 2 / (3350e9 * 0.7)  # read once for each new token
    assert weights < engine_s(asked, "rollout", 512) < 1.2 * weights
    assert weights / 4 < engine_s(asked, "rollout", 2048, 4) < 1.2 * weights / 4


def test_the_large_example_fits_and_uses_at_most_what_is_there() -> None:
    asked = a_request()
    plan = make_plan(asked)
    assert plan.layout.devices <= 64
    assert plan.layout.parallel == {"aligned": 2, "base": 2, "rollout": 1}, "two H100 hold a 70B engine"
    assert all(sum(parts.values()) <= asked.usable_bytes for parts in plan.memory.values())
    assert plan.step_s == pytest.approx(plan.seconds[plan.bottleneck] + plan.seconds["updates of weights"])
    assert plan.cost == pytest.approx(plan.hours * 64 * asked.hardware.example_price)
    for workers in (1, 2, 4, 8, 16):  # no other number of workers is faster
        assert step_s(asked, replace(plan.layout, workers=workers)) >= plan.step_s * 0.999


def test_one_small_device_is_shared_in_turns() -> None:
    config = load_run_file(JOBS / "organism.yaml")
    asked = Request(config, of_all("135m"), find_hardware("cpu"))
    plan = make_plan(asked)
    assert plan.layout.shared
    assert plan.step_s == pytest.approx(sum(plan.seconds.values()))
    assert sum(sum(parts.values()) for parts in memory_of(asked, plan.layout).values()) <= asked.usable_bytes


def test_higher_stages_and_recomputation_need_less() -> None:
    settings: list[tuple[int, str]] = [(1, "false"), (2, "false"), (2, "true"), (3, "true")]
    totals = [
        sum(worker_memory(a_request(f"train.zero_stage={stage}", f"train.gradient_checkpointing={again}"), 16).values())
        for stage, again in settings
    ]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("overrides", "changes", "words"),
    [
        ([], {"nodes": 1, "devices_per_node": 1}, "aligned scorer does not fit.*--gpus-per-node 9"),
        (
            ["train.gradient_checkpointing=false", "train.per_device_batch_size=64"],
            {"nodes": 2},
            r"training worker does not fit.*fits: train.gradient_checkpointing=true\.",
        ),
        (["train.zero_stage=1"], {"nodes": 2, "shapes": of_all("14B")}, r"fits: train.zero_stage=2\."),
    ],
)
def test_a_refusal_names_the_smallest_change_that_fits(
    overrides: list[str], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SetupError, match=words):
        choose_layout(a_request(*overrides, **changes))


def test_the_proposed_change_does_fit() -> None:
    assert choose_layout(a_request(nodes=1, devices_per_node=9)).devices <= 9
    asked = a_request("train.gradient_checkpointing=true", "train.per_device_batch_size=64", nodes=2)
    assert choose_layout(asked).workers >= 1


def test_zero_3_is_not_proposed_beside_an_adversary() -> None:
    adversary = ("method.suffix_adversary.steps=8", "rollout.prompt_augmentation.fraction=0.3")
    for extra, deepest in (((), "3"), (adversary, "2")):
        with pytest.raises(SetupError) as caught:
            choose_layout(a_request("train.zero_stage=2", *extra, shapes=of_all("32B"), nodes=2))
        assert set(re.findall(r"zero_stage=(\d)", str(caught.value))) == {deepest}, str(caught.value)
