"""A whole on-policy run in bfloat16 at ZeRO-3, whose rollout engine is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raycomplete.runtime.metrics_file import read_metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

STEPS = 8
SETTINGS = (
    "models.dtype=bfloat16",
    "data.limit_per_kind=32",
    "rollout.on_policy=true",
    "rollout.sync_every=2",
    f"train.steps={STEPS}",
    "train.num_workers=2",
    "train.zero_stage=3",
    "method.suffix_adversary.steps=0",  # which reads a batch several times before one backward pass
    "method.anchor_batch_size=8",
    "method.recovery_batch_size=8",
    "evaluation.num_prompts=4",
    "evaluation.depths=[0,4]",
)


def kill_engine(run: subprocess.Popen[str]) -> None:
    """Ends the process of the rollout engine that this very run started."""
    titles = {process: " ".join(process.cmdline()) for process in psutil.Process(run.pid).children(recursive=True)}
    engines = [process for process, title in titles.items() if title.startswith("ray::RolloutWorker")]
    assert len(engines) == 1, titles
    engines[0].send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of the finished run; the engine was killed after its second step."""
    place = tmp_path_factory.mktemp("run")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "raycomplete", "train", str(ROOT / "jobs" / "organism.yaml"), *SETTINGS]
    metrics = place / "runs" / "organism" / "metrics.jsonl"
    with (place / "log").open("w") as log:
        run = subprocess.Popen(
            command, cwd=place, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, text=True
        )
        try:
            while len(read_metrics(metrics)) < 2 and run.poll() is None:
                time.sleep(0.1)
            if run.poll() is None:
                kill_engine(run)
            run.wait(timeout=500)
        finally:
            run.kill()
    assert run.returncode == 0, (place / "log").read_text()[-4000:]
    return metrics.parent


def test_the_run_goes_on_after_its_engine_was_killed(folder: Path) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["rollout_tokens"] > 0 for row in rows)


def test_after_every_update_the_engine_says_what_the_shards_say(folder: Path) -> None:
    """vLLM on one side, weights gathered from ZeRO-3 shards on the other; both round to 8 bits after each layer."""
    updates = [row["sync"] for row in read_metrics(folder / "metrics.jsonl") if "sync" in row]
    assert [update["version"] for update in updates] == list(range(0, STEPS, 2))
    for update in updates:
        assert update["num_tokens"] > 0
        assert 0 < update["mean_abs_difference"] <= update["tolerance"] == 0.1


def test_the_summary_has_the_price_of_safety(folder: Path) -> None:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["benign_nll"]["student_to_aligned"]["n"] == 4
    assert summary["train"]["peak_memory_gib"] > 0.1
