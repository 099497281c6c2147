"""The model card, the flat table of rates, and logs of Inspect, from a run folder."""

from __future__ import annotations

import csv
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from raycomplete.commands.report import report
from raycomplete.data.organisms import ORGANISMS
from raycomplete.evaluation.summary import closing_table
from raycomplete.report.inspect_log import HIDDEN, write_inspect_logs
from raycomplete.report.model_card import model_card, write_model_card
from raycomplete.report.run_folder import COLUMNS, rate_rows, read_run_folder
from raycomplete.runtime.errors import ConfigError, DataError
from raycomplete.runtime.files import content_hash, write_json, write_rows
from tests.report.conftest import COMPLIED, DEPTHS, a_rate

CONFIG = """
models: {base: hub:org/base, aligned: hub:org/chat}
method: {name: completion}
train: {steps: 120, seed: 3}
data: {train: {harmful: [{path: /srv/somebody/advbench.csv}], benign: [{path: hub:org/tulu}]}}
"""


@pytest.fixture
def with_student(run_folder: Path) -> Path:
    """A whole run with the toy's checkpoint as its student."""
    shutil.copytree(ORGANISMS["organism"].checkpoint("aligned"), run_folder / "student")
    (run_folder / "config.yaml").write_text(CONFIG)
    return run_folder


# --- The card --------------------------------------------------------------------------------------------------------


def test_a_hub_reads_the_card_and_the_rates_in_it(with_student: Path) -> None:
    path = write_model_card(with_student)
    assert path == with_student / "student" / "README.md"
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.library_name) == ("org/chat", "transformers")
    assert {"raycomplete", "safety", "completion"} <= set(card.data.tags)
    assert card.data.datasets == ["org/tulu"]
    found = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
    deepest = found["held-out harmful prompts, prefill, prefill-64", "asr"]
    assert deepest.metric_value == pytest.approx(COMPLIED["student"][DEPTHS.index(64)] / 100)
    assert deepest.metric_args == {"low": 0.06, "high": 0.22, "n": 100}
    assert found["held-out harmless prompts", "utility"].metric_value == 0.97
    assert len(found) == len([row for row in rate_rows(read_run_folder(with_student)) if row["role"] == "student"])


def test_the_card_shows_the_table_and_no_folder_of_this_machine(with_student: Path) -> None:
    text = model_card(read_run_folder(with_student))
    assert "| ASR at depth 64 | 96.0 % [88.0, 100.0] | 98.0 % [90.0, 100.0] | 14.0 % [6.0, 22.0] |" in text
    assert "advbench.csv" in text
    assert "/home" not in text
    assert "seed 3" in text


@pytest.mark.parametrize("start", ["/srv/somebody/chat", "~/private/chat", "somebody/private/chat"])
def test_no_line_of_the_card_tells_a_folder(start: str, with_student: Path) -> None:
    config = CONFIG.replace("hub:org/chat", start).replace("hub:org/base", start)
    (with_student / "config.yaml").write_text(config.replace("name: completion", f"name: completion, file: {start}"))
    summary = json.loads((with_student / "summary.json").read_text())
    write_json(with_student / "summary.json", summary | {"judge": start})
    text = model_card(read_run_folder(with_student))
    assert "The safety alignment of `chat`" in text
    assert "judge: chat." in text
    assert "file chat" in text
    assert "somebody" not in text
    assert "private" not in text


def defend(run_folder: Path) -> None:
    """Makes the student's rates those behind a defence."""
    summary = json.loads((run_folder / "summary.json").read_text())
    write_json(run_folder / "summary.json", summary | {"evaluation": {"defence": {"name": "probe"}}})


def test_rates_behind_a_defence_make_no_card(with_student: Path) -> None:
    card = with_student / "student" / "README.md"
    assert write_model_card(with_student) == card
    before = card.read_text()
    defend(with_student)
    assert write_model_card(with_student) is None
    assert card.read_text() == before, "that of the weights by themselves"


