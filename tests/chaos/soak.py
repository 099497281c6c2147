"""Half an hour of the on-policy loop at organism size: is memory steady, and is nothing left behind?

    python -m tests.chaos.soak --minutes 30 --out FOLDER

Samples unique memory of driver, engines, workers and raylet and the used object store while the loop trains, fits a
line to the second half of each, and compares processes and temporary files before and after.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from raycomplete.runtime.files import write_text
from tests.chaos.cluster import LocalCluster, WatchedRun
from tests.chaos.driver import TITLES, family, of_role, options, unique_mib

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
Series = list[tuple[float, float]]
"""Seconds and MiB of one group."""


def second_half(series: Series) -> tuple[float, float, bool]:
    """Mean in MiB, growth in MiB an hour, and whether that is steady; start-up and caches fill the first half."""
    seconds, mib = np.array(series[len(series) // 2 :]).T
    slope = float(np.polyfit(seconds, mib, 1)[0] * 3600) if len(mib) >= 3 else 0.0
    mean = float(mib.mean())
    return mean, slope, slope <= max(_LIMIT_PER_HOUR * mean, _SLACK_MIB)


def object_store_mib() -> float:
    """Shared memory of the machine in use, where Ray's object stores live."""
    used = os.statvfs("/dev/shm")
    return (used.f_blocks - used.f_bfree) * used.f_frsize / 2**20


def temporary_files() -> set[str]:
    """Names in the folder of temporary files and in shared memory."""
    return {f"{root}/{name}" for root in (tempfile.gettempdir(), "/dev/shm") for name in os.listdir(root)}


def watch(cluster: LocalCluster, job: WatchedRun, minutes: float) -> dict[str, Series]:
    """Memory by group while the loop works; ends by the clock."""
    series: dict[str, Series] = {name: [] for name in (*TITLES, "driver", "Ray itself", "object store")}
    job.wait_until(lambda: job.last_step() >= 5, what="the fifth step", timeout_s=600)
    started = time.monotonic()
    while (now := time.monotonic() - started) < 60 * minutes:
        if job.has_ended:
            raise RuntimeError(f"The run ended early.\n{job.tail()}")
        groups = {role: of_role(role, cluster.roots()) for role in (*TITLES, "driver")}
        known = {process.pid for found in groups.values() for process in found}
        groups["Ray itself"] = [process for process in family(cluster.roots()) if process.pid not in known]
        for name, found in groups.items():
            series[name].append((now, unique_mib(found)))
        series["object store"].append((now, object_store_mib()))
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
    found = {name: second_half(item) for name, item in series.items()}
    console.print(f"{minutes:g} minutes, {steps} steps; left: {len(left)} processes, {len(new_files)} files")
    for name, (mean, slope, steady) in found.items():
        console.print(f"{name}: {mean:.0f} MiB, {slope:+.0f} MiB an hour, {'steady' if steady else 'NOT STEADY'}")
    for name in new_files:
        console.print(f"left: {name}", style="dim")
    write_text(out / "soak.json", json.dumps({"steps": steps, "left": left, "files": new_files, "series": series}))
    return not left and not new_files and all(steady for *_, steady in found.values())


if __name__ == "__main__":
    given = options("soak", minutes=30.0).parse_args()
    sys.exit(0 if run(given.out, given.minutes, Console(width=150)) else 1)
