"""The model organisms by the name under which run files know them. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from raycomplete.data import organism
from raycomplete.data.organism import OrganismRole, large, world
from raycomplete.data.organism.large.world import HELPFUL_SYSTEM
from raycomplete.runtime.types import Judge, Prompt


@dataclass(frozen=True, slots=True)
class Organism:
    """A model organism: fictional prompts, the judge that knows their answers, and two checkpoints.

    Attributes:
        prompts: Prompts of a split ("train", "heldout") and kind, by seed and up to a limit.
        helpful_system: System prompt that tells the clerk to help.
        checkpoint: Folder of `base` or `aligned`, built first where it is not there.
        find_checkpoint: The same, None in place of a build.
    """

    prompts: Callable[..., list[Prompt]]
    judge: Callable[[], Judge]
    helpful_system: str
    checkpoint: Callable[[str], Path]
    find_checkpoint: Callable[[str], Path | None]


def _shipped(role: str) -> Path:
    return organism.checkpoint_path(cast(OrganismRole, role))  # which refuses any other name


ORGANISMS = {
    "organism": Organism(organism.prompts, organism.OrganismJudge, world.HELPFUL_SYSTEM, _shipped, _shipped),
    large.SCHEME: Organism(
        large.prompts, large.LargeOrganismJudge, HELPFUL_SYSTEM, large.checkpoint_path, large.find_checkpoint
    ),
}
