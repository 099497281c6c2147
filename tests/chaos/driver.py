"""The driver of all scenarios: commands with a log, processes by role (never by name alone), and timeless results."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.environment import RUNS
from tests.conftest import ROOT

LIMIT_S = 30.0  # from SIGTERM to the end of a command
TIMEOUT_S = 1500.0
# Ray's names of its worker processes (`ray::Scorer.score` while it works), by the roles of a run.
TITLES = {
    "scorer": "ray::Scorer",
    "rollout engine": "ray::RolloutWorker",
    "training worker": "ray::RayTrainWorker",
}
_TIMES = {"seconds", "wall_seconds", "seconds_per_step", "engines", "peak_memory_gib", "versions", "cost", "sync"}


def options(scenario: str, **numbers: float) -> argparse.ArgumentParser:
    """The options of a scenario: `--out` and one for each number."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.chaos.{scenario}")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=RUNS.parent / "chaos" / scenario)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


# --- Commands --------------------------------------------------------------------------------------------------------


def start(arguments: Sequence[str], folder: Path, *, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts Python with these arguments; its output is added to `log` in the folder, its errors are in `stderr`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "log").open("ab") as log, (folder / "stderr").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd or folder,
            env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
            stdout=log,
            stderr=errors,
        )


def tail(folder: Path) -> str:
    """The end of what a command printed."""
    return "\n".join((folder / name).read_text(errors="replace")[-3000:] for name in ("log", "stderr"))


def wait_while_it_works(process: subprocess.Popen[bytes], folder: Path, reached: Callable[[], bool]) -> None:
    """Waits for a state that the command must reach before it ends."""
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.poll() is None, f"it was over too soon\n{tail(folder)}"
        assert time.monotonic() < deadline, tail(folder)
        time.sleep(0.01)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=TIMEOUT_S) == 0, tail(folder)


def stop(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Sends SIGTERM; the command must end in time with exit code 1 and one sentence that says how to go on."""
    assert process.poll() is None, f"it was over before it was stopped\n{tail(folder)}"
    started = time.monotonic()
    process.terminate()
    try:
        code = process.wait(timeout=2 * LIMIT_S)
    finally:
        process.kill()
    seconds, said = time.monotonic() - started, (folder / "stderr").read_text(errors="replace").strip()
    assert code == 1, f"{code}\n{tail(folder)}"
    assert seconds < LIMIT_S, f"{seconds:.1f} s"
    assert len(said.splitlines()) == 1, said
    assert "topped" in said
    assert "--resume" in said or "same command" in said
    return f"{seconds:.1f} s, {said}"


def kill_driver(process: subprocess.Popen[bytes], patience_s: float = 30.0) -> list[psutil.Process]:
    """Kills a command with no chance to tidy up; kills and returns those of its descendants that outlive it."""
    driver = psutil.Process(process.pid)
    started = driver.children(recursive=True) if process.poll() is None else []
    kill([driver])
    assert process.wait(timeout=30) < 0, "it was over before it was killed"
    left = psutil.wait_procs(started, timeout=patience_s)[1]
    left = [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    kill(left)
    return left


# --- Processes -------------------------------------------------------------------------------------------------------


def family(pids: Iterable[int]) -> Iterator[psutil.Process]:
    """These processes and all that descend from them."""
    for pid in pids:
        try:
            process = psutil.Process(pid)
            yield process
            yield from process.children(recursive=True)
        except psutil.NoSuchProcess:
            continue


def of_role(role: str, roots: Iterable[int]) -> list[psutil.Process]:
    """Processes of a role below these roots: raylets for actors, the job's supervisor for its driver."""
    found = []
    for process in family(roots):
        try:
            words = process.cmdline() or [""]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if role == "driver":
            # The shell that Ray starts holds the same words in one argument; python holds them one by one.
            names = [os.path.basename(word) for word in words]
            matches = "train.py" in names and "python" in names[0]
        else:
            matches = words[0].startswith(TITLES[role])
        if matches:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill(processes: Iterable[psutil.Process]) -> int:
    """Sends SIGKILL; returns how many were there to be killed."""
    killed = 0
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
            killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed


def unique_mib(processes: Iterable[psutil.Process]) -> float:
    """Memory that no other process shares (USS), so that the sum counts nothing twice."""
    total = 0.0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


# --- Results ---------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; a line that was cut is none."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def check_nothing_twice(folder: Path) -> None:
    """No answer and no judgement of a run folder is stored twice."""
    for store in (*folder.glob("evaluation/trials/*.jsonl"), *folder.glob("evaluation/judgements/*.jsonl")):
        keys = [row["key"] for row in rows_of(store)]
        assert len(keys) == len(set(keys)), f"{store} holds an answer twice"


def num_lines(folder: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


def timeless(value: Any) -> Any:
    """The value without what a clock measured."""
    if isinstance(value, dict):
        return {
            name: timeless(part)
            for name, part in value.items()
            if name not in _TIMES and not name.endswith(("_s", "per_s", "_fraction"))
        }
    return [timeless(part) for part in value] if isinstance(value, list) else value


def check_equal(mine: Any, theirs: Any, where: str) -> None:
    """Raises with the first place in which two results differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        for name in mine:
            check_equal(mine[name], theirs[name], f"{where}.{name}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            check_equal(one, other, f"{where}[{place}]")
    else:
        assert mine == theirs, f"{where}: {str(mine)[:200]} against {str(theirs)[:200]}"
