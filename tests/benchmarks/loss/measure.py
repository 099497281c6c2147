"""Agreement, time and peak memory of variants on one problem."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.loss.problem import Mix, Problem, Shape, build_problem
from tests.benchmarks.loss.variants import VARIANTS, Loss

_CHILD_TIMEOUT_S = 900.0

# What separates bfloat16 softmax and sums (Liger, GKD) from float32 ones; a wrong loss is off by far more.
LOSS_TOLERANCE = 0.03
GRADIENT_TOLERANCE = 0.08


@dataclass
class Measurement:
    """Result of one variant on one problem: times in order of the repeats, or the reason for their absence."""

    loss: float | None = None
    gradient_error: float | None = None  # relative distance from plain PyTorch's; the larger of the two inputs'
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # all threads: what a busy machine distorts least
    peak_bytes: int | None = None  # above the inputs; the gradients that stay are part of it
    gradient_bytes: int = 0
    problem: str = ""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def ratio_to(self, other: Measurement) -> float | None:
        """Median over repeats of this time over the other's in the same repeat: drift of the machine cancels."""
        return _median_ratio(self.seconds, other.seconds)

    def cpu_ratio_to(self, other: Measurement) -> float | None:
        """The same of processor time."""
        return _median_ratio(self.cpu_seconds, other.cpu_seconds)


def _median_ratio(mine: list[float], theirs: list[float]) -> float | None:
    if not mine or not theirs:
        return None
    return statistics.median(first / second for first, second in zip(mine, theirs, strict=True))


def step(loss: Loss, problem: Problem) -> Tensor:
    """One forward and backward."""
    problem.clear_gradients()
    total = loss(problem)
    total.backward()
    return total.detach()


def compare(losses: dict[str, Loss], problem: Problem, repeats: int) -> dict[str, Measurement]:
    """Times variants on the same tensors in one process, in an order that turns with each repeat.

    The first pass of each warms it up and is compared with that of plain PyTorch, so that equal work is timed.
    """
    found = {name: Measurement(gradient_bytes=problem.gradient_bytes) for name in losses}
    expected: tuple[Tensor, ...] | None = None
    for name, loss in losses.items():
        try:
            found[name].loss = float(step(loss, problem))
        except Exception as error:  # a rival that fails is a line of the table, not the end of the benchmark
            found[name].problem = _sentence(error)
            continue
        gradients = tuple(tensor.grad.float() for tensor in problem.trained if tensor.grad is not None)
        expected = expected or gradients  # the first variant is the one that others are held against
        found[name].gradient_error = max(
            float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(gradients, expected, strict=True)
        )
    del expected
    problem.clear_gradients()
    names = [name for name in losses if not found[name].problem]
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            seconds, cpu_seconds = _seconds(losses[name], problem)
            found[name].seconds.append(seconds)
            found[name].cpu_seconds.append(cpu_seconds)
    return found


def check_agreement(found: dict[str, Measurement], reference: str, must_run: str) -> list[str]:
    """Names variants of another loss or gradient; a rival may fail, and plain PyTorch lack memory, `must_run` not."""
    expected = found[reference].loss
    wrong = [f"{must_run}: {found[must_run].problem}"] if found[must_run].problem else []
    if expected is None:
        return wrong
    for name, item in found.items():
        if item.loss is None or item.gradient_error is None:
            continue
        if abs(item.loss - expected) > LOSS_TOLERANCE * abs(expected) or item.gradient_error > GRADIENT_TOLERANCE:
            wrong.append(f"{name}: loss {item.loss:.5f}, not {expected:.5f}; gradient off by {item.gradient_error:.1%}")
    return wrong


def _seconds(loss: Loss, problem: Problem) -> tuple[float, float]:
    """Wall-clock and processor time of one step."""
    device = problem.term_N.device
    problem.clear_gradients()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    step(loss, problem)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - cpu_started


# --- Peak memory -----------------------------------------------------------------------------------------------------


def peak_bytes(name: str, shape: Shape, mix: Mix, device: torch.device) -> int:
    """Most memory in use during a step, above what the inputs take."""
    if device.type == "cuda":
        return _device_peak(name, shape, mix, device)
    # A process of its own: what another variant freed or mapped would otherwise count.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_host_peak, name, shape, mix, torch.get_num_threads()).result(_CHILD_TIMEOUT_S)


def _device_peak(name: str, shape: Shape, mix: Mix, device: torch.device) -> int:
    loss, problem = _load(name), build_problem(shape, mix, device)
    problem.clear_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(loss, problem)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _host_peak(name: str, shape: Shape, mix: Mix, threads: int) -> int:
    torch.set_num_threads(threads)
    loss, device = _load(name), torch.device("cpu")
    problem = build_problem(shape, mix, device)
    step(loss, problem)  # libraries, thread pools and compiled code are no peak of the loss
    problem.clear_gradients()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc kept from the first pass would hide part of the second
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on VmHWM counts anew
    before = _status_bytes("VmRSS")
    step(loss, problem)
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found: Any = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024


def _load(name: str) -> Loss:
    return next(variant for variant in VARIANTS if variant.name == name).load()


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
