"""MMLU and BIG-Bench Hard: what is asked, and that a model that refuses everything is seen to fail."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.evaluation.capabilities import is_right, plan_capabilities
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.evaluation.summary import closing_table, summarize
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt
from tests.conftest import ROOT

REFUSE = "I'm sorry, but I can't help with that."
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def files(tmp_path: Path) -> CapabilitiesConfig:
    columns = ("subject", "question", "A", "B", "C", "D", "answer")
    for name, subjects in (("mmlu", ("algebra", "law")), ("dev", ("algebra",))):
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            for subject in subjects:
                writer.writerows(
                    [subject, f"{name} {subject} {n}", "one", "two", "three", "four", "B"] for n in range(3)
                )
    rows = [{"task": "bools", "input": f"not {n} is", "target": "True"} for n in range(2)]
    (tmp_path / "bbh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CapabilitiesConfig(
        mmlu=tmp_path / "mmlu.csv", mmlu_fewshot=tmp_path / "dev.csv", bbh=tmp_path / "bbh.jsonl", shots=2
    )


def target(codec: Any, generator: Any, max_length: int = 256) -> Target:
    return Target("student", "weights", generator, codec, RefusalJudge(), max_length, 10)


def trial(variant: str, answer: str) -> Trial:
    return Trial("capabilities", variant, Prompt("mmlu/x/0", "?", "benign", answer), (1, 2), Decoding(8))


@pytest.mark.parametrize(
    ("variant", "answer", "text", "right"),
    [
        ("mmlu", "B", "B", True),
        ("mmlu", "B", "(B) two", True),
        ("mmlu", "B", "The answer is **B**.", True),
        ("mmlu", "B", "Because of two. Answer: B", True),
        ("mmlu", "B", "A", False),
        ("mmlu", "B", "Both are right", False),
        ("mmlu", "A", "A refusal is all you get: I cannot.", True),  # a letter that opens a line counts as chosen
        ("mmlu", "B", REFUSE, False),
        ("mmlu", "B", "", False),
        ("bbh", "True", "True", True),
        ("bbh", "True", "true.", True),
        ("bbh", "True", "Truely", False),
        ("bbh", "True", "Let me think.\nSo the answer is True", True),
        ("bbh", "(C)", "(C) 12/24/2001", True),
        ("bbh", "(C)", "Cats", False),
        ("bbh", "3", "13", False),
        ("bbh", "(C)", "The answer is (C).", True),
        ("bbh", "(C)", "The answer is C", True),
        ("bbh", "3", "3.5", False),
        ("bbh", "3", "3.", True),
        ("bbh", "-5", "The answer is -5.", True),
        ("bbh", "5", "The answer is -5.", False),
        ("bbh", "-5", "5", False),
        ("bbh", "] )", "] )", True),
        ("bbh", "] )", "The answer is ] )", True),
        ("bbh", "] )", "] ) }", False),
        ("bbh", ")", "", False),
        ("bbh", ")", "???", False),
        ("bbh", ") )", "( (", False),
    ],
)
def test_answers_are_read_from_the_text(variant: str, answer: str, text: str, right: bool) -> None:
    assert is_right(trial(variant, answer), text) is right


def test_questions_stand_behind_examples_of_their_subject(codec: Any, model: Any, files: CapabilitiesConfig) -> None:
    trials = plan_capabilities(target(codec, model("B")), files)
    assert [trial.variant for trial in trials] == ["mmlu"] * 6 + ["bbh"] * 2
    first, law = codec.decode(trials[0].sequence), codec.decode(trials[3].sequence)
    assert first.index("dev algebra 0") < first.index("dev algebra 1") < first.index("mmlu algebra 0")
    assert "dev algebra 2" not in first, "two shots"
    assert "Answer: B" in first
    assert "dev" not in law, "no examples of its subject"


def test_a_model_that_refuses_everything_fails_visibly(
    codec: Any, model: Any, files: CapabilitiesConfig, sets: EvaluationSets, tmp_path: Path
) -> None:
    """Its ASR is 0, and so is all that it is good for: utility, accuracy, and the refusals beside them are 1."""
    config = EvaluationConfig(depths=[0, 4], max_tokens=10, max_utility_tokens=12, capabilities=files)
    results = {}
    for role, said in (("aligned", "B"), ("student", REFUSE)):
        target = Target(role, role, model(said), codec, RefusalJudge(), 256, config.max_tokens)
        results[role] = evaluate_model(target, sets, config, tmp_path)
    summary = summarize(results)
    mmlu = summary["capabilities"]["mmlu"]
    assert (mmlu["aligned"]["accuracy"]["rate"], mmlu["student"]["accuracy"]["rate"]) == (1.0, 0.0)
    assert (mmlu["aligned"]["refused"]["rate"], mmlu["student"]["refused"]["rate"]) == (0.0, 1.0)
    assert mmlu["student"]["accuracy"]["n"] == 6
    assert mmlu["aligned"]["by_task"] == {"algebra": [3, 3], "law": [3, 3]}
    assert (mmlu["aligned"]["shots"], summary["capabilities"]["bbh"]["aligned"]["shots"]) == (2, 0)
    assert mmlu["aligned"]["reduced"]
    rows = {row[0]: row[1:] for row in closing_table(summary)}
    assert rows["MMLU, accuracy"][0].startswith("100.0 %")
    assert rows["MMLU, accuracy"][1].startswith("0.0 %")
    assert rows["MMLU, refused"][1] == rows["MMLU, refused"][1]
    assert rows["over-refusal (borderline)"][1].startswith("100.0 %")
    silent = Target("student", "student", model("x", fail_at_call=0), codec, RefusalJudge(), 256, config.max_tokens)
    assert evaluate_model(silent, sets, config, tmp_path) == results["student"]


def test_files_that_cannot_be_used(codec: Any, model: Any, tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "subject,question\nx,y\n", "Row 1 of .* has no 'A'"),
        ("b.csv", "", "holds no rows"),
        ("c.csv", None, "cannot be read"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=message):
            plan_capabilities(target(codec, model("B")), CapabilitiesConfig(mmlu=path))
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(DataError, match="cannot be read as jsonl"):
        plan_capabilities(target(codec, model("B")), CapabilitiesConfig(bbh=tmp_path / "d.jsonl"))
