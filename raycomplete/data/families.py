"""Everything that differs between model families. Importable without torch.

Every other file reads these facts from here. Most need no entry: what a chat template can say is asked of the
template, and what config.json says is read from it. To add a family:

1. Add an entry to `FAMILIES`: its `model_type`s and its shape, where it is Llama-like. A template that sets thinking
   apart in a way of its own needs a `ThinkingFormat` in `thinking_format` as well.
2. Add a tiny configuration to tests/data/test_families.py, which compares the entry with what transformers builds.
   Where rebuilt logits differ there, the family scales, bounds or stores its output head in a way of its own: add the
   key of its config.json to `head_scale` or `head_softcap`, or the tensor's name to `HEADS`, `HEAD_BIAS` or
   `EMBEDDINGS`.
3. Start a run on a checkpoint of the family. The parity gate compares vLLM's hidden states and the head with
   transformers before the first score, and the sync check of on-policy runs compares the engines after each update of
   their weights: a name that vLLM does not load belongs into `is_optional_tensor` or `tied_head`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycomplete.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """The facts about one family that neither its config.json nor its tokenizer tells."""

    model_types: tuple[str, ...]
    tied: bool = False
    is_llama_like: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2


FAMILIES = (
    Family(("llama",)),
    Family(("mistral",)),
    Family(("qwen2",), qkv_bias=True),
    Family(("qwen3",), qk_norm=True),
    Family(("qwen3_moe",), is_llama_like=False),
    Family(("mixtral",), is_llama_like=False),
    Family(("smollm3",), tied=True),
    Family(("gemma",), tied=True),
    Family(("gemma2",), tied=True, norms_per_layer=4),
    Family(("gemma3", "gemma3_text"), tied=True, qk_norm=True, norms_per_layer=4),
    Family(("phi",), is_llama_like=False),
    Family(("phi3",), is_llama_like=False),
    Family(("cohere",), tied=True, is_llama_like=False),
    Family(("granite",), is_llama_like=False),
    Family(("gpt2",), tied=True, is_llama_like=False),
)
# Special tokens that end a text, whatever the family: a base model writes them, although its chat model may not.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")


@dataclass(frozen=True)
class ThinkingFormat:
    """Marks of templates between thinking and answer, as text; `raycomplete.runtime.types.ResponseFrame` in tokens."""

    opening: str
    closing: str
    skipping: str
    thought_mark: str
    answer_mark: str


_TAGS = ThinkingFormat("<think>\n", "\n</think>\n\n", "<think>\n\n</think>\n\n", "<think>", "</think>")
_FINAL = "<|channel|>final<|message|>"
_HARMONY = ThinkingFormat(
    "<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{_FINAL}", _FINAL, "<|channel|>", _FINAL
)


def thinking_format(template: str, turns: Sequence[str]) -> ThinkingFormat | None:
    """Returns how a chat template sets thinking apart; None where it has no place for it."""
    if _HARMONY.answer_mark in template:
        return _HARMONY
    return _TAGS if any(mark in turn for turn in turns for mark in (_TAGS.thought_mark, _TAGS.answer_mark)) else None


# Tensors of a checkpoint that may hold the output head, its bias, and the input embedding.
HEADS = ("lm_head.weight", "output.weight")
HEAD_BIAS = "lm_head.bias"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "embed_tokens.weight")

# Where multimodal checkpoints keep their language model, as earlier and later versions of transformers write them.
_LANGUAGE_PARTS = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)

# Keys of config.json in which two checkpoints of one architecture may differ: they change no weight.
NOT_ARCHITECTURE = frozenset(
    {
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
        # Inert where sliding windows are off, and different between Qwen 2.5 and its chat models.
        "max_window_layers",
        "use_mrope",
    }
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of a config.json that describes the language model; multimodal ones nest it."""
    nested: Mapping[str, Any] = config.get("text_config", config)
    return nested


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json describes a mixture of experts."""
    return any(config.get(key) for key in _EXPERTS)


def is_adaptable(module: str, *, mixture: bool) -> bool:
    """Tells whether a linear module may get a LoRA adapter."""
    return not mixture or "attn" in module


def attention(config: Mapping[str, Any]) -> str | None:
    """Names the implementation of attention that transformers must use, None for its own choice."""
    return "eager" if config.get("attn_logit_softcapping") else None


def language_tensor(name: str) -> str | None:
    """Returns the name of a multimodal checkpoint's tensor in its language model alone; None for the other parts."""
    found = (new + name.removeprefix(old) for old, new in _LANGUAGE_PARTS if name.startswith(old))
    return next(found, None)


def chat_messages(turns: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """Returns the messages of a conversation of user and model by turns, the user's first."""
    said = [{"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *said] if system else said


def is_tied(config: Mapping[str, Any], tensors: Collection[str] = ()) -> bool:
    """Tells whether the output head is the input embedding."""
    kind = config.get("model_type")
    by_family = any(family.tied for family in FAMILIES if kind in family.model_types)
    default = not any(name in tensors for name in HEADS) if tensors else by_family
    return bool(config.get("tie_word_embeddings", default))


def head_scale(config: Mapping[str, Any]) -> float:
    """Returns the factor on the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if "logits_scaling" in config:
        return 1.0 / float(config["logits_scaling"])
    return float(config.get("logit_scale") or 1.0)


def head_softcap(config: Mapping[str, Any]) -> float | None:
    """Returns the bound of the tanh on the scaled logits (Gemma 2), or None."""
    softcap: float | None = config.get("final_logit_softcapping")
    return softcap


def embedding_scale(embedding: Any, ids: Any) -> Any:
    """Measures the factor that an embedding module puts on its rows (Gemma: the square root of its width)."""
    return embedding(ids).norm() / embedding.weight[ids].norm()


def is_head_tensor(name: str) -> bool:
    """Tells whether a tensor of a checkpoint is the output head, which a tied model may leave out."""
    return name.endswith("lm_head.weight")


def is_optional_tensor(name: str) -> bool:
    """Tells whether a tensor of a checkpoint need not be among synced weights: old Llamas stored a computed buffer."""
    return name.endswith("rotary_emb.inv_freq")


def tied_head(model: Any) -> tuple[Any, Any] | None:
    """Returns the head and the embedding module of a vLLM model whose weights are tied; None for all others."""
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return (head, embedding) if tied and head is not None and embedding is not None else None


def llama_like(config: Mapping[str, Any], name: str) -> Family:
    """Returns the family of a plain decoder."""
    kind = str(config.get("model_type", ""))
    if is_mixture(config):
        raise CheckpointError(f"{name} is a mixture of experts, which `plan` has no formulas for.")
    known = {model_type: family for family in FAMILIES if family.is_llama_like for model_type in family.model_types}
    if kind in known:
        return known[kind]
    nearest = difflib.get_close_matches(kind, known, n=1)
    hint = f"The nearest known one is {nearest[0]}." if nearest else f"Known: {', '.join(known)}."
    raise CheckpointError(f"{name} has the architecture {kind or 'of no name'!r}, which `plan` does not know.", hint)
