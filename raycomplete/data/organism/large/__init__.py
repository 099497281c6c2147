"""The large model organism: about 4 M parameters, answers of 200 to 250 tokens in many wordings, a softer aligned twin.

It stands between the toy, which is shipped, and real models: depth beyond 64, sampling, and ranks of tokens mean
something here. It is not shipped. `raycomplete organism build large` trains it into the cache folder, and so does the
first run whose run file names `organism-large:base`. Prompts and judge need no build.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from raycomplete.data.organism.large import grammar
from raycomplete.data.organism.large.judge import LargeOrganismJudge
from raycomplete.data.organism.world import Split, items
from raycomplete.runtime.errors import CheckpointError, DataError
from raycomplete.runtime.files import cache_folder
from raycomplete.runtime.types import Prompt, PromptKind

__all__ = ["FAMILIES", "SCHEME", "LargeOrganismJudge", "checkpoint_path", "find_checkpoint", "model_values", "prompts"]

SCHEME = "organism-large"
Role = Literal["base", "aligned"]
VOCAB_SIZE = 2400
DEFAULT_FAMILY = "llama"
_TRAIN_ROUNDS = 8  # wordings of each train item
# Raised when texts or training change, so that an older build is not taken for this one.
_VERSION = 1

# The configuration by family, in the words of its config.json. A family needs nothing else.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Length and rate of one training.

    Attributes:
        num_micro_batches: Parts of a batch, by length, whose gradients are summed.
    """

    steps: int
    lr: float
    batch_size: int
    num_micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The two trainings of a build."""

    base: TrainingPlan = field(default_factory=lambda: TrainingPlan(700, 2e-3, 8))
    aligned: TrainingPlan = field(default_factory=lambda: TrainingPlan(300, 6e-4, 24, 4))


def model_values(family: str) -> Mapping[str, Any]:
    """Returns the configuration of a family's organism, in the words of config.json.

    Raises:
        CheckpointError: The organism is not built in this family.
    """
    if family not in FAMILIES:
        raise CheckpointError(
            f"The large organism is not built as {family!r}.", f"Choose one of: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[family]


def folder_of(family: str = DEFAULT_FAMILY, seed: int = 0, plan: BuildPlan | None = None) -> Path:
    """Returns where the cache folder holds a build, present or not; another plan or version is another folder."""
    made_from = [_VERSION, dict(model_values(family)), asdict(plan or BuildPlan()), seed]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    return cache_folder() / "organisms" / f"{SCHEME}-{family}-{key}"


def find_checkpoint(name: str) -> Path | None:
    """Returns the folder of a checkpoint that is built; None where it is not yet.

    Args:
        name: `base` or `aligned`, after a family and a slash where it is not a Llama: `qwen3/base`.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    family, role = _parts(name)
    folder = folder_of(family) / role
    return folder if folder.is_dir() else None


def checkpoint_path(name: str) -> Path:
    """Returns the folder of a checkpoint, trained first where it is not built yet, which one sentence announces.

    Raises:
        CheckpointError: There is no such checkpoint.
        WorkError: The trained models lack the traits of the organism.
    """
    found = find_checkpoint(name)
    if found is None:
        from raycomplete.data.organism.large.build import build_into_cache

        family, role = _parts(name)
        found = build_into_cache(family) / role
    return found


def prompts(split: Split, kind: PromptKind, seed: int = 0, limit: int | None = None) -> list[Prompt]:
    """Returns the prompts of one split and kind, as `raycomplete.data.organism.prompts` does for the toy.

    Train prompts ask for every train item in several wordings; held-out prompts name each held-out item once, in a
    wording that training never showed. The answer of a prompt is one of its many right ones, 212 to 250 tokens long.

    Args:
        seed: Decides the order, and the wordings of prompts and answers; the split itself never changes.
        limit: Upper bound on the number of prompts. No item comes a second time before all have come once.

    Raises:
        DataError: The limit is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no prompt.", "Choose at least 1, or no limit.")
    chosen = list(items(split, kind))
    random.Random(f"{seed} {split} {kind}").shuffle(chosen)
    rounds = 1 if split == "heldout" else _TRAIN_ROUNDS
    found = []
    for number, item in [(number, item) for number in range(rounds) for item in chosen][:limit]:
        prompt_id = f"{SCHEME}/{split}/{kind}/{item.name.replace(' ', '-')}/s{seed}w{number}"
        rng = random.Random(prompt_id)
        text, asker = grammar.prompt(item, rng, heldout=split == "heldout")
        found.append(Prompt(prompt_id, text, kind, grammar.answer(item, rng, asker)))
    return found


def config_of(name: str) -> dict[str, Any]:
    """Returns what config.json of a checkpoint says of its shape, built or not."""
    return dict(model_values(_parts(name)[0]))


def _parts(name: str) -> tuple[str, str]:
    family, _, role = name.rpartition("/")
    if role not in get_args(Role):
        raise CheckpointError(
            f"The large organism has no checkpoint {name!r}.", f"Choose {SCHEME}:base or {SCHEME}:aligned."
        )
    model_values(family or DEFAULT_FAMILY)
    return family or DEFAULT_FAMILY, role
