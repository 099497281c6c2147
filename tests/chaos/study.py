"""Ends a small study at drawn moments, resumes it, and compares its table with an undisturbed one's.

    python -m tests.chaos.study --out FOLDER [--seed 0] [--stop]

It is killed three times, or, with `--stop`, told to stop by SIGTERM five times: then it must say so within 30 seconds.
A method of a plugin is among the runs. Takes ten minutes and more.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import psutil

from tests.chaos import driver
from tests.config.test_study import PLUGIN, study_file

TINY = """
    settings:
      data: {limit_per_kind: 24}
      train: {steps: 4, checkpoint_every: 2, warmup_steps: 1, validation: {every: 2}}
      rollout: {refusal_prefix_fraction: 0}
      method: {anchor_batch_size: 6, recovery_batch_size: 6}
      evaluation: {num_prompts: 6, depths: [0, 4], attacks: [prefill]}
    plugins: [mine.py]
    methods: {completion: , refusals_of_a_plugin: {train: {lr: 0.002}}}
    defences: {again: {name: re_ask, every: 8}}
    output: {name: tiny}
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return driver.start(["-m", "raycomplete", "study", "study.yaml", "--resume"], folder)


def kill_whole(process: subprocess.Popen[bytes]) -> None:
    """Kills a study; its runs must follow by themselves, and its cluster is ended where it does not."""
    runs = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
    assert not {*driver.kill_driver(process, 20.0)} & {*runs}, "a run of a killed study still runs"


def check_ended(out: Path, seed: int, *, stopped: bool) -> None:
    """Compares an undisturbed study with one that is killed at three drawn moments, or stopped at five."""
    rng = random.Random(seed)
    calm, killed = out / "calm", out / ("stopped" if stopped else "killed")
    for folder in (calm, killed):
        folder.mkdir(parents=True)
        study_file(folder, TINY)
        (folder / "mine.py").write_text(PLUGIN)
    begun = time.monotonic()
    driver.finish(start(calm), calm)
    seconds = time.monotonic() - begun
    ended, finished = 0, {}
    for moment in sorted(rng.uniform(0.05 if stopped else 0.15, 0.8) for _ in range(5 if stopped else 3)):
        process = start(killed)
        try:
            process.wait(timeout=0.6 * moment * seconds)
        except subprocess.TimeoutExpired:
            ended += 1
            if stopped:
                print(driver.stop(process, killed), flush=True)
            else:
                kill_whole(process)
        finished = {path: path.read_bytes() for path in killed.glob("runs/tiny/organism/*/summary.json")}
    print(f"ended {ended} times before its end", flush=True)
    assert ended >= (4 if stopped else 2), "the study was over too soon to be ended"
    driver.finish(start(killed), killed)

    for path, content in finished.items():
        assert path.read_bytes() == content, f"{path} was made again"
    tables = [json.loads((folder / "runs" / "tiny" / "study.json").read_text()) for folder in (killed, calm)]
    driver.check_equal(*map(driver.timeless, tables), where="study.json")
    assert "refusals_of_a_plugin" in tables[0]["models"]["organism"]["rows"]
    runs = killed / "runs" / "tiny" / "organism"
    for run in runs.iterdir():
        driver.check_nothing_twice(run)
        if (run / "metrics.jsonl").exists():
            assert [row["step"] for row in driver.rows_of(run / "metrics.jsonl")] == [1, 2, 3, 4]
    first, second = (runs / f"{name}-seed0" / "samples.jsonl" for name in ("completion", "refusals_of_a_plugin"))
    assert first.read_bytes() == second.read_bytes()
    logs = {path.name: path.read_text() for path in (killed / "runs" / "tiny" / "logs").iterdir()}
    sampled = [name for name, text in logs.items() if "compliant continuations" in text]
    assert sampled == ["organism-completion-seed0.log"]


if __name__ == "__main__":
    parser = driver.options("study", seed=0)
    parser.add_argument("--stop", action="store_true", help="SIGTERM in place of a kill")
    given = parser.parse_args()
    check_ended(given.out, given.seed, stopped=given.stop)
