"""Keys of trials: responses of earlier evaluations are found by them, so a setting that goes must not change them."""

from __future__ import annotations

from typing import Any

import pytest

from raycomplete.attacks.registry import ATTACKS
from raycomplete.attacks.target import Target
from raycomplete.evaluation.runner import EvaluationSets
from raycomplete.runtime.files import content_hash
from tests.attacks.scripted import made

KEYS = {
    "adaptive": "293682da",
    "base_guided_decoding": "f1df0f8b",
    "best_of_n": "755bc1ed",
    "crescendo": "f0361fac",
    "decoding": "250ded8d",
    "finetune": "5ca7cc42",
    "gcg": "6631e85e",
    "pair": "910455a9",
    "prefill": "a88a4d9a",
    "prefill_mid_answer": "11b2eaf5",
    "random_search": "bb69434c",
    "rank_assisted_prefill": "05cb5128",
    "refuse_then_turn": "ced79f82",
    "soft_prompt": "8a27cef3",
    "templates": "1732e683",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "prefill": {"depths": [0, 4]},
    "prefill_mid_answer": {"starts": [4], "windows": [2]},
}


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"static_strings", "prefill_thinking"}))
def test_keys_are_those_of_earlier_versions(name: str, target: Target, sets: EvaluationSets) -> None:
    trials = made({"name": name, **SETTINGS.get(name, {})}).plan(target, sets.harmful)
    assert content_hash([trial.key("m") for trial in trials])[:8] == KEYS[name]
