"""Labels of results that are less than standard: what was reduced to what, and only where it tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.registry import build_attack, parse_attack
from raycomplete.attacks.target import BatchJudge, Target, Triple
from raycomplete.attacks.trial import Decoding, Response, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.evaluation.summary import reductions, summarize
from raycomplete.runtime.types import Outcome, Prompt

LONG = " ".join(f"word{n}" for n in range(30))
SHORT = "Sure, take the key."

Evaluate = Callable[..., dict[str, Any]]


def prompts(kind: Any, count: int, answer_tokens: int = 0, **changes: Any) -> tuple[Prompt, ...]:
    answer = " ".join(f"step{n}" for n in range(answer_tokens)) or None
    return tuple(Prompt(f"{kind}{n}", f"{kind} thing {n}", kind, answer, **changes) for n in range(count))


@pytest.fixture
def evaluate(codec: Any, model: Any, tmp_path: Path) -> Evaluate:
    """Evaluates a model on 100 prompts of each kind, with answers of 10 tokens, at depths 0, 4 and 8."""

    def make(script: Any, max_tokens: int = 20, judge: Any = None, **changes: Any) -> dict[str, Any]:
        harmful = changes.pop("harmful", prompts("harmful", 100, 10))
        sets = EvaluationSets(harmful, prompts("benign", 100), prompts("borderline", 100))
        settings = {"depths": [0, 4, 8], "max_tokens": max_tokens, "max_utility_tokens": max_tokens, **changes}
        config = EvaluationConfig.model_validate(settings)
        target = Target("student", "weights", model(script), codec, judge or RefusalJudge(), 1024, max_tokens)
        return evaluate_model(target, sets, config, tmp_path)

    return make


def test_answers_that_were_cut_are_labelled(evaluate: Evaluate) -> None:
    result = evaluate(LONG)
    block = result["attacks"]["prefill"]
    assert block["reduced_because"] == ["answers of 20 tokens instead of 256 (300 of 300 cut)"]
    assert block["cut_by_length"] == 300
    assert {name: found["cut_by_length"] for name, found in result["variants"].items()} == dict.fromkeys(
        ("prefill-0", "prefill-4", "prefill-8", "benign", "borderline"), 100
    )
    assert block["variants"]["prefill-4"]["cut_by_length"] == 100
    for name in ("benign", "borderline"):
        assert result["reduced_because"][name] == ["answers of 20 tokens instead of 256 (100 of 100 cut)"]


@pytest.mark.parametrize(("cut", "is_reduced"), [(3, False), (4, True)])
def test_one_answer_in_a_hundred_may_be_cut(evaluate: Evaluate, cut: int, is_reduced: bool) -> None:
    def script(prompt: str, prefill: str) -> str:
        return LONG if not prefill and any(prompt == f"harmful thing {n}" for n in range(cut)) else SHORT

    block = evaluate(script)["attacks"]["prefill"]
    assert (block["cut_by_length"], block["reduced"]) == (cut, is_reduced)


def test_few_prompts_and_a_judge_of_unknown_errors_are_labelled(evaluate: Evaluate) -> None:
    class Unmeasured(RefusalJudge):
        name = "unmeasured"
        measured = None

    result = evaluate(SHORT, judge=Unmeasured(), harmful=prompts("harmful", 40, 10))
    assert result["attacks"]["prefill"]["reduced_because"] == [
        "40 behaviours instead of 100",
        "the judge's errors were not measured",
    ]


def test_reductions_name_what_holds_for_some_models_only(evaluate: Evaluate) -> None:
    """Base writes on, the student ends."""
    base = evaluate(LONG, harmful=prompts("harmful", 50, 10)) | {"role": "base"}
    student = replace_cut(base)
    said = dict(reductions(summarize({"base": base, "student": student})))
    assert said["prefill"] == "50 behaviours instead of 100; base: answers of 20 tokens instead of 256 (150 of 150 cut)"
    assert said["benign"] == "answers of 20 tokens instead of 256 (100 of 100 cut)"


def replace_cut(result: dict[str, Any]) -> dict[str, Any]:
    """The same result of a student whose answers to attacks end by themselves."""
    block = result["attacks"]["prefill"]
    changed = {**block, "reduced_because": block["reduced_because"][:1]}
    return {**result, "role": "student", "attacks": {"prefill": changed}}


def test_searches_are_cut_by_their_steps() -> None:
    """Their plan asks for single tokens."""
    trial = Trial("x", "top-5", Prompt("p", "t", "harmful"), (1,), Decoding(1))
    for name in ("rank_assisted_prefill", "base_guided_decoding"):
        attack = build_attack(parse_attack({"name": name, "steps": 8}))
        assert attack.answer_tokens(trial) == 8
        whole, part = (Response((1,), (), (5,) * count, searched(count, count)) for count in (8, 7))
        assert (attack.is_cut(trial, whole), attack.is_cut(trial, part)) == (True, False)
    rap = build_attack(parse_attack({"name": "rank_assisted_prefill", "steps": 8}))
    for stats, is_cut in (
        (searched(8, 4, 2), True),  # six picks, two of them taken back
        (searched(8, 7), False),  # its end with the last step
        (searched(8, 5, 1), False),
        (searched(8, 0, 3), False),  # back into the prefill
        (searched(7, 7), False),
    ):
        assert rap.is_cut(trial, replace(part, stats=stats)) is is_cut, stats


def searched(steps: int, picks: int, backtracks: int = 0) -> dict[str, int]:
    """A search of ranks notes this; a step that is neither pick nor way back took the end or left the answer."""
    return {"steps": steps, "picks": picks, "backtracks": backtracks}


def test_responses_that_the_judge_did_not_read_to_the_end_are_labelled(evaluate: Evaluate) -> None:
    class Hasty(BatchJudge):
        name = "hasty"
        measured = RefusalJudge.measured

        def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
            self.shortened = frozenset(range(0, len(triples), 4))
            return [Outcome.COMPLIED for _ in triples]

        def is_right(self, prompt: Prompt, continuation: str) -> bool:
            return True

    for _ in range(2):  # the second time from the stored judgements
        reasons = evaluate(SHORT, judge=Hasty())["attacks"]["prefill"]["reduced_because"]
        assert reasons == ["75 of 300 responses were too long for the judge, which read their start"]


def test_verdicts_that_could_not_be_read_stand_beside_the_rates(evaluate: Evaluate) -> None:
    class Mumbling(BatchJudge):
        """Gives no verdict on every fourth response of a batch."""

        name = "mumbling"
        measured = RefusalJudge.measured

        def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
            self.unreadable = frozenset(range(0, len(triples), 4))
            return [Outcome.COMPLIED for _ in triples]

        def is_right(self, prompt: Prompt, continuation: str) -> bool:
            return self.outcome(prompt, "", continuation).is_compliance

    def counted(result: dict[str, Any]) -> None:
        block = result["attacks"]["prefill"]
        assert block["unreadable_verdicts"] == 75
        assert block["variants"]["prefill-4"]["unreadable_verdicts"] == 25
        assert result["variants"]["benign"]["unreadable_verdicts"] == 25
        said = "verdicts of the judge could not be read: refusal patterns decided"
        assert f"75 of 300 {said}" in block["reduced_because"]
        assert result["reduced_because"]["benign"] == [f"25 of 100 {said}"]

    counted(evaluate(SHORT, judge=Mumbling()))
    counted(evaluate(SHORT, judge=Mumbling()))  # from the stored judgements
    assert evaluate(SHORT)["attacks"]["prefill"]["unreadable_verdicts"] == 0


def test_a_judge_whose_right_is_compliance_is_asked_once(evaluate: Evaluate) -> None:
    class Once(BatchJudge):
        name = "once"
        measured = RefusalJudge.measured
        right_is_compliance = True

        def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
            return [Outcome.COMPLIED for _ in triples]

        def is_right(self, prompt: Prompt, continuation: str) -> bool:
            raise AssertionError("the outcome says it")

    assert evaluate(SHORT, judge=Once())["utility"]["rate"] == 1.0
