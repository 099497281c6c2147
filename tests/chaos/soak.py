"""Half an hour of the on-policy loop at organism size: is memory steady, and is nothing left behind?

    python -m tests.chaos.soak --minutes 30 --out FOLDER

Samples unique memory of driver, engines, workers and raylet and the used object store while the loop trains, fits a
line to the second half of each, and compares processes and temporary files before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.benchmarks.environment import RUNS
from tests.benchmarks.tables import Table
from tests.chaos.cluster import LocalCluster
from tests.chaos.processes import TITLES, family, of_role, usage
from tests.chaos.runs import WatchedRun

_EVERY_S = 10.0
_LIMIT_PER_HOUR = 0.10  # growth that is still called steady, as a share of the mean
_SLACK_MIB = 64.0  # and for small processes in MiB an hour
SETTINGS = (
    "rollout.on_policy=true",
    "train.steps=100000",
    "method.anchor_batch_size=12",
    "method.recovery_batch_size=12",
    "train.per_device_batch_size=24",
    "train.checkpoint_every=20",
    "train.lr=1.0e-4",
)


@dataclass
class Series:
    """One group's memory over time."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def add(self, seconds: float, mib: float) -> None:
        self.seconds.append(seconds)
        self.mib.append(mib)

    def growth_per_hour(self) -> float:
        """Slope of a line through the second half, MiB an hour: start-up and caches that fill belong to the first."""
        half = len(self.mib) // 2
        if len(self.mib) - half < 3:
            return 0.0
        return float(np.polyfit(self.seconds[half:], self.mib[half:], 1)[0] * 3600)

    def is_steady(self) -> bool:
        """Tells whether it grows by less than a tenth an hour."""
        half = self.mib[len(self.mib) // 2 :]
        return self.growth_per_hour() <= max(_LIMIT_PER_HOUR * float(np.mean(half)), _SLACK_MIB)


def object_store_mib() -> float:
    """Shared memory of the machine in use, where Ray's object stores live."""
    used = os.statvfs("/dev/shm")
    return (used.f_blocks - used.f_bfree) * used.f_frsize / 2**20


def temporary_files() -> set[str]:
    """Counts what lies in the folder of temporary files and in shared memory."""
    return {f"{root}/{name}" for root in (tempfile.gettempdir(), "/dev/shm") for name in os.listdir(root)}


def watch(cluster: LocalCluster, job: WatchedRun, minutes: float) -> dict[str, Series]:
    """Memory by group while the loop works; ends by the clock."""
    series: dict[str, Series] = {name: Series() for name in (*TITLES, "driver", "Ray itself", "object store")}
    job.wait_until(lambda: job.last_step() >= 5, what="the fifth step", timeout_s=600)
    started = time.monotonic()
    while (now := time.monotonic() - started) < 60 * minutes:
        if job.has_ended:
            raise RuntimeError(f"The run ended early.\n{job.tail()}")
        known: set[int] = set()
        for role in (*TITLES, "driver"):
            found = of_role(role, cluster.roots())
            known |= {process.pid for process in found}
            series[role].add(now, usage(found).unique_mib)
        rest = [process for process in family(cluster.roots()) if process.pid not in known]
        series["Ray itself"].add(now, usage(rest).unique_mib)
        series["object store"].add(now, object_store_mib())
        time.sleep(_EVERY_S)
    return series


def run(out: Path, minutes: float, console: Console) -> bool:
    """Soaks, reports, and returns whether memory was steady and nothing was left."""
    out.mkdir(parents=True, exist_ok=True)
    files = temporary_files()
    with LocalCluster(workers=0) as cluster:
        job = WatchedRun(cluster, out, f"soak-{int(time.time())}", SETTINGS)
        job.submit()
        series = watch(cluster, job, minutes)
        steps = job.last_step()
        ours = [(process.pid, process.create_time()) for process in family(cluster.roots())]
    time.sleep(5.0)
    left = [pid for pid, born in ours if psutil.pid_exists(pid) and psutil.Process(pid).create_time() == born]
    new_files = sorted(temporary_files() - files)
    table = Table(
        f"{minutes:g} minutes of the on-policy loop, {steps} steps; left afterwards: {len(left)} processes, "
        f"{len(new_files)} temporary files",
        ("memory of", "mean of the second half, MiB", "growth, MiB an hour", "steady"),
        [
            (
                name,
                f"{np.mean(item.mib[len(item.mib) // 2 :]):.0f}",
                f"{item.growth_per_hour():+.0f}",
                "yes" if item.is_steady() else "NO",
            )
            for name, item in series.items()
        ],
    )
    table.show(console)
    for name in new_files:
        console.print(f"left: {name}", style="dim")
    content = {name: {"seconds": item.seconds, "mib": item.mib} for name, item in series.items()}
    write_text(out / "soak.json", json.dumps({"steps": steps, "left": left, "files": new_files, "series": content}))
    write_text(out / "soak.md", table.to_markdown())
    return not left and not new_files and all(item.is_steady() for item in series.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--out", type=Path, default=RUNS.parent / "soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    sys.exit(0 if run(arguments.out.resolve(), arguments.minutes, Console(width=150)) else 1)


if __name__ == "__main__":
    main()
