"""Finding the processes of a Ray cluster, measuring them and killing them, by pid and never by name alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

# What Ray calls its worker processes (`ray::Scorer.score` while it works), by the roles of a run.
TITLES = {
    "scorer": "ray::Scorer",
    "rollout engine": "ray::RolloutWorker",
    "training worker": "ray::RayTrainWorker",
}
_DRIVER = "train.py"


@dataclass(frozen=True)
class Usage:
    """Memory of a group of processes.

    Attributes:
        processes: How many there are.
        unique_mib: Memory that no other process shares (USS), so that a sum counts nothing twice.
    """

    processes: int
    unique_mib: float


def family(pids: Iterable[int]) -> Iterator[psutil.Process]:
    """These processes and everything that descends from them."""
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
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if role == "driver":
            # The shell that Ray starts holds the same words in one argument; python holds them one by one.
            matches = any(os.path.basename(word) == _DRIVER for word in words) and "python" in os.path.basename(
                words[0]
            )
        else:
            matches = bool(words) and words[0].startswith(TITLES[role])
        if matches:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill(processes: Iterable[psutil.Process]) -> int:
    """SIGKILL, with no chance to tidy up; returns how many were there to be killed."""
    killed = 0
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
            killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed


def usage(processes: Iterable[psutil.Process]) -> Usage:
    """Memory of these processes together."""
    count, total = 0, 0.0
    for process in processes:
        try:
            total += process.memory_full_info().uss
            count += 1
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return Usage(count, total / 2**20)
