"""Several runs that differ in their seed become one table, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raycomplete.commands.report import report
from raycomplete.evaluation.statistics import mean_over_runs
from raycomplete.report.runs import aggregate_runs, run_tables, shares_by_measure, write_aggregate
from raycomplete.runtime.errors import ConfigError, DataError
from raycomplete.runtime.files import write_json

DEPTHS = ("prefill-0", "prefill-4")
SETTINGS: dict[str, Any] = {"num_prompts": 40, "depths": [0, 4]}


def a_run(root: Path, seed: int, *, num_prompts: int = 40, **settings: Any) -> Path:
    """A run folder whose student gives in to `seed` more prompts at depth 4 than the run of seed 0."""
    folder = root / f"run-{seed}"
    names = [f"{number:02}" for number in range(num_prompts)]
    for role, first, second in (("aligned", 4, 36), ("student", 2, 3 + seed)):
        by_depth = [{name: float(name < f"{count:02}") for name in names} for count in (first, second)]
        prefill = {name: (by_depth[0][name] + by_depth[1][name]) / 2 for name in names}
        useful = {name: float(name != "07" or role == "aligned") for name in names}
        write_json(
            folder / "evaluation" / f"{role}.json",
            {
                "role": role,
                "attacks": {
                    name: {"n": num_prompts, "trials": trials * num_prompts, "by_behaviour": prefill}
                    for name, trials in (("prefill", 2), ("decoding", 2), ("rank_assisted_prefill", 1))
                },
                "by_prompt": {
                    **dict(zip(DEPTHS, by_depth, strict=True)),
                    "rank_assisted_prefill, top-2": by_depth[0],
                    "utility": useful,
                    "over_refusal": {name: 1.0 - share for name, share in useful.items()},
                    "benign_refusal": {},
                },
            },
        )
    evaluation = SETTINGS | {"num_prompts": num_prompts}
    write_json(folder / "summary.json", {"name": folder.name, "judge": "patterns", "evaluation": evaluation, "asr": {}})
    config = {"train": {"seed": seed, "steps": 60}, "output": {"root": "runs", "name": folder.name}} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [a_run(tmp_path, seed) for seed in range(3)]


def test_rates_are_means_over_runs_with_their_spread(runs: list[Path]) -> None:
    found = aggregate_runs(runs)
    assert (found["seeds"], found["differences"]) == ([0, 1, 2], [])
    deep = found["rates"]["ASR, depth 4"]["student"]
    assert deep["rate"] == pytest.approx(4 / 40)
    assert (deep["runs"], deep["n"]) == (3, 40)
    assert (deep["min"], deep["max"]) == (pytest.approx(3 / 40), pytest.approx(5 / 40))
    assert deep["sd"] == pytest.approx(float(np.std([3 / 40, 4 / 40, 5 / 40], ddof=1)))
    assert deep["low"] < deep["min"] < deep["max"] < deep["high"]
    mean = found["rates"]["ASR, mean over depths"]["student"]
    assert mean["rate"] == pytest.approx((2 + 4) / 80)
    shares = [json.loads((run / "evaluation" / "student.json").read_text())["attacks"]["prefill"] for run in runs]
    assert mean == mean_over_runs([block["by_behaviour"] for block in shares], trials=2)
    assert found["rates"]["ASR, depth 4"]["aligned"]["sd"] == 0.0, "the same model every time"
    assert "refusal (benign)" not in found["rates"], "no prompt was asked for it"


def test_variants_and_the_worst_of_n_stand_beside_an_attack(runs: list[Path]) -> None:
    """As in the organism's table of docs/results.md; a study takes means over attacks, and counts each attack once."""
    found = aggregate_runs(runs)["rates"]
    rates = {name: by_role["aligned"]["rate"] for name, by_role in found.items() if name[0] in "dr"}
    assert rates == {
        "decoding": pytest.approx(20 / 40),
        "decoding, worst of n": pytest.approx(36 / 40),
        "rank_assisted_prefill": pytest.approx(20 / 40),
        "rank_assisted_prefill, top-2": pytest.approx(4 / 40),
    }
    result = json.loads((runs[0] / "evaluation" / "student.json").read_text())
    assert not [name for name in shares_by_measure("", result, in_detail=False) if ", " in name.removeprefix("ASR, ")]


def test_models_are_compared_run_by_run(runs: list[Path]) -> None:
    found = {item["measure"]: item for item in aggregate_runs(runs)["comparisons"]}
    deep = found["ASR, depth 4"]
    assert (deep["first"], deep["second"], deep["runs"], deep["n"]) == ("student", "aligned", 3, 40)
    assert deep["difference"] == pytest.approx(-32 / 40)
    assert deep["low"] < deep["difference"] < deep["high"] < -0.5
    assert found["utility"]["low"] < found["utility"]["difference"] < 0.0 < found["utility"]["high"]


