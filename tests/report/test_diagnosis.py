"""The report of a diagnosis, alone and beside a run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from raycomplete.report.html import write_report
from tests.report.conftest import a_diagnosis
from tests.report.test_report import FIGURES, Page

DIAGNOSIS_FIGURES = ("diagnosis_profile", "diagnosis_behaviour", "diagnosis_control", "gradient_signal")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_diagnosis_alone(diagnosis_folder: Path) -> None:
    text = write_report(diagnosis_folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == len(DIAGNOSIS_FIGURES)
    assert "No model of this run has been evaluated" not in page.text  # nothing of a run is missing
    for words in (
        "synthetic-diagnosis",
        "> 199",  # the student's deficit never exceeds the threshold
        "aligned 1 (1 to 2)",
        "halves of the prompts: beyond and 170",
        "60 measured of 64",
    ):
        assert words in page.text, words
    assert "••• <b>" in page.text  # escaped in the source
    assert "<b>" not in text
    for name in DIAGNOSIS_FIGURES:
        assert (diagnosis_folder / "figures" / f"{name}.png").stat().st_size > 10_000

    rows = rows_of(diagnosis_folder / "figures" / "diagnosis_profile.csv")
    assert len(rows) == 2 * 3 * 200
    first = next(row for row in rows if (row["role"], row["metric"]) == ("aligned", "kl_to_base"))
    assert first == {
        "role": "aligned", "metric": "kl_to_base", "position": "0",
        "mean": "2.55", "low": "2.5", "high": "2.6", "n": "60",
    }  # fmt: skip
    tokens = rows_of(diagnosis_folder / "figures" / "base_favored_tokens.csv")
    assert [(row["kind"], row["first"], row["last"], row["token"]) for row in tokens] == [
        ("harmful", "0", "0", " sure\n"),
        ("harmful", "1", "3", ""),
        ("benign", "0", "0", " sure\n"),
    ]

    assert (diagnosis_folder / "report.html").stat().st_mode & 0o777 == 0o644


def test_without_student_gradient_or_control_and_with_harmful_text(diagnosis_folder: Path) -> None:
    diagnosis = a_diagnosis(num_positions=1, roles=("aligned",))
    diagnosis["settings"]["show_harmful"] = True
    diagnosis["gradient"] = None
    diagnosis["refusal_tokens"] = []
    diagnosis["kinds"]["benign"] |= {"profile": {}, "completion_depth": {}, "measured": 0}
    (diagnosis_folder / "diagnosis.json").write_text(json.dumps(diagnosis))
    page = Page(write_report(diagnosis_folder).read_text(encoding="utf-8"))
    assert len(page.sources) == 2
    assert "No benign prompt was measured." in page.text
    assert "diagnose.gradient is off" in page.text
    assert "none found" in page.text
    for file in ("report.html", "figures/base_favored_tokens.csv"):  # which now hold harmful text
        assert (diagnosis_folder / file).stat().st_mode & 0o777 == 0o600


def test_a_run_shows_the_diagnosis_beside_it(run_folder: Path, tmp_path: Path) -> None:
    """runs/x and runs/x-diagnosis share one page."""
    run = tmp_path / "runs" / "x"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("runs"))
    beside = run.with_name("x-diagnosis")
    beside.mkdir()
    (beside / "diagnosis.json").write_text(json.dumps(a_diagnosis()))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert len(page.sources) == len(FIGURES) + len(DIAGNOSIS_FIGURES)
