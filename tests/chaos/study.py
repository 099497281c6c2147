"""Ends a small study at drawn moments, resumes it, and compares its table with an undisturbed one's.

    python -m tests.chaos.study --out FOLDER [--seed 0] [--stop]

It is killed three times, or, with `--stop`, told to stop by SIGTERM five times: then it must say so within 30 seconds.

A method of a plugin is among the runs. Takes ten minutes and more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.processes import kill
from tests.chaos.stops import LIMIT_S
from tests.config.test_study import PLUGIN, study_file
from tests.conftest import ROOT

TINY = """
    settings:
      data: {limit_per_kind: 24}
      train: {steps: 4, checkpoint_every: 2, warmup_steps: 1, validation: {every: 2}}
      rollout: {refusal_prefix_fraction: 0}
      method: {anchor_batch_size: 6, recovery_batch_size: 6}
      evaluation: {num_prompts: 6, depths: [0, 4], nll_prompts: 2, attacks: [prefill]}
    plugins: [mine.py]
    methods: {completion: , refusals_of_a_plugin: {train: {lr: 0.002}}}
    defences: {again: {name: re_ask, every: 8}}
    output: {name: tiny}
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "raycomplete", "study", "study.yaml", "--resume"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
            stdout=log,
            stderr=log,
        )


def kill_whole(process: subprocess.Popen[bytes]) -> None:
    """Kills a study; its runs must follow by themselves, and its cluster is ended where it does not."""
    driver = psutil.Process(process.pid)
    started = driver.children(recursive=True)
    runs = [child for child in driver.children() if "train" in child.cmdline()]
    kill([driver])
    process.wait(timeout=30)
    _, left = psutil.wait_procs(started, timeout=20)
    left = [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not set(left) & set(runs), "a run of a killed study still runs"
    kill(left)


def stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """Sends SIGTERM to a study, which must end in time, with exit code 1 and the way on."""
    started = time.monotonic()
    process.terminate()
    assert process.wait(timeout=2 * LIMIT_S) == 1, log.read_text()[-3000:]
    seconds, said = time.monotonic() - started, log.read_text().strip().splitlines()[-1]
    print(f"{seconds:.1f} s, {said}", flush=True)
    assert seconds < LIMIT_S
    assert "stop" in said.lower()
    assert "--resume" in said


def timeless(value: Any) -> Any:
    """The table without what was measured by the clock."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name != "cost"}
    return value


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ended(out: Path, seed: int, *, stopped: bool) -> None:
    """Compares an undisturbed study with one that is killed at three drawn moments, or stopped at five.

    Raises:
        AssertionError: The tables differ, or something was done twice.
    """
    rng = random.Random(seed)
    calm, killed = out / "calm", out / ("stopped" if stopped else "killed")
    for folder in (calm, killed):
        folder.mkdir(parents=True)
        study_file(folder, TINY)
        (folder / "mine.py").write_text(PLUGIN)
    begun = time.monotonic()
    assert start(calm).wait(timeout=1200) == 0, (calm / "log").read_text()[-3000:]
    seconds = time.monotonic() - begun
    ended = 0
    for moment in sorted(rng.uniform(0.05 if stopped else 0.15, 0.8) for _ in range(5 if stopped else 3)):
        process = start(killed)
        try:
            process.wait(timeout=0.6 * moment * seconds)
        except subprocess.TimeoutExpired:
            ended += 1
            if stopped:
                stop(process, killed / "log")
            else:
                kill_whole(process)
        finished = {path: path.read_bytes() for path in killed.glob("runs/tiny/organism/*/summary.json")}
    print(f"ended {ended} times before its end", flush=True)
    assert ended >= (4 if stopped else 2), "the study was over too soon to be ended"
    assert start(killed).wait(timeout=1800) == 0, (killed / "log").read_text()[-3000:]

    for path, content in finished.items():
        assert path.read_bytes() == content, f"{path} was made again"
    tables = [json.loads((folder / "runs" / "tiny" / "study.json").read_text()) for folder in (calm, killed)]
    assert timeless(tables[0]) == timeless(tables[1])
    assert "refusals_of_a_plugin" in tables[0]["models"]["organism"]["rows"]
    for run in (killed / "runs" / "tiny" / "organism").iterdir():
        for store in (*run.glob("evaluation/trials/*.jsonl"), *run.glob("evaluation/judgements/*.jsonl")):
            keys = [row["key"] for row in rows_of(store)]
            assert len(keys) == len(set(keys)), f"{store} holds an answer twice"
        if (run / "metrics.jsonl").exists():
            assert [row["step"] for row in rows_of(run / "metrics.jsonl")] == [1, 2, 3, 4]
    first, second = (
        killed / "runs" / "tiny" / "organism" / f"{name}-seed0" for name in ("completion", "refusals_of_a_plugin")
    )
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    logs = {path.name: path.read_text() for path in (killed / "runs" / "tiny" / "logs").iterdir()}
    sampled = [name for name, text in logs.items() if "compliant continuations" in text]
    assert sampled == ["organism-completion-seed0.log"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.study")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="SIGTERM in place of a kill")
    arguments = parser.parse_args()
    check_ended(arguments.out.resolve(), arguments.seed, stopped=arguments.stop)


if __name__ == "__main__":
    main()
