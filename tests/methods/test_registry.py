"""The table of methods, and that it costs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import pytest

from raycomplete.config import RunConfig
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import METHODS, Method, RowSpan, TrainSequence, method_class, parse_method, register
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import ConfigError


def test_methods_are_found_by_name_and_completion_is_the_default() -> None:
    assert parse_method({}) == Completion()
    assert parse_method({"name": "sft", "anchor_batch_size": 3}) == SFT(anchor_batch_size=3)
    with pytest.raises(ConfigError, match="no training method 'rlhf'") as error:
        method_class("rlhf")
    assert "augmentation, circuit_breakers, completion" in str(error.value.remedy)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_run_file_leaves_out_of_depth_is_the_methods_own_default(name: str) -> None:
    depth = parse_method({"name": name}).depth
    assert parse_method({"name": name, "depth": {"min": 2}}).depth == depth.model_copy(update={"min": 2})


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Method):
        name: Literal["mine"] = "mine"

    monkeypatch.setitem(METHODS, "mine", Mine)
    monkeypatch.delitem(METHODS, "mine")
    assert register(Mine) is Mine
    assert method_class("mine") is Mine
    with pytest.raises(ValueError, match="a training method 'mine' already"):
        register(Mine)


def test_rows_are_counted_by_term() -> None:
    sequences = [
        TrainSequence((1, 2, 3, 4), (RowSpan("a", 1, 2), RowSpan("b", 3, 1))),
        TrainSequence((1, 2, 3), (RowSpan("a", 1, 2),)),
    ]
    assert SFT().normalisers(sequences) == {"a": 4, "b": 1}


SUFFIXES = {"prompt_augmentation": {"fraction": 0.3}}
FRESH = {"on_policy": True, "sync_every": 1}


@pytest.mark.parametrize(
    ("method", "sections", "key"),
    [
        ({"depth": {"min": 9, "max": 8}}, {}, "method.depth.max"),
        ({"suffix_adversary": {"steps": 1}}, {}, "rollout.prompt_augmentation"),
        (
            {"suffix_adversary": {"steps": 1}},
            {"rollout": {"prompt_augmentation": {"fraction": 0.3, "recovery_fraction": 0}}},
            "rollout.prompt_augmentation",
        ),
        ({"suffix_adversary": {"steps": 1}}, {"rollout": SUFFIXES, "train": {"zero_stage": 3}}, "train.zero_stage"),
        ({"suffix_adversary": {"steps": 1}, "weights": {"push_forward": 0}}, {"rollout": SUFFIXES}, "its weight is 0"),
        ({"name": "circuit_breakers"}, {}, "train.lora_rank"),
        ({"name": "latent_adversarial"}, {"train": {"zero_stage": 3}}, "train.zero_stage"),
        ({"name": "latent_adversarial"}, {"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing"),
        ({"name": "policy_gradient", "recovery_batch_size": 12}, {"rollout": FRESH}, "method.recovery_batch_size"),
        *(
            ({"name": name}, {"rollout": FRESH | {key: value}}, f"rollout.{key}")
            for name in ("policy_gradient", "opct")
            for key, value in (("on_policy", False), ("temperature", 0.7))
        ),
    ],
)
def test_settings_that_a_method_cannot_have_are_refused(
    method: dict[str, Any], sections: dict[str, Any], key: str
) -> None:
    models = {"base": "organism:base", "aligned": "organism:aligned"}
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        RunConfig.model_validate({"models": models, "data": {"source": "organism"}, "method": method} | sections)


def test_settings_of_methods_load_no_torch() -> None:
    code = "import sys, raycomplete.methods, raycomplete.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