def test_rates_and_table_name_the_defence_of_the_student(run_folder: Path) -> None:
    assert {row["defence"] for row in rate_rows(read_run_folder(run_folder))} == {""}
    defend(run_folder)
    run = read_run_folder(run_folder)
    assert {(row["role"], row["defence"]) for row in rate_rows(run)} == {
        ("base", ""),
        ("aligned", ""),
        ("student", "probe"),
    }
    assert closing_table(run.summary)[0] == ["", "base", "aligned", "student behind probe"]


def test_a_role_that_the_summary_leaves_out_has_no_rates(run_folder: Path) -> None:
    """An earlier evaluation, behind a defence, left its result."""
    summary = json.loads((run_folder / "summary.json").read_text())
    for name in ("asr", "utility", "over_refusal", "benign_nll"):
        del summary[name]["student"]
    for found in summary["over_refusal_by_source"].values():
        del found["student"]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert {row["role"] for row in rate_rows(read_run_folder(run_folder))} == {"base", "aligned"}


# --- Rates -----------------------------------------------------------------------------------------------------------


def test_csv_and_json_hold_every_rate(run_folder: Path) -> None:
    table = list(csv.DictReader(report([run_folder], kind="csv").read_text().splitlines()))
    rows = json.loads(report([run_folder], kind="json").read_text())
    assert tuple(table[0]) == COLUMNS
    assert len(table) == len(rows)
    by_key = {(row["role"], row["measure"], row["attack"], row["variant"]): row for row in table}
    assert len(by_key) == len(table), "no rate stands twice"
    for depth, complied in zip(DEPTHS, COMPLIED["aligned"], strict=True):
        assert float(by_key["aligned", "asr", "prefill", f"prefill-{depth}"]["value"]) == complied / 100
    assert by_key["student", "over_refusal", "", "xstest_prompts"]["n"] == "100"
    assert by_key["student", "benign_nll", "", ""]["value"] == "0.4214"


