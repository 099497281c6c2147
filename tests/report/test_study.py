"""The table and figures of a study, from the folders of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config.study import FROZEN, Study, load_study
from raycomplete.evaluation.statistics import difference_over_runs, mean_over_runs
from raycomplete.methods.rivals.door import DOOR
from raycomplete.report.study import MEAN_OVER_ATTACKS, _shares, study_results, write_study
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import write_json
from raycomplete.runtime.types import Outcome
from tests.config.test_study import study_file

N = 20
NAMES = [f"{number:02}" for number in range(N)]
FILE = """
    methods: {completion: , npo: , door: }
    defences: {again: {name: re_ask}}
    seeds: [0, 1]
    output: {name: side-by-side}
"""


def first(count: int) -> dict[str, float]:
    """The shares of prompts of which the first few count."""
    return {name: float(number < count) for number, name in enumerate(NAMES)}


def a_result(role: str, shallow: int, deep: int, ranked: int, refused: int, seconds: float = 1.0) -> dict[str, Any]:
    """evaluation/<role>.json of a model that so many prompts get the better of."""
    prefill = {name: (first(shallow)[name] + first(deep)[name]) / 2 for name in NAMES}
    outcomes = {str(outcome): 0 for outcome in Outcome} | {"incoherent": 4, "refused": 2 * N - 4}
    said = {"seconds": seconds, "tokens": 100}
    return {
        "role": role,
        "attacks": {
            "prefill": {"n": N, "trials": 2 * N, "by_behaviour": prefill, "outcomes": outcomes},
            "rank_assisted_prefill": {"n": 10, "trials": 10, "by_behaviour": {k: first(ranked)[k] for k in NAMES[:10]}},
        },
        "by_prompt": {
            "prefill-0": first(shallow),
            "prefill-4": first(deep),
            "utility": first(N),
            "over_refusal": first(refused),
            "benign_refusal": first(0),
        },
        "variants": {"benign": said, "borderline": said},
    }


def finish(study: Study, results: dict[tuple[str, int | None], tuple[int, ...]], judge: str = "patterns") -> None:
    """Writes the folders of all runs."""
    for run in study.runs:
        folder = run.config.output.folder
        train: dict[str, Any] = {"steps": 7, "seconds": 30.0, "tokens": 1000} if run.trains else {}
        if run.label == "completion":  # whose held-back prompts choose a step
            train["kept_step"] = {"step": 4 + (run.seed or 0)}
        write_json(folder / "summary.json", {"judge": judge, "asr": {}, "train": train})
        if run.label == FROZEN:
            write_json(folder / "evaluation" / "base.json", a_result("base", N, N, 10, 0))
            write_json(folder / "evaluation" / "aligned.json", a_result("aligned", 0, N, 10, 1))
        else:
            seconds = 3.0 if run.label == "again" else 1.0
            result = a_result("student", *results[run.label, run.seed], seconds=seconds)
            defence = {"defence": {"passes_per_token": 2.5}} if run.label == "again" else {}
            write_json(folder / "evaluation" / "student.json", result | defence)


RESULTS: dict[tuple[str, int | None], tuple[int, ...]] = {
    ("completion", 0): (0, 2, 1, 1),
    ("completion", 1): (0, 4, 1, 1),
    ("npo", 0): (0, 10, 5, 1),
    ("npo", 1): (0, 12, 5, 1),
    ("door", 0): (0, 0, 0, 15),  # the safest, and it refuses most harmless prompts
    ("door", 1): (0, 0, 0, 15),
    ("again", None): (0, 8, 6, 1),
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    return load_study(study_file(tmp_path, FILE))


def test_rates_and_differences_are_over_prompts_and_seeds(study: Study) -> None:
    finish(study, RESULTS)
    rows = study_results(study, study.runs)["models"]["organism"]["rows"]
    assert list(rows) == ["base", "aligned", "completion", "npo", "door", "again"]
    deep = rows["completion"]["rates"]["ASR, depth 4"]
    assert deep == mean_over_runs([first(2), first(4)])
    against = rows["completion"]["against_aligned"]["ASR, depth 4"]
    assert against == difference_over_runs([first(2), first(4)], [first(N), first(N)])
    # A defence draws nothing and has one run, which stands against every run of the others.
    assert rows["again"]["against_aligned"]["ASR, depth 4"] == difference_over_runs([first(8)], [first(N)])
    # Over attacks, on the ten prompts that both asked: (0 + 10 / 10) / 2 and 10 / 10 for aligned.
    assert rows["aligned"]["rates"][MEAN_OVER_ATTACKS]["rate"] == pytest.approx(0.75)
    assert rows["aligned"]["rates"][MEAN_OVER_ATTACKS]["n"] == 10


def test_the_mean_over_attacks_takes_each_at_its_own_rate(tmp_path: Path) -> None:
    result = a_result("student", 0, 0, 0, 0)
    soft = {"n": 2, "trials": 20, "rate_is_worst": True, "by_behaviour": {"00": 0.1, "01": 0.0}}
    result["attacks"] = {"rank_assisted_prefill": result["attacks"]["rank_assisted_prefill"], "soft_prompt": soft}
    assert _shares(tmp_path, result)[MEAN_OVER_ATTACKS] == ({"00": 0.5, "01": 0.0}, 1)


def test_the_best_rival_refuses_as_little_as_the_reference(study: Study) -> None:
    finish(study, RESULTS)
    rows = study_results(study, study.runs)["models"]["organism"]["rows"]
    best, against = rows["completion"]["best_rival"], rows["completion"]["against_rivals"]
    assert best["ASR, depth 4"] == "again"  # npo gives in more often, door refuses 75 % of harmless prompts
    assert best["rank_assisted_prefill"] == "npo"
    assert best.keys() == {"ASR, mean over attacks", "ASR, depth 0", "ASR, depth 4", "ASR, mean over depths"} | {
        "rank_assisted_prefill"
    }
    assert against["again"]["ASR, depth 4"] == difference_over_runs([first(2), first(4)], [first(8), first(8)])
    assert against["door"]["over-refusal"] == difference_over_runs([first(1), first(1)], [first(15), first(15)])
    assert "best_rival" not in rows["npo"]


def test_rows_are_paired_by_seed(study: Study) -> None:
    finish(study, RESULTS)

    def rows_without(*missing: tuple[str, int]) -> dict[str, Any]:
        finished = [run for run in study.runs if (run.label, run.seed) not in missing and run.label != "again"]
        rows: dict[str, Any] = study_results(study, finished)["models"]["organism"]["rows"]
        return rows

    against = rows_without(("npo", 0))["completion"]["against_rivals"]["npo"]["ASR, depth 4"]
    assert against == difference_over_runs([first(4)], [first(12)])
    ours = rows_without(("completion", 1), ("npo", 0))["completion"]
    assert "npo" not in ours["against_rivals"], "no seed that both have"
    assert ours["best_rival"] == {}, "door refuses too much"


def test_the_time_of_a_token_is_told_only_where_it_means_something(study: Study, tmp_path: Path) -> None:
    finish(study, RESULTS)
    assert study.config.parallel is None
    rows = study_results(study, study.runs)["models"]["organism"]["rows"]
    assert rows["completion"]["cost"]["seconds_per_token"] is None
    pair = load_study(study_file(tmp_path, FILE.replace("re_ask", "contrastive")), ["parallel=1"])
    rows = study_results(pair, pair.runs)["models"]["organism"]["rows"]
    assert rows["completion"]["cost"]["seconds_per_token"] == pytest.approx(1.0)
    assert rows["again"]["cost"]["seconds_per_token"] is None


def test_costs_are_training_seconds_and_the_time_of_a_token(study: Study, tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, FILE), ["parallel=1"])
    finish(study, RESULTS)
    rows = study_results(study, study.runs)["models"]["organism"]["rows"]
    assert rows["completion"]["cost"]["train_seconds"] == 30.0
    assert rows["completion"]["cost"]["seconds_per_token"] == pytest.approx(1.0)
    assert rows["again"]["cost"]["seconds_per_token"] == pytest.approx(3.0)
    assert rows["again"]["cost"]["passes_per_token"] == 2.5
    assert rows["again"]["cost"]["train_seconds"] == 0.0
    assert rows["completion"]["apart"] == pytest.approx(4 / 40)
    assert rows["completion"]["cost"]["kept_steps"] == [4, 5]
    assert rows["npo"]["cost"]["kept_steps"] == [7, 7]


def test_the_pages_hold_every_method_and_say_what_is_missing(study: Study) -> None:
    finish(study, RESULTS)
    tables = write_study(study, study.runs[:-1])
    found = json.loads((study.folder / "study.json").read_text())
    assert list(found["models"]["organism"]["rows"]) == ["base", "aligned", "completion", "npo", "door"]
    for name in ("study.md", "study.html"):
        text = (study.folder / name).read_text()
        for words in ("npo", "train.lr 0.001 instead of 1e-05", "organism, again", "15.0 %", "best rival", "4, 5"):
            assert words in text, (name, words)
    assert f"- door: {'; '.join(DOOR.departures)}; method." in (study.folder / "study.md").read_text()
    for figure in ("pareto", "depths", "cost"):
        assert (study.folder / "figures" / f"organism-{figure}.png").stat().st_size > 5000
        assert (study.folder / "figures" / f"organism-{figure}.csv").read_text().count("\n") >= 4
    curve = (study.folder / "figures" / "organism-depths.csv").read_text().splitlines()
    assert curve[0] == "method,depth,asr,low,high,n"
    assert any(line.startswith("completion,4,0.15,") for line in curve)
    assert tables[0][0].startswith("organism: rates")


def test_what_is_reduced_names_the_rows_of_which_it_is_true(study: Study) -> None:
    finish(study, RESULTS)
    fewer, cut = "20 prompts instead of 100", "answers of 40 tokens instead of 256 ({} of 20 cut)"
    for number, run in enumerate(study.runs):
        reasons = [fewer, cut.format(number)] if run.label == "door" else [fewer]
        roles = ("base", "aligned") if run.label == FROZEN else ("student",)
        path = run.config.output.folder / "summary.json"
        attacks = {"gcg": {role: {"reduced_because": reasons} for role in roles}}
        write_json(path, json.loads(path.read_text()) | {"attacks": attacks})
    found = study_results(study, study.runs)["models"]["organism"]
    assert found["reduced"] == [("gcg", f"{fewer}; door: answers of 40 tokens instead of 256, some cut")]


def test_the_front_of_the_figure_holds_what_nothing_beats(study: Study) -> None:
    finish(study, RESULTS)
    write_study(study, study.runs)
    rows = [line.split(",") for line in (study.folder / "figures" / "organism-pareto.csv").read_text().splitlines()]
    front = {row[0] for row in rows[1:] if row[-1] == "True"}
    assert front == {"completion", "door", "base"}  # base refuses least, door is attacked least


def test_judges_that_differ_are_refused(study: Study) -> None:
    finish(study, RESULTS)
    folder = study.runs[1].config.output.folder
    write_json(folder / "summary.json", {"judge": "another", "asr": {}, "train": {}})
    with pytest.raises(DataError, match=f"different judges.*another: {folder.name}.*--resume"):
        study_results(study, study.runs)


def test_attacks_without_a_common_prompt_have_no_mean(study: Study) -> None:
    finish(study, RESULTS)
    for path in study.folder.glob("organism/*/evaluation/*.json"):
        result = json.loads(path.read_text())
        result["attacks"]["rank_assisted_prefill"]["by_behaviour"] = {"elsewhere": 1.0}
        write_json(path, result)
    rows = study_results(study, study.runs)["models"]["organism"]["rows"]
    assert all(MEAN_OVER_ATTACKS not in row["rates"] for row in rows.values())
    assert rows["completion"]["rates"]["rank_assisted_prefill"]["rate"] == 1.0
    assert write_study(study, study.runs)
