"""The large model organism: about 4 M parameters, answers of 200 to 250 tokens in many wordings, a softer aligned twin.

It stands between the toy, which is shipped, and real models: depth beyond 64, sampling, and ranks of tokens mean
something here. It is not shipped. `raycomplete organism build large` trains it into the cache folder, and so does the
first run whose run file names `organism-large:base`. Prompts and judge need no build.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from raycomplete.data.organism.families import BuiltOrganism
from raycomplete.data.organism.large import grammar
from raycomplete.data.organism.large.judge import LargeOrganismJudge
from raycomplete.data.organism.world import Split, items
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind

if TYPE_CHECKING:
    from raycomplete.data.organism.build import Blueprint

__all__ = ["CONFIG", "SCHEME", "LargeOrganismJudge", "built", "prompts"]

SCHEME = "organism-large"
VOCAB_SIZE = 2400
_TRAIN_ROUNDS = 8  # wordings of each train item
# Raised when texts or training change, so that an older build is not taken for this one.
_VERSION = 1

# The configuration in the words of config.json.
CONFIG: dict[str, Any] = {
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
}


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Length and rate of one training."""

    steps: int
    lr: float
    batch_size: int
    num_micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The two trainings of a build."""

    base: TrainingPlan = field(default_factory=lambda: TrainingPlan(700, 2e-3, 8))
    aligned: TrainingPlan = field(default_factory=lambda: TrainingPlan(300, 6e-4, 24, 4))


def built(seed: int = 0, plan: BuildPlan | None = None) -> BuiltOrganism:
    """Returns the large organism, which is trained where its checkpoints are first asked for."""
    chosen = plan or BuildPlan()

    def load() -> Blueprint:
        from raycomplete.data.organism.large.training import blueprint

        return blueprint(seed, chosen)

    return BuiltOrganism(
        scheme=SCHEME,
        prefix=f"{SCHEME}-llama",
        config=CONFIG,
        settings=(_VERSION, CONFIG, asdict(chosen), seed),
        duration="10 to 20 minutes",
        load=load,
    )


def prompts(split: Split, kind: PromptKind, seed: int = 0, limit: int | None = None) -> list[Prompt]:
    """Returns the prompts of one split and kind, as `raycomplete.data.organism.prompts` does for the toy."""
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