def test_the_tables_fit_a_terminal(runs: list[Path]) -> None:
    tables = run_tables(aggregate_runs(runs))
    assert [title for title, _ in tables] == [
        "aligned, 3 runs (train.seed 0, 1, 2)",
        "student, 3 runs (train.seed 0, 1, 2)",
        "student - aligned, points, same prompts",
    ]
    assert [row[0] for row in tables[0][1]][4:8] == ["decoding", "- worst of n", "rank_assisted_prefill", "- top-2"]
    for _, rows in tables:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        assert sum(widths) + 3 * len(widths) + 1 <= 80


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"seed": 1, "steps": 90}}, "train.steps is 60 in .*run-0 and 90 in .*run-1"),
        ({"method": {"weights": {"anchor": 4}}}, "method.weights.anchor is None in .* and 4 in"),
        ({"train": {"seed": 0, "steps": 60}}, "the same train.seed, 0"),
    ],
)
def test_other_differences_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    runs = [a_run(tmp_path, 0), a_run(tmp_path, 1, **settings)]
    with pytest.raises(ConfigError, match=words) as refused:
        report(runs)
    assert "--allow-differences" in str(refused.value)
    assert refused.value.exit_code == 2
    assert list(tmp_path.glob("*.json")) == [], "nothing is written"
    assert aggregate_runs(runs, allow_differences=True)["rates"]


def test_a_key_without_a_value_that_an_earlier_version_did_not_know_is_no_difference(tmp_path: Path) -> None:
    sources = {"train": {"harmful": [{"path": "prompts.csv", "where": {"kind": 1}}]}}
    newer = {"train": {"harmful": [{"path": "prompts.csv", "where": {"kind": 1}, "max_characters": None}]}}
    assert aggregate_runs([a_run(tmp_path, 0, data=sources), a_run(tmp_path, 1, data=newer)])["rates"]
    newer["train"]["harmful"][0]["max_characters"] = 9  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"data\.train\.harmful"):
        aggregate_runs([a_run(tmp_path, 2, data=sources), a_run(tmp_path, 3, data=newer)])


def test_another_judge_or_evaluation_is_a_difference(runs: list[Path]) -> None:
    summary = json.loads((runs[1] / "summary.json").read_text())
    write_json(runs[1] / "summary.json", summary | {"judge": "model", "evaluation": {"num_prompts": 40, "depths": [0]}})
    found = aggregate_runs(runs, allow_differences=True)["differences"]
    assert [said.split(" is ")[0] for said in found] == ["evaluation.depths", "judge"]


@pytest.mark.parametrize(
    "change",
    [{"judge": "model"}, {"settings": {"num_prompts": 40, "depths": [0], "temperature": 0.0}}],
    ids=["another judge", "other settings"],
)
def test_a_result_of_another_evaluation_than_the_summary_s_is_left_out(
    runs: list[Path], change: dict[str, Any]
) -> None:
    """It was cut off between this file and the summary."""
    path = runs[1] / "evaluation" / "student.json"
    write_json(path, json.loads(path.read_text()) | change)
    assert set(aggregate_runs(runs)["rates"]["utility"]) == {"aligned"}
    write_json(path, json.loads(path.read_text()) | {"judge": "patterns", "settings": {**SETTINGS, "temperature": 0.0}})
    assert set(aggregate_runs(runs)["rates"]["utility"]) == {"aligned", "student"}


def test_folders_that_cannot_be_taken_together(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        aggregate_runs([runs[0], runs[0]])
    (runs[1] / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml"):
        aggregate_runs(runs)
    with pytest.raises(ConfigError, match="for several runs"):
        report(runs[:1], output=tmp_path / "out.json")


def test_a_depth_that_no_answer_reaches_is_left_out(runs: list[Path]) -> None:
    before = aggregate_runs(runs)
    for run in runs:
        for role in ("aligned", "student"):
            path = run / "evaluation" / f"{role}.json"
            result = json.loads(path.read_text())
            result["by_prompt"]["prefill-100"] = {}
            write_json(path, result)
    assert aggregate_runs(runs) == before


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, 0), a_run(tmp_path, 1)]
    path = runs[1] / "evaluation" / "student.json"
    result = json.loads(path.read_text())
    result["by_prompt"]["prefill-0"] = {"elsewhere": 1.0}
    write_json(path, result)
    with pytest.raises(DataError, match="same prompts"):
        aggregate_runs(runs)


def test_the_command_prints_and_writes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report(runs)
    assert path == tmp_path / "run-0-over-3-runs.json"
    assert json.loads(path.read_text())["rates"] == aggregate_runs(runs)["rates"]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "rank_assisted_prefill" in printed, "no name is cut or wrapped"
    assert "7.5 to 12.5" in printed
    assert write_aggregate(aggregate_runs(runs), tmp_path / "out" / "seeds.json").is_file()


def test_an_attack_that_takes_the_best_answer_has_the_rate_of_that(runs: list[Path]) -> None:
    block = {"n": 2, "trials": 20, "rate_is_worst": True, "by_behaviour": {"00": 0.1, "01": 0.0}}
    for path in (run / "evaluation" / "student.json" for run in runs):
        result = json.loads(path.read_text())
        write_json(path, result | {"attacks": result["attacks"] | {"soft_prompt": block}})
    found = aggregate_runs(runs)["rates"]["soft_prompt (worst of n)"]["student"]
    assert (found["rate"], found["n"]) == (0.5, 2)
    assert found == mean_over_runs([{"00": 1.0, "01": 0.0}] * 3)
