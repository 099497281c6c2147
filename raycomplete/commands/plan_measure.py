"""`raycomplete plan --measure`: a hardware entry for this machine, from a few seconds of products and copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from raycomplete.plan.hardware import DEFAULT_MEASURED, GIB, Hardware, find_hardware
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import write_json
from raycomplete.runtime.machine import available_cpus

_SECONDS = 0.5  # for each measurement
_ROWS, _WIDTH = 512, 2048  # of the products: a batch of tokens times a layer
_COPIED = 256 * 2**20
_VOCAB = 32768
_SMALL = 64

_Timer = Callable[[Callable[[], object]], float]


def measure(path: Path = DEFAULT_MEASURED, console: Console | None = None) -> Hardware:
    """Measures this machine's CPU with all its cores and writes the entry that `--hardware cpu` then takes.

    Args:
        path: Where the entry goes.
        console: Told what was found.
    """
    console = console or Console()
    torch.set_num_threads(available_cpus())
    with console.stage("Products, copies, softmax and small calls measured"):
        entry = measured_cpu()
    write_json(path, asdict(entry))
    console.panel(
        [
            ("bfloat16", f"{entry.bfloat16_flops / 1e9:.0f} GFLOP/s"),
            ("float32", f"{entry.float32_flops / 1e9:.0f} GFLOP/s"),
            ("memory", f"{entry.memory_bytes / GIB:.0f} GiB, {entry.memory_bandwidth / 1e9:.1f} GB/s"),
            ("softmax", f"{entry.softmax_per_s / 1e6:.0f} M elements/s"),
            ("small call", f"{entry.call_s * 1e6:.1f} us"),
            ("written to", str(path)),
        ]
    )
    return entry


def measured_cpu(clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """What this process's CPU reaches now, with the threads that torch has.

    Args:
        clock: Seconds. Neighbours count in those of the wall; `time.process_time` leaves them out for one thread.
    """

    def median_s(work: Callable[[], object]) -> float:
        return _median_s(work, clock)

    copied = torch.ones(_COPIED // 4)
    target = torch.empty_like(copied)
    bandwidth = 2 * _COPIED / median_s(lambda: target.copy_(copied))
    small = torch.ones(_SMALL, _SMALL)
    return replace(
        find_hardware("cpu", measured=Path(os.devnull)),
        label=f"this machine's CPU, {torch.get_num_threads()} threads",
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bfloat16_flops=_product_flops(torch.bfloat16, median_s),
        float32_flops=_product_flops(torch.float32, median_s),
        memory_bandwidth=bandwidth,
        copy_bandwidth=bandwidth,
        call_s=median_s(lambda: torch.add(small, small)),
        softmax_per_s=_softmax_rate(median_s),
        source="`raycomplete plan --measure`",
    )


def _product_flops(dtype: torch.dtype, median_s: _Timer) -> float:
    rows, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    return 2.0 * _ROWS * _WIDTH**2 / median_s(lambda: rows @ weight.T)


def _softmax_rate(median_s: _Timer) -> float:
    """Elements a second of a log-softmax, its exponential and a product: what a row of a loss costs an element."""
    logits = torch.randn(_SMALL, _VOCAB)

    def once() -> None:
        logprobs = torch.log_softmax(logits, dim=-1)
        logprobs.exp().mul_(logprobs)

    return _SMALL * _VOCAB / median_s(once)


def _median_s(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median seconds of one call, over as many as fit into the time, at least three."""
    work()  # threads and caches warm up
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times) < 3:
        started = clock()
        work()
        times.append(clock() - started)
    return sorted(times)[len(times) // 2]
