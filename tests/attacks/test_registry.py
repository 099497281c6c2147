import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import ValidationError

from raycomplete.attacks import registry
from raycomplete.attacks.attack import Attack, AttackConfig
from raycomplete.attacks.registry import ATTACKS, UnknownAttackError, parse_attack, register
from raycomplete.attacks.suffix import GcgConfig
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Trial
from raycomplete.config import EvaluationConfig, load_run_file, map_paths
from raycomplete.evaluation.attack_resources import extra_engines, training_workers
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.types import Prompt
from tests.attacks.scripted import made

RUN_FILE = {"models": {"base": "a", "aligned": "b"}, "data": {}}


class MineConfig(AttackConfig):
    name: Literal["mine"] = "mine"
    attacker: str | None = None


class Mine(Attack[MineConfig]):
    needs = frozenset({"white_boxes", "guide", "attacker", "fine_tune"})

    def plan(self, target: Target, prompts: Sequence[Prompt]) -> list[Trial]:
        return []


@pytest.fixture
def mine() -> Iterator[type[Mine]]:
    """An attack of a test's own, as long as the test runs."""
    yield register(MineConfig)(Mine)
    registry._attacks.pop("mine")


def test_devices_are_reserved_for_whatever_an_attack_needs(mine: type[Mine], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for attacks, engines, workers in (
        (["templates"], 0, 0),
        (["mine"], 1 + 1, 1),
        ([{"name": "mine", "attacker": "organism:base"}, {"name": "pair", "attacker": "organism:base"}], 1 + 1 + 1, 1),
    ):
        path.write_text(yaml.safe_dump({**RUN_FILE, "evaluation": {"attacks": attacks}}))
        config = load_run_file(path)
        assert (extra_engines(config), training_workers(config)) == (engines, workers)


def test_an_attack_is_registered_by_its_name(mine: type[Mine]) -> None:
    assert isinstance(made({"name": "mine", "attacker": "x"}), mine)
    assert register(MineConfig)(mine) is mine, "the same class again, as after a second import"
    other = type("Other", (Mine,), {})
    with pytest.raises(ConfigError, match=r"The attack mine of .* exists in"):
        register(MineConfig)(other)
    with pytest.raises(ConfigError, match="AttackConfig has no default for `name`"):
        register(AttackConfig)


def test_the_depth_curve_is_always_measured() -> None:
    config = EvaluationConfig.model_validate({"attacks": ["gcg"]})
    assert [attack.name for attack in config.attacks] == ["prefill", "gcg"]
    assert isinstance(config.attacks[1], GcgConfig)


def test_unknown_attacks_are_told_the_known_ones() -> None:
    with pytest.raises(UnknownAttackError, match="no attack 'gcgg'") as caught:
        parse_attack("gcgg")
    assert caught.value.known == tuple(ATTACKS)
    assert all(name in str(caught.value) for name in ATTACKS)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.known) == (str(caught.value), caught.value.known)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "gcg", "step": 3}, "no setting 'step'. Did you mean 'steps'"),
        ({"name": "gcg", "steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"name": "decoding", "temperatures": [-1]}, "must be above 0"),
        ({"name": "decoding", "temperatures": [], "top_ps": [], "top_ks": []}, "name at least one"),
        ({"name": "static_strings"}, "path: Field required"),
        ({"name": "pair", "streams": 101}, "streams: Input should be less than or equal to 100"),
        ({"name": "gcg", "search_width": 4097}, "search_width: Input should be less than or equal to 4096"),
        ({"name": "gcg", "steps": 5001}, "steps: Input should be less than or equal to 5000"),
        ({"name": "random_search", "queries": 1_000_001}, "queries: Input should be less than or equal to 1000000"),
        ({"name": "best_of_n", "samples": 10_001}, "samples: Input should be less than or equal to 10000"),
        ({"name": "finetune", "steps": 10}, "no setting 'steps' any more: epochs"),
        ({"name": "adaptive", "cuts": [-1]}, "cuts.0: Input should be greater than or equal to 0"),
        ({"name": "adaptive", "depths": []}, "depths: List should have at least 1 item"),
        ({"name": "finetune", "depths": [-1]}, "depths.0: Input should be greater than or equal to 0"),
        ({}, "no attack None"),
    ],
)
def test_wrong_settings_are_told_in_one_sentence(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_attack(entry)
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig.model_validate({"attacks": [entry]})


def test_paths_are_resolved_by_whoever_knows_the_folder() -> None:
    tree = {
        "attacks": [{"name": "templates", "path": "t.jsonl"}, "gcg"],
        "judge": {"calibration": "c.json"},
        "capabilities": {"mmlu": "m.csv"},
    }
    config = map_paths(EvaluationConfig.model_validate(tree), lambda _, path: Path("/run") / path)
    assert config.attacks[1].path == Path("/run/t.jsonl")  # type: ignore[attr-defined]
    assert config.judge.calibration == Path("/run/c.json")
    assert config.capabilities.mmlu == Path("/run/m.csv")
    assert config.capabilities.bbh is None


def test_answers_must_reach_the_deepest_cut_of_any_attack() -> None:
    assert EvaluationConfig(depths=[0, 7]).deepest_prefill == 7
    for attack, deepest in (
        ({"name": "adaptive", "cuts": [3], "depths": [8]}, 8),
        ({"name": "prefill_mid_answer", "starts": [3, 9], "windows": [4]}, 9 + 32 + 4),
        ({"name": "refuse_then_turn", "depths": [12]}, 12),
        ({"name": "rank_assisted_prefill"}, 24),
        ({"name": "adaptive", "cuts": [30], "depths": [8]}, 30),
        ({"name": "finetune", "depths": [0, 40]}, 40),
    ):
        assert EvaluationConfig.model_validate({"depths": [7], "attacks": [attack]}).deepest_prefill == deepest


def test_the_depth_curve_has_one_place_for_its_depths() -> None:
    with pytest.raises(ValidationError, match=r"those of evaluation\.depths"):
        EvaluationConfig.model_validate({"attacks": [{"name": "prefill", "depths": [3]}]})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "finetune", "datasets": ["harmful", "harmful"]}, "datasets names harmful twice"),
        ({"name": "refuse_then_turn", "depths": [4, 16, 4]}, "depths names 4 twice"),
        ({"name": "adaptive", "cuts": [3, 3]}, "cuts names 3 twice"),
        ({"name": "refuse_then_turn", "turns": ["But", "but!"]}, "'But' and 'but!' would both be the variant but"),
        ({"name": "refuse_then_turn", "turns": ["\u4f46\u662f", "\u7136\u800c"]}, "would both be the variant turn"),
    ],
)
def test_settings_that_measure_nothing_or_the_same_twice(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_attack(entry)
    assert message in str(caught.value)
    assert "\n" not in caught.value.problem
