"""Checks before a training: names of fused experts, modules that LoRA adapts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import (
    adapted_modules,
    check_trainable,
    load_model,
    save_checkpoint,
    tensor_files,
    with_file_names,
)
from raycomplete.runtime.errors import CheckpointError
from tests.training.tiny import MIXTURES, make_model

TOKENS = torch.tensor([[2, 5, 17, 40, 8, 90, 33]])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", *MIXTURES])
def test_weights_get_the_names_and_bits_of_their_files(kind: str, tied: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 0, kind=kind, tied=tied)
    model = load_model(path, "float32")
    stored = load_file(path / "model.safetensors")
    found = with_file_names(model, dict(model.named_parameters()))
    assert found.keys() == stored.keys() == tensor_files(path).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    for lora in (False, True):
        check_trainable(path, synced=True, lora=lora)


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_exported_mixture_is_read_again_with_equal_logits(kind: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 0, kind=kind)
    model = load_model(path, "float32")
    state = {name: tensor.detach() * 1.1 for name, tensor in model.named_parameters()}  # as a trainer gathers it
    save_checkpoint(tmp_path / "student", model, ChatCodec(path), state)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        expected_BTV = model(TOKENS).logits
        found_BTV = load_model(tmp_path / "student", "float32")(TOKENS).logits
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=0)
    assert tensor_files(tmp_path / "student").keys() == tensor_files(path).keys()


@pytest.mark.parametrize("kind", ["llama", *MIXTURES])
def test_adapters_leave_out_head_router_and_experts(kind: str, tmp_path: Path) -> None:
    names = adapted_modules(load_model(make_model(tmp_path / "m", 0, kind=kind, tied=False), "float32"))
    layer = [name.rpartition(".")[2] for name in names if ".layers.0." in name]
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert layer == (attention if kind in MIXTURES else [*attention, "gate_proj", "up_proj", "down_proj"])
    assert len(names) == 2 * len(layer), "and nothing outside of the layers"


def test_a_file_with_names_that_training_cannot_give_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 0)
    stored = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, path / "model.safetensors")
    check_trainable(path)
    for lora in (False, True):
        with pytest.raises(CheckpointError, match=r"cannot be sent to the rollout engines: \d+ tensors are named"):
            check_trainable(path, synced=True, lora=lora)


def test_adapters_of_transposed_weights_are_sent_to_no_engine(tmp_path: Path) -> None:
    lm = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=64))
    lm.save_pretrained(tmp_path / "gpt2")
    check_trainable(tmp_path / "gpt2", lora=True)
    with pytest.raises(CheckpointError, match="engines merge no adapter"):
        check_trainable(tmp_path / "gpt2", synced=True, lora=True)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 0)
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"are quantised \(mxfp4\), and only plain ones can be trained"):
        check_trainable(path)
