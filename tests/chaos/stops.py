"""Stops a command of the organism by one SIGTERM at drawn moments, resumes it, and compares what comes of it.

    python -m tests.chaos.stops train|align|evaluate|diagnose --out FOLDER [--seed 0] [--kill]

Each stop must come within 30 seconds, in one sentence with the way on and exit code 1 (with `--kill` it is a SIGKILL);
what was sampled stays and is not sampled again, and files and rates equal those of a run that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.data.organism import prompts
from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import let_idle_threads_sleep
from tests.chaos import driver
from tests.conftest import ROOT

REFUSAL = "i cannot help with that ."
_SMALL = (
    "data.limit_per_kind=32",
    "method.anchor_batch_size=12",
    "method.recovery_batch_size=12",
    "train.per_device_batch_size=12",
    "train.steps=9",
    "train.checkpoint_every=3",
    "evaluation.num_prompts=12",
    "evaluation.depths=[0,16]",
)
_DRAWS = 3  # pieces that the sampling of a command has at least
TRIALS, SAMPLED, STEPS, PARTS = "evaluation/trials/*.jsonl", "sampling.jsonl", "metrics.jsonl", "batches/*.npz"


@dataclass(frozen=True)
class Case:
    """A command, its settings, and the files whose growth tells where it is; "" is the time before there are any."""

    settings: tuple[str, ...]
    moments: tuple[str, ...]
    suffix: str = ""
    resumes: bool = True
    result: str = "summary.json"


CASES = {
    "train": Case(("rollout.on_policy=true", *_SMALL), ("", SAMPLED, STEPS, STEPS, TRIALS)),
    "evaluate": Case(_SMALL, ("", TRIALS, TRIALS, TRIALS, TRIALS), resumes=False),
    "diagnose": Case((*_SMALL, "diagnose.num_prompts=150"), ("", *[PARTS] * 4), "-diagnosis", result="diagnosis.json"),
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
        result="aligned.json",
    ),
}


class StoppedCommand:
    """A command that is started again and again in one folder."""

    def __init__(self, root: Path, command: str) -> None:
        self.case, self._command, self.root = CASES[command], command, root
        self.folder = root / f"run{self.case.suffix}"
        root.mkdir(parents=True, exist_ok=True)
        if command == "align":
            for name, kind in (("refusals", "harmful"), ("benign", "benign")):
                rows = [{"prompt": prompt.text, "answer": REFUSAL} for prompt in prompts("train", kind, limit=600)]
                write_text(root / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the command, with `--resume` where there is a run already."""
        flags = ["--resume"] if self.case.resumes and (self.folder / "config.yaml").is_file() else []
        settings = [item.format(root=self.root) for item in self.case.settings]
        settings += [f"output.root={self.root}", "output.name=run"]
        let_idle_threads_sleep()
        arguments = ["-m", "raycomplete", self._command, "jobs/organism.yaml", *flags, *settings]
        return driver.start(arguments, self.root, cwd=ROOT)

    def end_at(self, pattern: str, count: int, delay_s: float, *, kills: bool) -> str:
        """Runs it until files have grown so far and a little longer, ends it, and returns what was said."""
        count = max(count, self.grown(pattern) + 1) if pattern else 0  # work that is new in this process
        process = self.start()
        try:
            driver.wait_while_it_works(process, self.root, lambda: not pattern or self.grown(pattern) >= count)
            time.sleep(delay_s)
            if not kills:
                return driver.stop(process, self.root)
        finally:
            if process.poll() is None:
                driver.kill_driver(process)
        return "killed"

    def grown(self, pattern: str) -> int:
        """Counts lines, of tables the files."""
        return len(list(self.folder.glob(pattern))) if pattern == PARTS else driver.num_lines(self.folder, pattern)

    def sampled(self) -> list[dict[str, Any]]:
        """Rows of what was sampled so far, each once."""
        rows = driver.rows_of(self.folder / SAMPLED)
        assert len({row["key"] for row in rows}) == len(rows), "sampled twice"
        return rows

    def outcome(self) -> dict[str, Any]:
        """Everything that must equal an undisturbed run's."""
        if self._command == "align":  # whose result is a path
            result: Any = hashlib.sha256((self.root / "twin" / "model.safetensors").read_bytes()).hexdigest()
        else:
            result = driver.timeless(json.loads((self.folder / self.case.result).read_text()))
        tables = {name: driver.timeless(driver.rows_of(self.folder / name)) for name in ("samples.jsonl", STEPS)}
        return {"result": result, **tables}


def moments_of(calm: StoppedCommand, rng: random.Random) -> list[tuple[str, int]]:
    """Draws how far the files of each moment have grown by then, in the order of the work."""
    found: list[tuple[str, int]] = []
    for pattern in dict.fromkeys(calm.case.moments):
        total = _DRAWS if pattern == SAMPLED else calm.grown(pattern) if pattern else 1
        times = calm.case.moments.count(pattern)
        found += [(pattern, count) for count in sorted(rng.sample(range(1, max(int(0.9 * total), times + 1)), times))]
    return found


def check_stopped(folder: Path, command: str, *, seed: int, kills: bool = False) -> None:
    """Compares an undisturbed run with one that is stopped or killed at drawn moments."""
    calm, stopped = StoppedCommand(folder / "calm", command), StoppedCommand(folder / "stopped", command)
    rng = random.Random(seed)
    if not (calm.folder / calm.case.result).is_file():
        driver.finish(calm.start(), calm.root)
    for pattern, count in moments_of(calm, rng):
        delay_s = rng.uniform(0.0, 8.0 if not pattern else 1.5)  # Ray and engines start before anything is written
        before = stopped.sampled()
        said = stopped.end_at(pattern, count, delay_s, kills=kills)
        print(f"{pattern or 'start'} {count} + {delay_s:.1f} s: {said}", flush=True)
        now = stopped.sampled()
        is_whole = (stopped.folder / "samples.jsonl").exists()  # then the file of parts has gone
        assert now[: len(before)] == before or (is_whole and not now), "lost"
    driver.finish(stopped.start(), stopped.root)
    assert not (stopped.folder / SAMPLED).exists()
    driver.check_nothing_twice(stopped.folder)
    driver.check_equal(stopped.outcome(), calm.outcome(), command)


if __name__ == "__main__":
    parser = driver.options("stops", seed=0)
    parser.add_argument("command", choices=CASES)
    parser.add_argument("--kill", action="store_true", help="SIGKILL in place of SIGTERM")
    given = parser.parse_args()
    check_stopped(given.out / given.command, given.command, seed=given.seed, kills=given.kill)
