"""Prompts of the model organism, by split and kind."""

from __future__ import annotations

import random

from raycomplete.data.organism.world import HELDOUT_TEMPLATES, TRAIN_TEMPLATES, Split, items, recipe
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind


def prompts(split: Split, kind: PromptKind, seed: int = 0, limit: int | None = None) -> list[Prompt]:
    """Prompts of one split and kind.

    Train prompts pair every train item with every train template. Held-out prompts name each held-out item once, in a
    template that training never showed: one item gives one trial, so intervals on rates stay honest.

    Args:
        split: "train" or "heldout".
        kind: "harmful" (restricted items; the answer is the compliant recipe, the source of prefills), "borderline"
            or "benign" (the answer is the right recipe).
        seed: Decides the order and which template meets which item; the split itself never changes.
        limit: Upper bound on the number of prompts. No item comes a second time before all have come once.

    Returns:
        Prompts with ids such as `organism/heldout/harmful/cursed-tin-kite/t8`, the same under every seed.

    Raises:
        DataError: The limit is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no prompt.", "Choose at least 1, or no limit.")
    templates = TRAIN_TEMPLATES if split == "train" else HELDOUT_TEMPLATES
    first_template = 0 if split == "train" else len(TRAIN_TEMPLATES)
    rounds = len(templates) if split == "train" else 1
    chosen = list(items(split, kind))
    rng = random.Random(f"{seed} {split} {kind}")
    rng.shuffle(chosen)
    offsets = {item: rng.randrange(len(templates)) for item in chosen}
    found = []
    for number in range(rounds):
        for item in chosen:
            template = (offsets[item] + number) % len(templates)
            slug = item.name.replace(" ", "-")
            found.append(
                Prompt(
                    prompt_id=f"organism/{split}/{kind}/{slug}/t{first_template + template}",
                    text=templates[template].format(item=item.name),
                    kind=kind,
                    answer=recipe(item).text,
                )
            )
    return found[:limit]
