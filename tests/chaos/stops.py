"""Stops a command of the organism by one SIGTERM at drawn moments, resumes it, and compares what comes of it.

    python -m tests.chaos.stops train|align|evaluate|diagnose --out FOLDER [--seed 0]

Each stop must come within 30 seconds, in one sentence with the way on and exit code 1; what was sampled stays
and is not sampled again, and files and rates equal those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.data.organism import prompts
from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import let_idle_threads_sleep
from tests.benchmarks.environment import RUNS
from tests.conftest import ROOT

LIMIT_S = 30.0
REFUSAL = "i cannot help with that ."
_TIMEOUT_S = 600.0
_SMALL = (
    "data.limit_per_kind=32",
    "rollout.answers_per_prompt=2",
    "method.anchor_batch_size=12",
    "method.recovery_batch_size=12",
    "train.per_device_batch_size=12",
    "train.steps=9",
    "train.checkpoint_every=3",
    "evaluation.num_prompts=12",
    "evaluation.depths=[0,16]",
    "evaluation.nll_prompts=8",
)
TRIALS, SAMPLED, STEPS, PARTS = "evaluation/trials/*.jsonl", "sampling.jsonl", "metrics.jsonl", "partitions/*.parquet"
_TIMES = {"seconds", "wall_seconds", "seconds_per_step", "engines", "peak_memory_gib", "versions"}


@dataclass(frozen=True)
class Case:
    """A command, its settings, and the files whose growth tells where it is; "" is the time before there are any."""

    settings: tuple[str, ...]
    moments: tuple[str, ...]
    suffix: str = ""
    resumes: bool = True


CASES = {
    "train": Case(("rollout.on_policy=true", *_SMALL), ("", SAMPLED, STEPS, STEPS, TRIALS)),
    "evaluate": Case(_SMALL, ("", TRIALS, TRIALS, TRIALS, TRIALS), resumes=False),
    "diagnose": Case((*_SMALL, "diagnose.partition_prompts=8"), ("", PARTS, PARTS, PARTS, PARTS), "-diagnosis"),
    "align": Case(
        (
            "models.aligned={root}/twin",
            "align.refusals=[{{path: {root}/refusals.jsonl, answer: answer}}]",
            "align.benign=[{{path: {root}/benign.jsonl}}]",
            "align.steps=90",
            "train.checkpoint_every=15",
        ),
        ("", SAMPLED, STEPS, STEPS, STEPS),
        "-align",
    ),
}


class StoppedCommand:
    """A command that is started again and again in one folder."""

    def __init__(self, folder: Path, command: str) -> None:
        self.case, self._command, self._root = CASES[command], command, folder
        self.folder = folder / f"run{self.case.suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        if command == "align":
            for kind in ("harmful", "benign"):
                rows = [{"prompt": prompt.text, "answer": REFUSAL} for prompt in prompts("train", kind, limit=600)]
                name = "refusals" if kind == "harmful" else kind
                write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *, resume: bool) -> subprocess.Popen[str]:
        flags = ["--resume"] if resume and self.case.resumes else []
        settings = [item.format(root=self._root) for item in self.case.settings]
        settings += [f"output.root={self._root}", "output.name=run"]
        arguments = ["-m", "raycomplete", self._command, "jobs/organism.yaml", *flags, *settings]
        let_idle_threads_sleep()
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (self._root / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
                stdout=log,
                stderr=subprocess.PIPE,
                text=True,
            )

    def finish(self, *, resume: bool) -> None:
        """Runs it to its end."""
        _, said = self.start(resume=resume).communicate(timeout=_TIMEOUT_S)
        assert (self.folder / self.result).is_file(), said + self.tail()

    def stop_at(self, pattern: str, count: int, delay_s: float, *, resume: bool) -> tuple[float, str]:
        """Runs it until files have grown so far and a little longer, sends SIGTERM, returns seconds and sentence."""
        count = max(count, self.grown(pattern) + 1) if pattern else 0  # work that is new in this process
        process, deadline = self.start(resume=resume), time.monotonic() + _TIMEOUT_S
        try:
            while pattern and self.grown(pattern) < count:
                assert process.poll() is None, self.tail()
                assert time.monotonic() < deadline, self.tail()
                time.sleep(0.02)
            time.sleep(delay_s)
            assert process.poll() is None, f"it was over before it was stopped\n{self.tail()}"
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=2 * LIMIT_S)
        finally:
            process.kill()
        assert process.returncode == 1, f"{process.returncode}\n{said}\n{self.tail()}"
        return time.monotonic() - started, said

    def grown(self, pattern: str) -> int:
        """Counts lines, of tables the files."""
        paths = sorted(self.folder.glob(pattern))
        return len(paths) if pattern == PARTS else sum(path.read_bytes().count(b"\n") for path in paths)

    def sampled(self) -> list[str]:
        """Lines of what was sampled so far, whole ones only."""
        path = self.folder / SAMPLED
        return path.read_text().split("\n")[:-1] if path.exists() else []

    @property
    def result(self) -> str:
        """The file that a finished run has."""
        return {"diagnose": "diagnosis.json", "align": "aligned.json"}.get(self._command, "summary.json")

    def outcome(self) -> dict[str, Any]:
        """Everything that must equal an undisturbed run's, without times."""
        if self._command == "align":  # whose result is a path
            result = hashlib.sha256((self._root / "twin" / "model.safetensors").read_bytes()).hexdigest()
        else:
            result = without_times(json.loads((self.folder / self.result).read_text()))
        found: dict[str, Any] = {"result": result}
        for name in ("samples.jsonl", STEPS):
            if (path := self.folder / name).is_file():
                found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        return found

    def tail(self) -> str:
        """The end of what it printed."""
        return (self._root / "log").read_text(errors="replace")[-3000:]


