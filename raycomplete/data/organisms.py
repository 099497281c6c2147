"""The model organisms by the name under which run files know them. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from raycomplete.data import organism
from raycomplete.data.organism import OrganismRole, families, large, world
from raycomplete.data.organism.families import BuiltOrganism
from raycomplete.data.organism.large.world import HELPFUL_SYSTEM
from raycomplete.runtime.types import Judge, Prompt


@dataclass(frozen=True, slots=True)
class Organism:
    """A model organism: fictional prompts, the judge that knows their answers, and two checkpoints."""

    prompts: Callable[..., list[Prompt]]
    judge: Callable[[], Judge]
    helpful_system: str
    checkpoint: Callable[[str], Path]
    find_checkpoint: Callable[[str], Path | None]
    config: Mapping[str, Any]


def _shipped(role: str) -> Path:
    return organism.checkpoint_path(cast(OrganismRole, role))  # which refuses any other name


def _toy(built: BuiltOrganism) -> Organism:
    """Returns the toy's world with checkpoints of another family."""
    world_of_it = (organism.prompts, organism.OrganismJudge, world.HELPFUL_SYSTEM)
    return Organism(*world_of_it, built.checkpoint, built.find, built.config)


_LARGE = large.built()
# By the name that run files know.
ORGANISMS = {
    "organism": replace(_toy(families.built("llama")), checkpoint=_shipped, find_checkpoint=_shipped),
    large.SCHEME: Organism(
        large.prompts, large.LargeOrganismJudge, HELPFUL_SYSTEM, _LARGE.checkpoint, _LARGE.find, _LARGE.config
    ),
    **{found.scheme: _toy(found) for found in map(families.built, families.FAMILIES)},
}
