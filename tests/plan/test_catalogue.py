"""Parameters counted by formula are those of transformers' own models; devices are found by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raycomplete.plan.catalogue import ModelShape, find_hardware, preset, preset_of_hub, shape_from_config
from raycomplete.runtime.errors import CheckpointError, ConfigError

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": False, "head_dim": 12}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
]


def meta_model(kind: str, values: dict[str, Any]) -> Any:
    """Built without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))


@pytest.mark.parametrize(("kind", "changes"), FAMILIES)
def test_every_family_has_as_many_parameters_as_transformers_makes(kind: str, changes: dict[str, Any]) -> None:
    model = meta_model(kind, TINY | changes)
    shape = shape_from_config(model.config.to_dict(), "tiny")
    assert shape.num_parameters == model.num_parameters()
    head = model.get_output_embeddings().weight
    assert shape.head_parameters == head.numel()
    assert shape.tied == (head is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-0.5b", 494_032_768),
        ("mistral-7b", 7_248_023_552),
        ("gemma-2-9b", 9_241_705_984),
        ("135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert preset(name).num_parameters == published


def test_lora_adds_what_peft_adds() -> None:
    from peft import LoraConfig, get_peft_model

    model = meta_model("llama", TINY)
    shape = shape_from_config(model.config.to_dict(), "tiny")
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(4) == trained


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("somebody/their-own-model", None),
    ],
)
def test_well_known_hub_ids_have_a_shape(spec: str, expected: str | None) -> None:
    found: ModelShape | None = preset_of_hub(spec)
    assert (found and found.name) == expected


@pytest.mark.parametrize(
    ("find", "argument", "words"),
    [
        (shape_from_config, {"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        (shape_from_config, {"model_type": "lama"}, "llama"),
        (shape_from_config, {"model_type": "llama", "num_attention_heads": 4}, "hidden_size"),
        (preset, "llama-3.1-7b", "llama-3.1-[78]0?b"),
        (find_hardware, "h20", "h200"),
    ],
)
def test_what_is_not_known_is_refused_with_the_nearest(find: Any, argument: Any, words: str) -> None:
    arguments = (argument, "it") if isinstance(argument, dict) else (argument,)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        find(*arguments)


def test_formulas_load_neither_torch_nor_ray() -> None:
    code = "import sys, raycomplete.plan.estimate; print({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
