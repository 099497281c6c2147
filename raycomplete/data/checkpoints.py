"""Checks, loads and writes checkpoints, which are local folders of safetensors.

Weights are read as safetensors only: a pickle can run code when
it is loaded. Writing goes through a sibling temporary folder and a rename, so a killed process never leaves half a
checkpoint under the final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from raycomplete.config import Dtype
from raycomplete.data.chat import ChatCodec
from raycomplete.data.families import (
    NOT_ARCHITECTURE,
    attention,
    is_adaptable,
    is_head_tensor,
    is_mixture,
    is_optional_tensor,
    is_tied,
    text_config,
)
from raycomplete.runtime.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
_FINGERPRINT_WHOLE_BYTES = 2 * 2**30
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_BYTES = 65536


def load_model(path: Path, dtype: Dtype, *, trust_remote_code: bool = False) -> Any:
    """Loads a causal language model from safetensors, in evaluation mode, on the CPU."""
    options = {"use_safetensors": True, "attn_implementation": attention(_raw_config(path))}
    model = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=TORCH_DTYPES[dtype], trust_remote_code=trust_remote_code, **options
    )
    return model.eval()


def load_token_classifier(path: Path, dtype: Dtype) -> Any:
    """Loads a token classifier with two labels from safetensors, in evaluation mode, on the CPU; runs no code of it."""
    options = {"use_safetensors": True, "attn_implementation": attention(_raw_config(path))}
    model = AutoModelForTokenClassification.from_pretrained(str(path), dtype=TORCH_DTYPES[dtype], **options)
    return model.eval()


def check_token_classifier(path: Path) -> None:
    """Checks that a checkpoint is a token classifier with two labels."""
    config = _read_json(path / "config.json", "")
    names = [str(name) for name in config.get("architectures") or []]
    labels = len(config.get("id2label") or {"0": "", "1": ""})  # two are the default, which files leave out
    if not any(name.endswith("ForTokenClassification") for name in names) or labels != 2:
        raise CheckpointError(
            f"The helper {path} is no token classifier with two labels ({', '.join(names) or 'unnamed'}, {labels}).",
            "Train one by AutoModelForTokenClassification, label 1 where the answer is still harmful at that token.",
        )


def save_checkpoint(folder: Path, model: Any, codec: ChatCodec, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a Hugging Face checkpoint that transformers and vLLM load."""

    def write(temporary: Path) -> None:
        codec.save(temporary)
        model.generation_config = GenerationConfig(eos_token_id=sorted(codec.eos_ids), pad_token_id=codec.eos_id)
        model.save_pretrained(str(temporary), state_dict=state, safe_serialization=True)

    write_folder_atomically(folder, write)


