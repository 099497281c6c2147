import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raycomplete.report.html import write_report
from raycomplete.runtime.errors import DataError
from tests.report.conftest import a_rate

FIGURES = ("rates", "attacks", "prefill_depth", "outcomes", "position_profile", "training", "steering", "depth_sampler")
VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Text, sources and the balance of tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_whole_run(written_run: Path) -> None:
    path = written_run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert re.search(r"https?://|@import|url\(", text) is None
    assert "synthetic <run> & co" in page.text  # escaped in the source
    assert "<run>" not in text
    for words in (
        "refusal-patterns-v4",
        "The judge on traps",
        "told by a sentence encoder",
        "84.0 % fewer than aligned",
        "aligned 82.0 %",
        "ray 2.60.0",
        "train.steps 120",
        "Over-refusal, xstest_prompts",
        "Benign answers, negative log-likelihood in nats a token 0.421 0.389 to 0.455, n = 50",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " "), words
    assert "depth 64: 7 of 107" in page.text
    assert "reduced" not in page.text
    assert "sha256:student" in page.text
    assert sorted(file.name for file in written_run.glob("**/.*")) == []  # no unfinished files


@pytest.mark.parametrize("name", FIGURES)
def test_figures_and_their_data(written_run: Path, name: str) -> None:
    picture = (written_run / "figures" / f"{name}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000
    with (written_run / "figures" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert len(rows) > 2
    assert {len(row) for row in rows} == {len(rows[0])}


def test_missing_parts_are_named(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "profile.json").unlink()
    (run_folder / "config.yaml").unlink()
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert "no metrics.jsonl" in page.text
    assert "raycomplete diagnose" in page.text
    assert len(page.sources) == 4


def test_only_a_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"name": "bare"}))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.sources == []
    assert "No model of this run has been evaluated." in page.text
    assert "recorded no versions" in page.text


def test_diagnosis_of_one_model(run_folder: Path) -> None:
    """Only the aligned model was evaluated and profiled, and the summary holds no rates."""
    for role in ("base", "student"):
        (run_folder / "evaluation" / f"{role}.json").unlink()
    (run_folder / "summary.json").write_text(json.dumps({}))
    profile = json.loads((run_folder / "profile.json").read_text())
    del profile["student"]
    profile["aligned"]["kl_to_base"][-1] = None
    (run_folder / "profile.json").write_text(json.dumps(profile))
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert len(page.sources) == len(FIGURES)
    assert run_folder.name in page.text


def test_reduced_settings_are_labelled(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    short = {"aligned": ["answers of 40 tokens instead of 256 (9 of 90 cut)"], "student": []}
    summary["attacks"] = {
        "gcg": {
            role: {"mean": a_rate(5, 10), "worst_of_n": a_rate(5, 10), "reduced_because": ["steps 5 instead of 500"]}
            for role in short
        }
    }
    summary["reduced_because"] = {"benign": short}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    words = f"gcg: aligned, student: steps 5 instead of 500; benign: aligned: {short['aligned'][0]}"
    assert f"reduced {words}: not comparable with published runs." in page.text


def test_safety_regressions_stand_at_the_top(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["safety_regressions"] = ["student refuses 90.0 % of harmless prompts & more."]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert page.text.index("refuses 90.0 % of harmless prompts & more.") < page.text.index("Rates")


def test_terms_and_measures_are_those_that_the_run_names(run_folder: Path) -> None:
    """A method and an attack from outside the package are shown without their code."""
    terms = {name: {"label": f"my {name}", "description": f"what {name} is", "metrics": {}} for name in "abcdefgh"}
    terms["a"]["metrics"] = {"my_measure": "a <measure> of its own"}
    rows = [{"step": step, "loss": 2.0, "my_measure": step / 4, **dict.fromkeys(terms, 0.5)} for step in (1, 2)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_folder / "training.json").write_text(json.dumps({"terms": terms}))
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["attacks"] = {"my_attack": {"student": {"mean": a_rate(5, 10), "worst_of_n": a_rate(7, 10)}}}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert "my_measure a <measure> of its own 0.25 0.5" in page.text
    assert "h what h is 0.5 0.5" in page.text
    with (run_folder / "figures" / "training.csv").open(encoding="utf-8", newline="") as stream:
        assert next(csv.reader(stream)) == ["step", "loss", *terms, "my_measure"]
    assert "my_attack" in (run_folder / "figures" / "attacks.csv").read_text()


def test_torn_metrics(run_folder: Path) -> None:
    """A torn last line and a loss that is not finite do no harm."""
    rows = [{"step": 1, "loss": 9.0, "anchor": 1.0}, {"step": 2, "loss": 7.0, "anchor": float("nan")}]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    page = Page(write_report(run_folder).read_text(encoding="utf-8"))
    assert (run_folder / "figures" / "training.csv").read_text() == "step,loss,anchor\n1,9,1\n2,7,\n"
    assert "No step of this run recorded its depth sampler." in page.text


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no summary\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a mapping"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
