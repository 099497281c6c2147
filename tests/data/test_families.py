"""The table of families against what transformers builds: heads, tying and shapes of tiny models of each."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raycomplete.data.families import FAMILIES, Family, embedding_scale, is_tied, llama_like, text_config
from raycomplete.runtime.errors import CheckpointError
from tests.data.test_heads import PADDED, assert_rebuilds, spec_of

COMMON: dict[str, Any] = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,  # large, so that a forgotten scale or cap moves probabilities by whole nats
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**COMMON, "head_dim": 16}
# A tiny model of every family, and what its head must be read as.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (COMMON, {"scale": 1.0, "softcap": None, "bias_key": None}),
    "mistral": (COMMON, {"weight_key": "lm_head.weight"}),
    "qwen2": (COMMON, {"weight_key": "lm_head.weight"}),
    "qwen3": ({**COMMON, "head_dim": 16}, {"weight_key": "lm_head.weight"}),
    "qwen3_moe": (
        {**COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"weight_key": "lm_head.weight"},
    ),
    "mixtral": ({**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}, {"weight_key": "lm_head.weight"}),
    "smollm3": (COMMON, {"weight_key": "model.embed_tokens.weight"}),
    "gemma": (GEMMA, {"weight_key": "model.embed_tokens.weight"}),
    "gemma2": ({**GEMMA, "final_logit_softcapping": 3.0}, {"softcap": 3.0, "scale": 1.0}),
    "gemma3_text": (GEMMA, {"softcap": None}),
    "phi": (COMMON, {"bias_key": "lm_head.bias"}),
    "phi3": (COMMON, {"weight_key": "lm_head.weight"}),
    "cohere": ({**COMMON, "logit_scale": 0.25}, {"scale": 0.25}),
    "granite": ({**COMMON, "logits_scaling": 8.0}, {"scale": 0.125}),
    "gpt2": (
        {"vocab_size": PADDED, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5},
        {"weight_key": "transformer.wte.weight"},
    ),
}
KINDS = [(kind, family) for family in FAMILIES for kind in family.model_types if kind != "gemma3"]


def tiny(kind: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY[kind][0]))
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize(("kind", "family"), KINDS, ids=[kind for kind, _ in KINDS])
def test_a_head_is_read_as_transformers_builds_it(kind: str, family: Family, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    spec = spec_of(tmp_path)
    expected = TINY[kind][1] | {"tied": family.tied}
    assert {key: asdict(spec)[key] for key in expected} == expected
    assert_rebuilds(tmp_path, spec)


def test_a_scale_that_is_not_said_is_the_familys_default(tmp_path: Path) -> None:
    config = AutoConfig.for_model("cohere", **COMMON)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert spec_of(tmp_path).scale == 0.0625
    assert_rebuilds(tmp_path, spec_of(tmp_path))


@pytest.mark.parametrize(("kind", "family"), KINDS, ids=[kind for kind, _ in KINDS])
def test_an_entry_is_what_transformers_builds(kind: str, family: Family) -> None:
    assert AutoConfig.for_model(kind).tie_word_embeddings is family.tied
    assert is_tied({"model_type": kind}) is family.tied
    if family.is_llama_like:
        names = [name for name, _ in tiny(kind).named_parameters() if ".layers.0." in name]
        assert family.qkv_bias == any(name.endswith("q_proj.bias") for name in names)
        assert family.qk_norm == any(name.endswith("q_norm.weight") for name in names)
        assert family.norms_per_layer == sum(bool(re.search(r"layers\.0\.\w*norm\.weight$", name)) for name in names)
        assert llama_like({"model_type": kind}, "it") is family


def test_a_multimodal_model_is_read_by_its_text_part() -> None:
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert llama_like(text_config(nested), "it").qk_norm
    assert is_tied(text_config(nested))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "it is a mixture of experts"),
        ({"model_type": "lama"}, "'lama', which `plan` does not know. The nearest known one is llama"),
        ({"model_type": "gpt2"}, "'gpt2', which `plan` does not know"),
        ({}, "of no name.*Known: llama, mistral"),
    ],
)
def test_architectures_without_formulas_are_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        llama_like(config, "it")


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gemma3_text"])
def test_scaled_rows_of_the_embedding_are_what_the_model_reads(kind: str) -> None:
    model, ids_T = tiny(kind).eval(), torch.tensor([3, 4, 5])
    embedding = model.get_input_embeddings()
    rows_TH = embedding_scale(embedding, ids_T) * embedding.weight[ids_T]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=rows_TH[None]).logits, model(ids_T[None]).logits)
