"""Processor and GPU: what the machine has, what torch sees of it, and whether the run fits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.doctor.needs import GIB, needs_of
from raycomplete.doctor.versions import import_report
from raycomplete.runtime.machine import available_cpus

_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16")  # the last one: Arm
_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]


class Device(NamedTuple):
    """One GPU as the driver reports it."""

    name: str
    driver: str
    total_bytes: int


def check_cpu(context: Context) -> Finding:
    """Cores, affinity, quota, and instructions for bfloat16."""
    usable, present, affinity = available_cpus(), os.cpu_count() or 1, len(os.sched_getaffinity(0))
    flags = [flag for flag in _BF16_FLAGS if flag in cpu_flags()]
    reasons = []
    if affinity < present:
        reasons.append(f"affinity leaves {affinity} of {present}")
    if usable < affinity:
        reasons.append(f"the container's quota leaves {usable}")
    words = f"{usable} usable cores" + (f" ({', '.join(reasons)})" if reasons else "")
    words += f", bfloat16 instructions: {', '.join(flags) or 'none'}"
    values = {"usable": usable, "present": present, "affinity": affinity, "bf16": flags}
    if usable < 2:
        return warn(f"{words}.", "Give it two cores: engines and trainer share one by turns.", **values)
    config = context.config
    if config and config.models.dtype == "bfloat16" and not flags and not gpus():
        return warn(f"{words}.", "bfloat16 is emulated here: models.dtype=float32 may be faster.", **values)
    return ok(f"{words}.", **values)


def check_gpu(context: Context) -> Finding:
    """The driver's GPUs against those that torch can use, and against the run."""
    found = gpus()
    torch: dict[str, Any] = import_report(context).merged.get("torch", {})
    seen, wanted = torch.get("devices", []), context.config.cluster.use_gpu if context.config else "auto"
    values = {
        "driver": found[0].driver if found else None,
        "cuda_build": torch.get("cuda_build"),
        "devices": seen or [device._asdict() for device in found],
    }
    if wanted == "never":
        return ok(f"{len(found)} present, and cluster.use_gpu is 'never'.", **values)
    if not found and not seen:
        if wanted == "always" and context.address is None:
            return fail("No GPU, and cluster.use_gpu is 'always'.", "Set it to auto or never.", **values)
        return ok("None; everything runs on the processor.", **values)
    if not seen:
        names = ", ".join(f"{device.name} (driver {device.driver})" for device in found)
        if torch.get("cuda_build") is None:
            return warn(f"{names}, and this torch is a CPU build.", "make setup EXTRA=gpu", **values)
        return fail(
            f"{names}, and torch for CUDA {torch['cuda_build']} cannot use it.",
            f"The driver may be older than CUDA {torch['cuda_build']} needs, or CUDA_VISIBLE_DEVICES may be empty: "
            "update the driver, or install the vLLM that fits it.",
            **values,
        )
    smallest = min(device["total_bytes"] for device in seen)
    free = min(device["free_bytes"] for device in seen)
    words = f"{len(seen)} x {seen[0]['name']}, {smallest / GIB:.0f} GiB ({free / GIB:.0f} free)"
    words += f", driver {values['driver'] or 'unknown'}, CUDA {values['cuda_build']}"
    if min(device["capability"] for device in seen) < [7, 5]:
        return fail(f"{words}.", "vLLM needs compute capability 7.5 or more; set cluster.use_gpu to never.", **values)
    if context.config is not None and context.address is None and len(seen) == 1:
        needs = needs_of(context.config)
        needed = needs.gpu_share * smallest + needs.gpu_bytes
        if needed > free:
            return fail(
                f"{words}; engines reserve {needs.gpu_share:.0%} of it and the trainer holds "
                f"{needs.gpu_bytes / GIB:.1f} GiB.",
                "Lower teacher.gpu_memory_utilization and rollout.gpu_memory_utilization, end what else uses the GPU, "
                "or set train.lora_rank.",
                **values,
            )
    return ok(f"{words}.", **values)


def gpus() -> list[Device]:
    """GPUs that the NVIDIA driver reports; none where there is no driver."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            memory = int(parts[2]) * 2**20 if parts[2].isdigit() else 0  # "[N/A]" on devices that share memory
            found.append(Device(parts[0], parts[1], memory))
    return found


def cpu_flags() -> frozenset[str]:
    """Instruction sets that the kernel reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