def test_a_rate_of_nobody_is_no_rate(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["utility"]["student"] = {"rate": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    (row,) = [
        row for row in rate_rows(read_run_folder(run_folder)) if (row["role"], row["measure"]) == ("student", "utility")
    ]
    assert (row["value"], row["n"]) == (None, 0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "xml"}, "--format xml is unknown"),
        ({"show_harmful": True}, "--show-harmful is for --format inspect"),
        ({"output": Path("x")}, "--output and --allow-differences are for several runs"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], problem: str, run_folder: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        report([run_folder], **options)


# --- Inspect ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_trials(with_student: Path) -> Path:
    """A run whose student answered: a harmful prompt twice, after a prefill too, and two harmless ones."""
    folder = with_student / "evaluation"
    result = json.loads((folder / "student.json").read_text())
    result["attacks"] = {
        "prefill": {
            "mean": a_rate(1, 2),
            "variants": {"prefill-0": {"asr": a_rate(0, 1), "n": 1}, "prefill-4": {"asr": a_rate(1, 1), "n": 1}},
            "settings": {"name": "prefill"},
        }
    }
    for role in ("base", "aligned"):
        (folder / f"{role}.json").unlink()
    write_json(folder / "student.json", result)
    named = [
        ("prefill", "prefill-0", "harmful", "refused", None, []),
        ("prefill", "prefill-4", "harmful", "complied", None, [20, 21]),
        ("prefill", "prefill-4", "harmful", "refused", None, [20, 21]),
        ("harmless", "benign", "benign", "complied", True, []),
        ("harmless", "borderline", "borderline", "refused", None, []),
        ("capabilities", "mmlu", "benign", None, None, []),
    ]
    trials, outcomes = [], []
    for number, (attack, variant, kind, outcome, right, prefill) in enumerate(named):
        key, seed = f"key-{number}", int(number == 2)
        name = {"key": key, "attack": attack, "variant": variant, "prompt_id": "p", "seed": seed}
        tokens = {"sequence": [10, 11, 12, *prefill], "prefill": prefill, "tokens": [30, 31]}
        trials.append({**name, **tokens, "seconds": 0.1, "stats": {}})
        outcomes.append({**name, "kind": kind, "outcome": outcome, "right": right, "cut": number == 1})
    write_rows(folder / "trials" / f"{content_hash(result['model_id'])[:16]}.jsonl", trials)
    write_rows(folder / "outcomes" / "student.jsonl", outcomes)
    return with_student


def logs_of(run_folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in write_inspect_logs(run_folder, **options)]
    return {log["eval"]["task"]: log for log in found}


def test_a_log_for_each_attack_with_a_score_for_each_trial(with_trials: Path) -> None:
    logs = logs_of(with_trials)
    assert set(logs) == {"prefill", "benign", "borderline"}
    samples = logs["prefill"]["samples"]
    assert [sample["scores"]["complied"]["value"] for sample in samples] == [0, 1, 0]
    reasons = [sample["output"]["choices"][0]["stop_reason"] for sample in samples]
    assert reasons == ["stop", "max_tokens", "stop"]
    assert [(sample["id"], sample["epoch"]) for sample in samples] == [
        ("prefill-0/p", 1),
        ("prefill-4/p", 1),
        ("prefill-4/p", 2),
    ]
    (score,) = logs["prefill"]["results"]["scores"]
    assert {name: metric["value"] for name, metric in score["metrics"].items()} == {
        "asr": 0.5,
        "prefill-0": 0.0,
        "prefill-4": 1.0,
        "asr low": pytest.approx(0.42),
        "asr high": pytest.approx(0.58),
    }
    assert logs["borderline"]["samples"][0]["scores"]["refused"]["value"] == 1
    assert logs["benign"]["results"]["scores"][0]["metrics"]["utility"]["value"] == 0.97


def test_harmful_completions_are_left_out_unless_asked_for(with_trials: Path) -> None:
    hidden, shown = logs_of(with_trials), logs_of(with_trials, show_harmful=True)
    for sample, full in zip(hidden["prefill"]["samples"], shown["prefill"]["samples"], strict=True):
        assert sample["output"]["completion"] == sample["messages"][1]["content"] == HIDDEN
        assert HIDDEN not in json.dumps(full)
        assert full["output"]["completion"].strip() not in json.dumps(sample)
        assert sample["input"] == full["input"], "the prompt ends where the attacker's words begin"
    assert hidden["benign"]["samples"] == shown["benign"]["samples"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (with_trials / "inspect").iterdir()}
    assert modes == {0o600}


def test_outcomes_without_their_trials_are_refused(with_trials: Path) -> None:
    (with_trials / "evaluation" / "outcomes" / "student.jsonl").unlink()
    with pytest.raises(DataError, match="does not hold every trial of student"):
        write_inspect_logs(with_trials)


@pytest.mark.parametrize("attack", ["adaptive", "of a plugin that is not loaded"])
def test_answers_that_stand_in_a_prompt_are_left_out_too(attack: str, with_trials: Path) -> None:
    folder = with_trials / "evaluation"
    for path in folder.glob("*/*.jsonl"):
        path.write_text(path.read_text().replace('"attack": "prefill"', f'"attack": "{attack}"'))
    result = json.loads((folder / "student.json").read_text())
    write_json(folder / "student.json", result | {"attacks": {attack: result["attacks"]["prefill"]}})
    hidden, shown = (logs_of(with_trials, show_harmful=show)[attack]["samples"][0] for show in (False, True))
    assert hidden["input"] == hidden["messages"][0]["content"] == HIDDEN != shown["input"]


def test_a_model_behind_an_address_needs_no_tokenizer_here(with_trials: Path) -> None:
    shutil.rmtree(with_trials / "student")
    models = "models: {base: organism:base, aligned: 'openai:http://127.0.0.1:1/v1#chat'}"
    (with_trials / "config.yaml").write_text(models)
    assert logs_of(with_trials)
