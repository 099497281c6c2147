"""Inputs and the engine: told answers for what is wrong, real ones for what works."""

from __future__ import annotations

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor import run_file
from raycomplete.doctor.findings import ChildReport, Context
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"


def context(*overrides: str) -> Context:
    return Context(RUN_FILE, load_run_file(RUN_FILE, overrides))


@pytest.mark.slow
def test_a_real_engine_reads_what_it_wrote() -> None:
    finding = run_file.check_engine(context("cluster.use_gpu=never"))
    assert finding.status == "ok", finding
    assert len(finding.values["tokens"]) >= 2


def test_an_engine_that_disagrees_with_itself_is_a_failure() -> None:
    times = {"import_s": 1.0, "pooling_s": 1.0, "generate_s": 1.0, "peak_bytes": 1}
    wrong = run_file.engine_finding(ChildReport([{"tokens": [1, 2], "pooled": [1, 3], **times}]), "cpu")
    assert wrong.status == "fail"
    killed = run_file.engine_finding(ChildReport([{"begins": "generating"}], -9), "cpu")
    assert "vLLM failed at generating (killed by SIGKILL)" in killed.found
    assert killed.remedy


def test_inputs_are_read_as_a_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    good = context("data.limit_per_kind=8", "evaluation.num_prompts=8")
    assert "211 tokens" in run_file.check_checkpoints(good).found
    assert run_file.check_prompts(good).found.startswith("8 harmful to train on")
    missing = context("models.base=/nowhere")
    finding = run_file.check_checkpoints(missing)
    assert (finding.status, "there is no checkpoint at '/nowhere'" in finding.found) == ("fail", True)
    unfetched = run_file.check_checkpoints(context("models.base=hub:org/name"))
    assert (unfetched.status, "hub:org/name" in unfetched.found) == ("warn", True)
