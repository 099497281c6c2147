"""Head specs: distributions rebuilt from final hidden states must be the model's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from raycomplete.data.checkpoints import fingerprint, load_model
from raycomplete.data.heads import HeadSpec, load_head, read_head_spec
from raycomplete.runtime.errors import CheckpointError
from tests.training.tiny import make_model

VOCAB, PADDED = 61, 64


def spec_of(path: Path, vocab_size: int = VOCAB) -> HeadSpec:
    return read_head_spec(path, vocab_size, "words")


def assert_rebuilds(path: Path, spec: HeadSpec) -> None:
    """Logits from `last_hidden_state` and the head equal transformers' own."""
    model = load_model(path, "float32")
    tokens = torch.randint(3, spec.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden_BTH = model.base_model(tokens).last_hidden_state
        expected_BTV = model(tokens).logits[..., : spec.vocab_size]
        rebuilt_BTV = load_head(spec, dtype=torch.float32).logits(hidden_BTH)
    assert rebuilt_BTV.shape == expected_BTV.shape
    spread = float(expected_BTV.std())
    assert spread > 0.05, f"logits are too flat to prove anything: {spread}"
    torch.testing.assert_close(rebuilt_BTV.log_softmax(-1), expected_BTV.log_softmax(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(rebuilt_BTV, expected_BTV, atol=1e-5 * max(spread, 1.0), rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_rebuilt(tied: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5, tied=tied)
    rows = load_model(path, "float32").config.vocab_size
    spec = spec_of(path, rows)
    assert_rebuilds(path, spec)
    assert spec.tied is tied
    assert spec.weight_key == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert (spec.scale, spec.softcap, spec.bias_key, spec.hidden_size) == (1.0, None, None, 32)
    assert (spec.path, spec.model_fingerprint, spec.tokenizer_hash) == (str(path), fingerprint(path), "words")
    assert asdict(spec)["vocab_size"] == rows


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tying_is_told_from_the_tensors_where_the_config_is_silent(tied: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5, tied=tied)
    config = json.loads((path / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (path / "config.json").write_text(json.dumps(config))
    assert spec_of(path).tied is tied


def test_a_tied_checkpoint_may_store_the_head_under_its_own_name_only(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5, tied=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, path / "model.safetensors")
    assert spec_of(path).weight_key == "lm_head.weight"


def test_sharded_checkpoints_are_read_through_their_index(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5, tied=False)
    model = LlamaForCausalLM.from_pretrained(path)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    whole, parts = (load_head(spec_of(item), dtype=torch.float32) for item in (path, sharded))
    assert torch.equal(whole.weight_VH, parts.weight_VH)


def test_a_checkpoint_without_head_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5, tied=False)
    weights = load_file(path / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no output head under any of lm_head\.weight"):
        spec_of(path)


def test_a_head_with_fewer_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", 5)
    rows = load_model(path, "float32").config.vocab_size
    with pytest.raises(CheckpointError, match=f"has {rows} rows for a tokenizer of {rows + 1} tokens"):
        spec_of(path, rows + 1)