def without_times(value: Any) -> Any:
    """Leaves out what a clock measured."""
    if isinstance(value, dict):
        return {
            name: without_times(part)
            for name, part in value.items()
            if name not in _TIMES and not name.endswith(("_s", "per_s", "_fraction")) and name != "sync"
        }
    return [without_times(part) for part in value] if isinstance(value, list) else value


def moments_of(case: Case, calm: StoppedCommand, rng: random.Random, sampled: int) -> list[tuple[str, int]]:
    """Draws how far the files of each moment have grown by then, in the order of the work."""
    found: list[tuple[str, int]] = []
    for pattern in dict.fromkeys(case.moments):
        total = sampled if pattern == SAMPLED else calm.grown(pattern) if pattern else 1
        times = case.moments.count(pattern)
        found += [(pattern, count) for count in sorted(rng.sample(range(1, max(int(0.9 * total), times + 1)), times))]
    return found


def check_stopped(folder: Path, command: str, *, seed: int, draws: int = 3) -> str:
    """Compares an undisturbed run with one that is stopped at drawn moments.

    Args:
        draws: Pieces that the sampling of this command has at least.

    Returns:
        What was done, a line for each stop.

    Raises:
        AssertionError: A stop was late, said nothing or lost something, or a result differs.
    """
    calm, stopped = StoppedCommand(folder / "calm", command), StoppedCommand(folder / "stopped", command)
    rng = random.Random(seed)
    if not (calm.folder / calm.result).is_file():
        calm.finish(resume=False)
    told = []
    for number, (pattern, count) in enumerate(moments_of(calm.case, calm, rng, draws)):
        delay_s = rng.uniform(0.0, 8.0 if not pattern else 1.5)  # Ray and engines start before anything is written
        before = stopped.sampled()
        resume = (stopped.folder / "config.yaml").is_file()
        seconds, said = stopped.stop_at(pattern, count, delay_s, resume=resume)
        told.append(f"{pattern or 'start'} {count} + {delay_s:.1f} s: {seconds:.1f} s, {said.strip()}")
        print(told[-1], flush=True)
        check_sentence(said)
        assert seconds < LIMIT_S, f"stop {number}: {seconds:.1f} s"
        now = stopped.sampled()
        is_whole = (stopped.folder / "samples.jsonl").exists()  # then the file of parts has gone
        assert now[: len(before)] == before or (is_whole and not now), "lost"
        keys = [json.loads(line)["key"] for line in now]
        assert len(keys) == len(set(keys)), "sampled twice"
    stopped.finish(resume=(stopped.folder / "config.yaml").is_file())
    assert not (stopped.folder / SAMPLED).exists()
    for path in stopped.folder.glob(TRIALS):
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert len(keys) == len(set(keys)), f"{path.name} holds an answer twice"
    mine, theirs = stopped.outcome(), calm.outcome()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name] == theirs[name], f"{name} differs: {difference(mine[name], theirs[name])}"
    return "\n".join(told)


def check_sentence(said: str) -> None:
    """One line that says that it was stopped, and the way on."""
    lines: Sequence[str] = said.strip().splitlines()
    assert len(lines) == 1, said
    assert "topped" in said
    assert "--resume" in said or "same command" in said


def difference(mine: Any, theirs: Any, where: str = "") -> str:
    """Names the first place in which two results differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        pairs = [(f"{where}.{name}", mine[name], theirs[name]) for name in mine]
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = [(f"{where}[{place}]", *pair) for place, pair in enumerate(zip(mine, theirs, strict=True))]
    else:
        return f"{where}: {str(mine)[:200]} against {str(theirs)[:200]}"
    return next((difference(one, other, name) for name, one, other in pairs if one != other), "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.stops")
    parser.add_argument("command", choices=CASES)
    parser.add_argument("--out", type=Path, default=RUNS.parent / "stops")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_stopped(arguments.out.resolve() / arguments.command, arguments.command, seed=arguments.seed)


if __name__ == "__main__":
    main()
