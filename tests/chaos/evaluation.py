"""Kills an evaluation of the organism at random moments, and compares what comes of it with an undisturbed one.

    python -m tests.chaos.evaluation --out FOLDER [--kills 5] [--seed 0]

The driver is killed (SIGKILL) and started again by the same command. Nothing that was finished may be lost, changed or
generated twice. `tests/evaluation/test_killed_evaluation.py` does the same without engines.
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
from typing import Any, Literal

import psutil

from tests.benchmarks.environment import RUNS
from tests.chaos.counted_evaluation import NOTED, ROLES
from tests.chaos.processes import kill
from tests.conftest import ROOT

Where = Literal["process", "engines"]
Rows = dict[str, dict[str, Any]]
_TIMEOUT_S = 1500.0


class CountedRun:
    """An evaluation that is started again and again in one folder."""

    def __init__(self, folder: Path, where: Where) -> None:
        folder.mkdir(parents=True)
        self._folder, self._where = folder, where
        self._evaluation = folder / "runs" / "organism" / "evaluation"

    def finish(self) -> None:
        """Runs it to its end."""
        process = self._start()
        assert process.wait(timeout=_TIMEOUT_S) == 0, self._tail()

    def kill_at(self, stored: int, delay_s: float) -> None:
        """Runs it until so many responses are stored and a little longer, and kills it with no chance to tidy up."""
        process, deadline = self._start(), time.monotonic() + _TIMEOUT_S
        driver = psutil.Process(process.pid)
        try:
            while self.num_stored() < stored:
                assert process.poll() is None, self._tail()
                assert time.monotonic() < deadline, self._tail()
                time.sleep(0.005)
            time.sleep(delay_s)
        finally:
            started = driver.children(recursive=True) if process.poll() is None else []
            kill([driver])
            code = process.wait(timeout=30)
            kill(psutil.wait_procs(started, timeout=30)[1])
        assert code < 0, "it was over before it was killed"

    def rows(self, kind: Literal["trials", "judgements"]) -> Rows:
        """Rows of all stores of a kind by key, without their times; a line that was cut is none."""
        found: Rows = {}
        for path in sorted((self._evaluation / kind).glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                key = f"{path.stem} {row['key']}"
                assert key not in found, "stored twice"
                found[key] = _timeless(row)
        return found

    def num_stored(self) -> int:
        """Counts the responses on the disk."""
        return sum(path.read_bytes().count(b"\n") for path in (self._evaluation / "trials").glob("*.jsonl"))

    def noted(self) -> list[str]:
        """Keys of the responses that were got so far, by all processes."""
        path = self._folder / NOTED
        return path.read_text().split() if path.exists() else []

    def results(self) -> dict[str, Any]:
        """Rates and counts of every model, without times."""
        return {role: _timeless(json.loads((self._evaluation / f"{role}.json").read_text())) for role in ROLES}

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.counted_evaluation", self._where],
                cwd=self._folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
                stdout=log,
                stderr=log,
            )

    def _tail(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-3000:]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name != "seconds"}
    return value


def check_killed_evaluation(folder: Path, where: Where, *, kills: int, seed: int) -> str:
    """Compares an undisturbed evaluation with one that is killed at random moments.

    Returns:
        What was done, in a line.

    Raises:
        AssertionError: Something finished was lost, changed or generated twice, or a result differs.
    """
    calm, killed, rng = CountedRun(folder / "calm", where), CountedRun(folder / "killed", where), random.Random(seed)
    calm.finish()
    total = calm.num_stored()
    assert len(calm.noted()) == len(set(calm.noted())) == total

    moments = sorted(rng.sample(range(1, int(0.95 * total)), kills))
    before, seen = killed.rows("trials"), 0
    for moment in [*moments, None]:
        if moment is None:
            killed.finish()
        else:
            killed.kill_at(moment, 0.2 * rng.random())  # anywhere within a batch
        got, now = killed.noted()[seen:], killed.rows("trials")
        finished = {key.split()[1] for key in before}
        assert not finished & set(got), "generated again"
        assert len(got) == len(set(got)), "generated twice"
        assert {key: now.get(key) for key in before} == before, "lost or changed"
        before, seen = now, seen + len(got)
    for kind in ("trials", "judgements"):
        assert killed.rows(kind) == calm.rows(kind), f"other {kind}"  # type: ignore[arg-type]
    assert killed.results() == calm.results()
    lost = seen - total
    return f"{total} responses, killed after {', '.join(map(str, moments))}; {lost} were under way and made again"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.evaluation")
    parser.add_argument("--out", type=Path, default=RUNS.parent / "killed-evaluation")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(check_killed_evaluation(arguments.out.resolve(), "engines", kills=arguments.kills, seed=arguments.seed))


if __name__ == "__main__":
    main()
