"""One run under `ray job submit`, watched through the files that it leaves."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.storage import integrity
from tests.chaos.cluster import LocalCluster

_POLL_S = 0.2


@dataclass
class WatchedRun:
    """A training job that is submitted again whenever it ends without being done.

    Attributes:
        cluster: Where it runs.
        folder: Parent of its run folder.
        name: Of the run.
        settings: Overrides of the run file.
        submissions: How often it was submitted.
    """

    cluster: LocalCluster
    folder: Path
    name: str
    settings: tuple[str, ...]
    submissions: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def run_folder(self) -> Path:
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """Returns what the job printed, all submissions together."""
        return self.folder / f"{self.name}.log"

    def submit(self) -> None:
        """Submits the very same command again and again: `--resume` starts what is not there yet."""
        self.submissions += 1
        self._process = self.cluster.submit(
            "jobs/train.py",
            "jobs/organism.yaml",
            "--resume",
            *self.settings,
            f"output.root={self.folder}",
            f"output.name={self.name}",
            log=self.log,
        )

    @property
    def has_ended(self) -> bool:
        """Tells whether the submitted job is over, well or not."""
        return self._process is not None and self._process.poll() is not None

    @property
    def is_done(self) -> bool:
        """Tells whether the run has its summary."""
        return (self.run_folder / "summary.json").is_file()

    def steps(self) -> list[int]:
        """Numbers of the finished steps, as the metrics have them now."""
        return [row["step"] for row in read_metrics(self.run_folder / "metrics.jsonl")]

    def last_step(self) -> int:
        """The last finished step; 0 before the first."""
        return max(self.steps(), default=0)

    def last_checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none."""
        return max(map(integrity.step_of, integrity.complete_checkpoints(self.run_folder / "checkpoints")), default=0)

    def wait_until(self, reached: Callable[[], bool], *, what: str, timeout_s: float) -> float:
        """Waits, submits again where the job has died, and returns the seconds it took.

        Raises:
            TimeoutError: It was not reached in time; the message holds the end of the log.
        """
        started = time.monotonic()
        while not reached():
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"{self.name}: {what} did not come within {timeout_s:.0f} s.\n{self.tail()}")
            if self.has_ended and not self.is_done:
                self.submit()
            time.sleep(_POLL_S)
        return time.monotonic() - started

    def finish(self, timeout_s: float) -> None:
        """Waits for the summary and for the end of the job."""
        self.wait_until(lambda: self.is_done, what="its summary", timeout_s=timeout_s)
        if self._process is not None:
            self._process.wait(timeout=120)

    def tail(self) -> str:
        """The end of what the job printed."""
        return self.log.read_text(errors="replace")[-2500:] if self.log.is_file() else "(nothing printed)"

    def losses(self) -> list[float]:
        """Loss of every step."""
        return [row["loss"] for row in read_metrics(self.run_folder / "metrics.jsonl")]

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        found: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return found
