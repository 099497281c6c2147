import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import EvaluationCancelled
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation import benign_nll as module
from raycomplete.evaluation.benign_nll import (
    GivenAnswer,
    aligned_answers,
    benign_nll,
    given_answers,
)
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.evaluation.summary import closing_table
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.types import Prompt

CONFIG = EvaluationConfig(depths=[0], max_tokens=4, max_utility_tokens=6)
PROMPTS = [Prompt(f"b{n}", f"bake cake {n}", "benign", "mix and bake it" if n % 2 else None) for n in range(5)]
GREEDY = "take an egg and some flour and stir"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NLL_PROMPTS", 4)
    monkeypatch.setattr(module, "NLL_TOKENS", 3)


class Fair:
    """Finds every token of the n-th answer that it ever sees equally likely: `nats[n]` each."""

    def __init__(self, *nats: float) -> None:
        self.nats = list(nats)
        self.asked: list[tuple[tuple[int, ...], int]] = []

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
        start = len(self.asked)
        self.asked += [(tuple(tokens), num_prompt) for tokens, num_prompt in sequences]
        return [[-self.nats[start + i]] * (len(t) - n) for i, (t, n) in enumerate(sequences)]


def answers(*lengths: int) -> list[GivenAnswer]:
    return [GivenAnswer(f"p{n}", (n, 2, *range(3, 3 + length)), 2, "file") for n, length in enumerate(lengths)]


def test_mean_is_over_tokens_and_the_ratio_over_the_same_prompts(tmp_path: Path) -> None:
    aligned, student = Fair(1.0, 2.0, 0.5), Fair(1.1, 2.2, 0.55)
    found = benign_nll({"aligned": ("a", aligned), "student": ("s", student)}, answers(1, 4, 5), tmp_path)
    assert found["aligned"]["nats_per_token"] == pytest.approx((1 * 1.0 + 4 * 2.0 + 5 * 0.5) / 10)
    assert found["aligned"]["low"] < found["aligned"]["nats_per_token"] < found["aligned"]["high"]
    assert (found["aligned"]["n"], found["aligned"]["tokens"], found["aligned"]["answers"]) == (3, 10, {"file": 3})
    change = found["student_to_aligned"]
    # Every answer is 10 % less likely, so whichever prompts are drawn, the ratio is the same: the pairs must not break.
    assert [change[key] for key in ("ratio", "low", "high")] == pytest.approx([1.1] * 3)
    assert change["difference"] == pytest.approx(0.1 * found["aligned"]["nats_per_token"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("certain", [(0.0, 0.0), (0.0, 0.4)])
def test_no_ratio_to_zero(certain: tuple[float, float], tmp_path: Path) -> None:
    """On tiny models log p of a whole answer can round to 0, and NaN in a summary would be refused at the very end."""
    found = benign_nll({"aligned": ("a", Fair(*certain)), "student": ("s", Fair(0.0, 0.3))}, answers(2, 3), tmp_path)
    assert found.keys() == {"aligned", "student"}
    json.dumps(found, allow_nan=False)


def test_finished_answers_are_not_asked_again(tmp_path: Path) -> None:
    first = benign_nll({"base": ("b", Fair(1.0, 2.0))}, answers(2, 3), tmp_path)
    silent = Fair()
    assert benign_nll({"base": ("b", silent)}, answers(2, 3), tmp_path) == first
    assert silent.asked == []
    longer = Fair(7.0)
    assert benign_nll({"base": ("b", longer)}, answers(2, 3, 4), tmp_path)["base"]["n"] == 3
    assert len(longer.asked) == 1
    other_weights = Fair(1.0, 2.0)
    benign_nll({"student": ("other", other_weights)}, answers(2, 3), tmp_path)
    assert len(other_weights.asked) == 2


def test_a_model_of_nan_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="'p1' has 3 tokens"):
        benign_nll({"base": ("b", Fair(1.0, math.nan))}, answers(2, 3), tmp_path)


def test_cancelling_keeps_what_was_finished(tmp_path: Path) -> None:
    many = answers(*[2] * 40)
    calls = iter([False, True])
    with pytest.raises(EvaluationCancelled):
        benign_nll({"base": ("b", Fair(*[1.0] * 40))}, many, tmp_path, cancelled=lambda: next(calls))
    going_on = Fair(*[1.0] * 40)
    benign_nll({"base": ("b", going_on)}, many, tmp_path)
    assert len(going_on.asked) == 40 - 32


def test_the_files_answer_comes_first_and_else_the_aligned_models(codec: Any, model: Any, tmp_path: Path) -> None:
    spoken = aligned_answers(PROMPTS[:4], codec, CONFIG, tmp_path, ("aligned", model(GREEDY)))
    found = given_answers(PROMPTS[:4], spoken, codec, 64)
    assert [(a.prompt_id, a.source) for a in found] == [
        ("b0", "aligned"),
        ("b1", "file"),
        ("b2", "aligned"),
        ("b3", "file"),
    ]
    said = [codec.decode(answer.tokens[answer.num_prompt :]) for answer in found[:2]]
    assert said == ["take an egg", "mix and bake"]  # both cut at NLL_TOKENS
    assert codec.decode(found[0].tokens[: found[0].num_prompt]) == "bake cake 0"


def test_what_an_evaluation_heard_is_not_asked_again(codec: Any, model: Any, tmp_path: Path) -> None:
    sets = EvaluationSets((Prompt("h", "do harm", "harmful", "a b"),), tuple(PROMPTS), ())
    evaluate_model(
        Target("aligned", "aligned", model(GREEDY), codec, RefusalJudge(), 64, CONFIG.max_tokens),
        sets,
        CONFIG,
        tmp_path,
    )
    silent = model("never asked", fail_at_call=0)
    spoken = aligned_answers(PROMPTS, codec, CONFIG, tmp_path, ("aligned", silent))
    assert spoken == {name: codec.encode_answer(GREEDY)[:6] for name in ("b0", "b2", "b4")}


def test_over_refusal_file_by_file(codec: Any, model: Any, sets: EvaluationSets, tmp_path: Path) -> None:
    """The two sets of a target must not hide behind their mean."""
    borderline = tuple(
        replace(prompt, source=source)
        for prompt, source in zip(sets.borderline, ("xstest", "benign_twins"), strict=True)
    )
    refuses = model(lambda prompt, _: "I'm sorry, but I can't help with that." if prompt.endswith("0") else GREEDY)
    result = evaluate_model(
        Target("student", "weights", refuses, codec, RefusalJudge(), 64, 12),
        EvaluationSets(sets.harmful, sets.benign, borderline),
        CONFIG.model_copy(update={"max_tokens": 12}),
        tmp_path,
    )
    by_source = result["over_refusal_by_source"]
    assert {name: rate["rate"] for name, rate in by_source.items()} == {"xstest": 1.0, "benign_twins": 0.0}
    summary = {
        "asr": {"student": result["asr"]},
        "over_refusal": {"student": result["over_refusal"]},
        "over_refusal_by_source": {name: {"student": rate} for name, rate in by_source.items()},
        "benign_nll": {"student": {"nats_per_token": 0.4214, "low": 0.4, "high": 0.44}},
    }
    table = dict(closing_table(summary))
    assert table["over-refusal, xstest"].startswith("100.0 %")
    assert table["benign NLL, nats a token"] == "0.421 [0.400, 0.440]"
