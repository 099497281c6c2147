"""Gemma: attention with bounded logits, and language models inside of multimodal checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import check_trainable, fingerprint, load_model, save_checkpoint, tensor_files
from raycomplete.data.heads import read_head_spec
from raycomplete.data.organism.toy import build_tokenizer
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.runtime.errors import CheckpointError
from tests.data.test_heads import assert_rebuilds
from tests.training.tiny import make_model

TOKENS = torch.tensor([[2, 5, 17, 40, 8, 90, 33]])
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "initializer_range": 0.3,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def test_attention_keeps_the_bound_on_its_logits(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 0, kind="gemma2", head_dim=16, attn_logit_softcapping=1.0)
    eager, fused = (
        logits(AutoModelForCausalLM.from_pretrained(path, attn_implementation=name)) for name in ("eager", "sdpa")
    )
    assert float((eager - fused).abs().max()) > 0.1, "the bound does nothing here"
    torch.testing.assert_close(logits(load_model(path, "float32")), eager)


def multimodal(folder: Path, spelling: str) -> Any:
    """Writes a tiny Gemma 3 with eyes, as earlier or later versions of transformers do, and returns it."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    if spelling == "later":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for file in folder.glob("*.safetensors"):
            tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def renamed(name: str) -> str:
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("spelling", ["earlier", "later"])
def test_the_language_model_of_a_multimodal_checkpoint_is_read_trained_and_written(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYCOMPLETE_CACHE", str(tmp_path / "cache"))
    whole = multimodal(tmp_path / "gemma", spelling)
    path = resolve_checkpoint(str(tmp_path / "gemma"), role="aligned")
    assert path == resolve_checkpoint(str(tmp_path / "gemma"), role="base"), "made once"
    model = load_model(path, "float32")
    assert type(model).__name__ == json.loads((path / "config.json").read_text())["architectures"][0]
    assert logits(model).equal(logits(whole))
    spec = read_head_spec(path, len(build_tokenizer()), "words")
    assert spec.weight_key == "model.embed_tokens.weight"
    assert_rebuilds(path, spec)
    for lora in (False, True):
        check_trainable(path, synced=True, lora=lora)
    student = tmp_path / "student"
    save_checkpoint(student, model, ChatCodec(path), dict(model.named_parameters()))
    assert tensor_files(student).keys() == tensor_files(path).keys()
    assert logits(load_model(student, "float32")).equal(logits(whole))
    assert fingerprint(path) != fingerprint(tmp_path / "gemma")


def test_a_quantised_multimodal_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its language model's own configuration would not say so, and packed weights would be left out without a word."""
    monkeypatch.setenv("RAYCOMPLETE_CACHE", str(tmp_path / "cache"))
    multimodal(tmp_path / "gemma", "earlier")
    file = tmp_path / "gemma" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(CheckpointError, match=r"models\.aligned: .* is multimodal and quantised"):
        resolve_checkpoint(str(tmp_path / "gemma"), role="aligned")