def with_file_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights by their names in the files of the checkpoint: transformers fuses experts under other names."""
    found = revert_weight_conversion(model, dict(state))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def adapted_modules(model: Any) -> list[str]:
    """Names the modules that get LoRA adapters: all linear ones but the output head, as `is_adaptable` allows."""
    mixture, head = is_mixture(model.config.get_text_config().to_dict()), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and is_adaptable(name, mixture=mixture)
    ]


def check_trainable(path: Path, *, synced: bool = False, lora: bool = False, trust_remote_code: bool = False) -> None:
    """Checks that a checkpoint can be trained, and its weights or adapters be sent to engines, without loading it."""
    raw = _raw_config(path)
    if quantised := raw.get("quantization_config"):
        raise CheckpointError(
            f"The weights of {path} are quantised ({quantised.get('quant_method', 'unknown')}), and only plain ones "
            "can be trained.",
            "Use the bfloat16 checkpoint, or load it by transformers with dequantize=True and save it again.",
        )
    if not synced:
        return
    config = read_config(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    files = tensor_files(path)
    if lora and any(isinstance(module, Conv1D) for module in model.modules()):
        raise CheckpointError(
            f"The student {path} has weights of shape [in, out], as GPT-2 does, into which engines merge no adapter.",
            "Set train.lora_rank to 0, or rollout.on_policy to false.",
        )
    if lora:
        missing = {f"{name}.weight" for name in adapted_modules(model)} - files.keys()
    else:
        tied = is_tied(raw, files)
        needed = {name for name in files if not is_optional_tensor(name) and not (tied and is_head_tensor(name))}
        missing = needed - with_file_names(model, dict(model.named_parameters())).keys()
    if missing:
        raise CheckpointError(
            f"The student {path} cannot be sent to the rollout engines: {len(missing)} tensors are named otherwise in "
            f"its files than transformers saves them ({', '.join(sorted(missing)[:3])}).",
            "Load it by transformers and save it again, or set rollout.on_policy to false.",
        )


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` and renames the result to `folder`, replacing what stood there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        write(temporary)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
            try:
                temporary.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint(path: Path) -> str:
    """Returns a hash that names the weights of a checkpoint: its configuration and its safetensors files."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= _FINGERPRINT_WHOLE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for block in range(_FINGERPRINT_BLOCKS):
                stream.seek(block * max(size - _FINGERPRINT_BLOCK_BYTES, 0) // (_FINGERPRINT_BLOCKS - 1))
                digest.update(stream.read(_FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def architecture(path: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns the parts of config.json that decide whether two checkpoints fit the same engine."""
    # Through transformers, so that files of other versions compare equal (rope_theta and rope_parameters).
    config = read_config(path, trust_remote_code=trust_remote_code).to_dict()
    return {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE and not key.startswith("_")}


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Reads a configuration as transformers does."""
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            f"The configuration of {path} cannot be read ({' '.join(str(error).split())}).",
            "It needs a config.json of an architecture that transformers knows.",
        ) from error


def check_same_vocabulary(
    paths: dict[str, Path], *, trust_remote_code: bool = False, template_arguments: Mapping[str, Any] | None = None
) -> ChatCodec:
    """Loads every role's tokenizer and checks that aligned has its tokens: distributions are compared by token."""
    arguments = {"aligned": template_arguments}
    codecs = {
        role: ChatCodec(path, trust_remote_code=trust_remote_code, arguments=arguments.get(role))
        for role, path in paths.items()
    }
    for role, codec in codecs.items():
        if (token := codec.not_in(codecs["aligned"])) is not None:
            raise CheckpointError(
                f"models.{role} ({paths[role]}) and models.aligned ({paths['aligned']}) have different tokenizers: "
                f"{token!r} is not the same token in both.",
                "The method compares distributions token by token: use two checkpoints of one family.",
            )
    return codecs["aligned"]


def tensor_files(path: Path) -> dict[str, str]:
    """Returns the file of every tensor of a checkpoint, by tensor name."""
    found = weight_files(path)
    if found:
        return found
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            found |= {name: str(file) for name in tensors.keys()}  # noqa: SIM118 - safe_open is no mapping
    if not found:
        raise CheckpointError(f"The checkpoint {path} has no safetensors weights.")
    return found


def check_safe(folder: Path, *, role: str) -> None:
    """Refuses a checkpoint folder that makes loaders run code from the hub or read weights from somewhere else."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"models.{role}: {folder} holds an adapter (adapter_config.json), which transformers would put over the "
            "weights, vLLM would not, and which may be a pickle.",
            "Merge it into its base model first, or remove it.",
        )
    for key, value in _settings(_read_json(folder / "config.json", role)):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"models.{role}: config.json of {folder} asks for code from the hub ({key}: {value!r}).",
                f"Remove {key} from it.",
            )
    weight_files(folder, role=role)


def weight_files(folder: Path, *, role: str = "") -> dict[str, str]:
    """Returns the file of every tensor by the index of a sharded checkpoint; empty where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    mapping = _read_json(index, role).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{_who(role)}{index} has no weight_map.", "Download or save the checkpoint again.")
    for file in set(map(str, mapping.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{_who(role)}{index} names {file!r}, which is no safetensors file of this folder.",
                "An index that points elsewhere is no honest checkpoint: do not use it.",
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{_who(role)}{folder} lacks the weights {file}, which its index names.", "Download it again."
            )
    return {str(name): str(folder / str(file)) for name, file in mapping.items()}


def _raw_config(path: Path) -> Mapping[str, Any]:
    """Returns the part of config.json that describes the language model."""
    return text_config(_read_json(path / "config.json", ""))


def _settings(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walks keys and values of a configuration and of its parts (text_config and the like)."""
    for key, value in tree.items():
        yield key, value
        if isinstance(value, dict):
            yield from ((f"{key}", item) for item in value.values() if key.endswith("_implementation"))
            yield from _settings(value)


def _read_json(file: Path, role: str) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{_who(role)}{file} cannot be read ({reason}).", "Download it again.") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{_who(role)}{file} holds no mapping.", "Download it again.")
    return tree


def _who(role: str) -> str:
    return f"models.{role}: " if role else ""
