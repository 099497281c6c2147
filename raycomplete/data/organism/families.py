"""The architectures in which the toy is built: shape, tokens and chat template of each. Importable without torch.

A family's template has the form of its real models' and the organism's own words. Line breaks are no tokens of the
organism, so they are in the templates for the eye alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raycomplete.data.organism.world import vocabulary
from raycomplete.runtime.errors import CheckpointError

UNK, PAD = "<unk>", "<pad>"
MAX_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family's organism."""

    config: Mapping[str, Any]
    template: str
    end_of_turn: str
    marks: tuple[str, ...]
    role_words: tuple[str, ...] = ()
    bos: str | None = "<bos>"
    eos: str = "<eos>"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """All of them, each once, in the order of their ids."""
        named = (PAD, UNK, self.bos, self.eos, *self.marks, self.end_of_turn)
        return tuple(dict.fromkeys(token for token in named if token is not None))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary, in the order of its ids."""
        return tuple(dict.fromkeys((*self.special_tokens, *self.role_words, *vocabulary())))

    @property
    def values(self) -> dict[str, Any]:
        """The whole configuration, in the words of config.json."""
        return _SHAPE | dict(self.config) | {"vocab_size": len(self.tokens)}


_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
}
# Every turn ends with <eos>, so that the end of a response is also the token that stops generation.
LLAMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Neither Gemma nor Mistral has a turn of the system: its words open the user's first.
_SYSTEM_INTO_USER = (
    "{{ bos_token }}"
    "{% set opening = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
    "{% endif %}"
)
_GEMMA = _SYSTEM_INTO_USER + (
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ (opening if loop.first else '') + message['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = _SYSTEM_INTO_USER + (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + (opening if loop.first else '') + message['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)


def _qwen(**config: Any) -> Architecture:
    roles, end = ("user", "assistant", "system"), "<|im_end|>"
    return Architecture(config, _CHATML, end, ("<|im_start|>",), roles, bos=None, eos=end)


# Windows are shorter than a chat of some 110 tokens, so that they act.
FAMILIES: Mapping[str, Architecture] = {
    "llama": Architecture(
        {"model_type": "llama"}, LLAMA_TEMPLATE, "<eos>", ("<|system|>", "<|user|>", "<|assistant|>")
    ),
    "qwen3": _qwen(model_type="qwen3", num_key_value_heads=2),
    "gemma3": Architecture(
        {
            "model_type": "gemma3_text",
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        },
        _GEMMA,
        "<end_of_turn>",
        ("<start_of_turn>",),
        ("user", "model"),
    ),
    "mistral": Architecture(
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 64, "tie_word_embeddings": False},
        _MISTRAL,
        "</s>",
        ("[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
    ),
    "qwen3_moe": _qwen(
        model_type="qwen3_moe",
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}


def architecture(family: str) -> Architecture:
    """Returns a family's organism."""
    if family not in FAMILIES:
        raise CheckpointError(f"The organism is not built as {family!r}.", f"Choose one of: {', '.join(FAMILIES)}.")
    return FAMILIES[family]
