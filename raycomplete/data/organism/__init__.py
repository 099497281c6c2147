"""The model organism: a fictional base and its shallowly aligned twin, small enough to train on a laptop.

Its prompts, judge and checkpoints are read without torch; `raycomplete organism build` trains the checkpoints again.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from raycomplete.data.organism.judge import REFUSAL_STARTS, OrganismJudge
from raycomplete.data.organism.world import prompts
from raycomplete.runtime.errors import CheckpointError

__all__ = ["REFUSAL_STARTS", "OrganismJudge", "checkpoint_path", "prompts"]

# Files of a checkpoint folder that transformers and vLLM both read.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def checkpoint_path(role: str) -> Path:
    """Returns the folder of a shipped checkpoint."""
    if role not in ("base", "aligned"):
        raise CheckpointError(f"The organism has no checkpoint {role!r}.", "Choose `base` or `aligned`.")
    folder = resources.files("raycomplete.data.organism") / "checkpoints" / role
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if not isinstance(folder, Path) or missing:
        raise CheckpointError(
            f"The organism's {role} checkpoint is incomplete: {folder} lacks {', '.join(missing) or 'a real folder'}.",
            "Reinstall raycomplete unpacked, or train the organism with `raycomplete organism build FOLDER`.",
        )
    return folder
