"""Measures the CPU of this machine as an entry of hardware for `raycomplete plan`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from raycomplete.plan.catalogue import Hardware, find_hardware


def measured_cpu(clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measures what this process's CPU reaches now, with the threads that torch has.

    Neighbours count in seconds of the wall; `time.process_time` as a clock leaves them out for one thread.
    """

    def median_s(work: Callable[[], object]) -> float:
        work()  # threads and caches warm up
        times: list[float] = []
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end or len(times) < 3:
            started = clock()
            work()
            times.append(clock() - started)
        return sorted(times)[len(times) // 2]

    def product_flops(dtype: torch.dtype) -> float:
        tokens, width = 512, 2048  # a batch of tokens times a layer
        rows, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        return 2.0 * tokens * width**2 / median_s(lambda: rows @ weight.T)

    def loss_row() -> None:
        logprobs = torch.log_softmax(logits, dim=-1)
        logprobs.exp().mul_(logprobs)

    logits, small, copied = torch.randn(64, 32768), torch.ones(64, 64), torch.ones(64 * 2**20)
    target = torch.empty_like(copied)
    bandwidth = 2 * copied.nbytes / median_s(lambda: target.copy_(copied))
    return replace(
        find_hardware("cpu"),
        label=f"this machine's CPU, {torch.get_num_threads()} threads",
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bfloat16_flops=product_flops(torch.bfloat16),
        float32_flops=product_flops(torch.float32),
        memory_bandwidth=bandwidth,
        copy_bandwidth=bandwidth,
        call_s=median_s(lambda: torch.add(small, small)),
        softmax_per_s=logits.numel() / median_s(loss_row),
        source="measured here",
    )
