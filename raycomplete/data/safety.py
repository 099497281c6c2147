"""What a checkpoint folder must not hold: whatever makes a loader run code, or read weights from somewhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def check_safe(folder: Path, *, role: str) -> None:
    """Refuses a folder that would load other things than the safetensors in it. Code of its own is refused elsewhere.

    Args:
        folder: Checkpoint folder.
        role: base, aligned or student; named in messages.

    Raises:
        CheckpointError: It names an adapter, code from the hub, or weights outside of it.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"models.{role}: {folder} holds an adapter (adapter_config.json), which transformers would put over the "
            "weights, vLLM would not, and which may be a pickle.",
            "Merge it into its base model first, or remove it.",
        )
    for key, value in _settings(_read(folder / "config.json", role)):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"models.{role}: config.json of {folder} asks for code from the hub ({key}: {value!r}).",
                f"Remove {key} from it.",
            )
    weight_files(folder, role=role)


def weight_files(folder: Path, *, role: str = "") -> dict[str, str]:
    """File of every tensor as the index of a sharded checkpoint has it, by tensor name; empty where there is none.

    Raises:
        CheckpointError: The index cannot be read, or names a file that is no safetensors file of this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    mapping = _read(index, role).get("weight_map")
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


def _settings(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration, those of its parts (text_config and the like) too."""
    for key, value in tree.items():
        yield key, value
        if isinstance(value, dict):
            yield from ((f"{key}", item) for item in value.values() if key.endswith("_implementation"))
            yield from _settings(value)


def _read(file: Path, role: str) -> dict[str, Any]:
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
