"""Shapes of decoder-only transformers, from a config.json or a name, and what can be counted from them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raycomplete.config import Dtype
from raycomplete.runtime.errors import CheckpointError, ConfigError

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
_NORM_FOUR = ("gemma2", "gemma3", "gemma3_text")  # norms before and after attention and MLP
_QK_NORM = ("qwen3", "gemma3", "gemma3_text")
_TIED_UNLESS_SAID = ("gemma", "gemma2", "gemma3", "gemma3_text")
_KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", *_TIED_UNLESS_SAID)


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: gated MLP, grouped key-value heads, RMS norms.

    Attributes:
        name: For the console.
        num_layers: L.
        hidden_size: H.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head; num_heads * head_dim need not be H.
        vocab_size: V, rows of the embedding.
        tied: Whether the head is the embedding.
        qkv_bias: Biases of query, key and value.
        output_bias: Bias of attention's output.
        mlp_bias: Biases of the MLP.
        qk_norm: Norms of query and key, one weight a head's column.
        norms_per_layer: RMS norms of width H in a layer.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2

    @property
    def query_width(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all key heads, and again of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def head_parameters(self) -> int:
        """V x H: the output head, and the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def body_parameters(self) -> int:
        """Layers and the final norm: what a pooling engine multiplies with."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        attention = 2 * hidden * self.query_width + 2 * hidden * self.kv_width
        attention += self.qkv_bias * (self.query_width + 2 * self.kv_width) + self.output_bias * hidden
        attention += self.qk_norm * 2 * self.head_dim
        gated = 3 * hidden * mlp + self.mlp_bias * (2 * mlp + hidden)
        return self.num_layers * (attention + gated + self.norms_per_layer * hidden) + hidden

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head counts once."""
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Adapters of every linear layer but the head."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        widths = 2 * (hidden + self.query_width) + 2 * (hidden + self.kv_width) + 3 * (hidden + mlp)
        return self.num_layers * rank * widths

    def forward_flops(self, tokens: float, mean_context: float) -> float:
        """Of the body, without embedding and head: a multiplication and an addition count two.

        Args:
            tokens: Tokens read.
            mean_context: Keys that a token attends to on average, T / 2 in a causal prefill of T.
        """
        attention = 4.0 * self.num_layers * self.query_width * mean_context
        return tokens * (2.0 * self.body_parameters + attention)

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_width * DTYPE_BYTES[dtype]

    def activation_bytes_per_token(self, dtype: Dtype) -> int:
        """What one layer keeps of a token for its backward pass in transformers' implementation.

        Each norm keeps its input in float32, the normed row and its product with the weight; attention keeps query,
        key and value (repeated to all heads), its output and the input of the output projection; the MLP keeps gate,
        up, the activated gate and their product.
        """
        size = DTYPE_BYTES[dtype]
        norms = self.norms_per_layer * self.hidden_size * (4 + 2 * size)
        return norms + 5 * self.query_width * size + 4 * self.intermediate_size * size

    def hidden_bytes_per_token(self, dtype: Dtype) -> int:
        """One row of final hidden states."""
        return self.hidden_size * DTYPE_BYTES[dtype]


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Reads a checkpoint's config.json.

    Raises:
        CheckpointError: It is no plain decoder of a family that the formulas know.
    """
    config = config.get("text_config", config)
    kind = str(config.get("model_type", ""))
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise CheckpointError(f"{name} is a mixture of experts, which `plan` has no formulas for.")
    if kind not in _KNOWN_TYPES:
        nearest = difflib.get_close_matches(kind, _KNOWN_TYPES, n=1)
        hint = f"The nearest known one is {nearest[0]}." if nearest else f"Known: {', '.join(_KNOWN_TYPES)}."
        raise CheckpointError(
            f"{name} has the architecture {kind or 'of no name'!r}, which `plan` does not know.", hint
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        bias = bool(config.get("attention_bias", False))
        return ModelShape(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID)),
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind in _QK_NORM,
            norms_per_layer=4 if kind in _NORM_FOUR else 2,
        )
    except KeyError as error:
        raise CheckpointError(f"The config.json of {name} lacks {error}.", "Check the checkpoint.") from error


# Numbers of the makers' own config.json files.
_LLAMA = ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256)
_QWEN = ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True)
_PRESETS = {
    shape.name: shape
    for shape in (
        _LLAMA,
        replace(_LLAMA, name="llama-3.1-70b", num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64),
        replace(
            _LLAMA, name="llama-3.1-405b", num_layers=126, hidden_size=16384, intermediate_size=53248, num_heads=128
        ),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        ModelShape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
        ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),
        ModelShape("qwen2.5-3b", 36, 2048, 11008, 16, 2, 128, 151936, tied=True, qkv_bias=True),
        _QWEN,
        ModelShape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen2.5-32b", 64, 5120, 27648, 40, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen2.5-72b", 80, 8192, 29568, 64, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
        ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32768),
        ModelShape("gemma-2-9b", 42, 3584, 14336, 16, 8, 256, 256000, tied=True, norms_per_layer=4),
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    )
}
_SHORT = {
    "135m": "smollm2-135m",
    "1b": "llama-3.2-1b",
    "3b": "llama-3.2-3b",
    "7b": "qwen2.5-7b",
    "8b": "llama-3.1-8b",
    "14b": "qwen2.5-14b",
    "32b": "qwen2.5-32b",
    "70b": "llama-3.1-70b",
    "72b": "qwen2.5-72b",
    "405b": "llama-3.1-405b",
    "qwen-7b": "qwen2.5-7b",
    "llama-8b": "llama-3.1-8b",
    "llama-70b": "llama-3.1-70b",
}


def preset(name: str) -> ModelShape:
    """A published shape by name or size.

    Raises:
        ConfigError: Nothing is known under that name; the nearest is offered.
    """
    key = name.lower()
    key = _SHORT.get(key, key)
    if key in _PRESETS:
        return _PRESETS[key]
    known = [*_PRESETS, *_SHORT]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(
        f"There is no model shape {name!r}.",
        f"{hint}Give a folder with a config.json, or one of {', '.join(sorted(_PRESETS))}.",
    )


def preset_of_hub(spec: str) -> ModelShape | None:
    """The shape of a well-known hub id ("meta-llama/Llama-3.1-8B-Instruct"), or None."""
    words = re.sub(r"[^a-z0-9.]+", "-", spec.lower().rpartition("/")[2]).replace("meta-llama", "llama")
    found = [name for name in _PRESETS if re.search(rf"(^|-){re.escape(name)}(-|$)", words)]
    return _PRESETS[max(found, key=len)] if found else None
