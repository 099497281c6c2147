"""Where the organism's checkpoints are, as shipped inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from raycomplete.runtime.errors import CheckpointError

OrganismRole = Literal["base", "aligned"]

# What transformers and vLLM both read from a checkpoint folder.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def checkpoint_path(role: OrganismRole) -> Path:
    """Folder of a shipped checkpoint.

    Args:
        role: "base" or "aligned".

    Raises:
        CheckpointError: There is no such checkpoint, or files of it are missing.
    """
    if role not in get_args(OrganismRole):
        raise CheckpointError(f"The organism has no checkpoint {role!r}.", "Choose `base` or `aligned`.")
    folder = resources.files("raycomplete.data.organism") / "checkpoints" / role
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if not isinstance(folder, Path) or missing:
        raise CheckpointError(
            f"The organism's {role} checkpoint is incomplete: {folder} lacks {', '.join(missing) or 'a real folder'}.",
            "Reinstall raycomplete unpacked, or train the organism with `raycomplete organism build FOLDER`.",
        )
    return folder
