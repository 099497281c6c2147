"""Checks of the processor, GPU, memory, disk, shared memory and open files, against the needs of a run file.

Needs come from the run file and the headers of its checkpoints: a floor, not a forecast.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.organisms import ORGANISMS
from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.doctor.packages import import_report
from raycomplete.engines.spec import OBJECT_STORE_BYTES, object_store_bytes
from raycomplete.plan.catalogue import ENGINE_GIB, GIB, WORKER_GIB
from raycomplete.plan.estimate import states_bytes
from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.files import cache_folder
from raycomplete.runtime.machine import available_cpus, bfloat16_units, choose_dtype, compiler_problem
from raycomplete.runtime.section import Dtype
from raycomplete.training.checkpoints import checkpoint_bytes, count_parameters

DRIVER_GIB = 1.2  # the driver and Ray's own processes
_SCORERS = 2
_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
_OLDEST_DRIVERS = {"12": 525, "13": 580}  # of each CUDA, without a cuda-compat package
_RAY_DISK_LIMIT = 0.95  # of its temporary folder: above it Ray neither spills objects nor starts what needs space
_MIN_FREE_DISK = 1 * GIB
_OPEN_FILES = 65536  # what Ray asks for on a node of a cluster
_FEW_OPEN_FILES = 4096
_CGROUPS = {  # by controllers: root, and the names of limit, use and cached files
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True)
class Needs:
    """All that one run holds at the same time where it runs on one machine."""

    host_bytes: int  # engines, training workers, driver and object store, without a GPU
    reserved_bytes: int  # of them, what is filled only with use: caches of rollout engines and the object store
    disk_bytes: int = 0  # checkpoints that are kept, and the student
    gpu_bytes: int = 0  # of one device that trainer and engines share: weights, gradients and optimizer of the trainer
    gpu_share: float = 0.0  # of the same device: the fraction that the engines reserve
    cpus: float = 0.0  # logical ones, that a cluster must offer


_DEMO_RESERVED = GIB + OBJECT_STORE_BYTES
_DEMO = Needs(int((3 * ENGINE_GIB + WORKER_GIB + DRIVER_GIB) * GIB) + _DEMO_RESERVED, _DEMO_RESERVED)


def needs_of(config: RunConfig) -> Needs:
    """Adds up a run. Checkpoints that are not on this machine count as nothing."""
    models, train, cluster = config.models, config.train, config.cluster
    teacher, rollout = config.teacher, config.rollout
    dtype = _dtype(config)
    size = 4 if dtype == "float32" else 2
    base, aligned, student = (num_params(spec) or 0 for spec in (models.base, models.aligned, student_of(config)))
    scorers = _SCORERS * teacher.replicas
    engines = scorers + rollout.num_engines
    devices = scorers * teacher.tensor_parallel + rollout.num_engines * rollout.tensor_parallel
    weights = ((base + aligned) * teacher.replicas + base * rollout.num_engines) * size
    # Weights, gradients and optimizer of all workers; of adapters, which are small, the frozen weights alone.
    trainable = 0 if train.lora_rank else student
    states = states_bytes(student, dtype, train.zero_stage, train.num_workers, trainable)
    trained = int(sum(states.values())) * train.num_workers
    reserved = rollout.num_engines * cluster.kv_cache_gib * GIB + OBJECT_STORE_BYTES
    fixed = int((engines * ENGINE_GIB + train.num_workers * WORKER_GIB + DRIVER_GIB) * GIB)
    return Needs(
        host_bytes=fixed + reserved + weights + trained,
        reserved_bytes=reserved,
        # One more than is kept: the oldest goes only once the newest is whole.
        disk_bytes=checkpoint_bytes(student, dtype, train) * (train.keep_checkpoints + 1) + student * size,
        gpu_bytes=trained,
        gpu_share=scorers * teacher.gpu_memory_utilization + rollout.num_engines * rollout.gpu_memory_utilization,
        cpus=devices * cluster.cpus_per_engine + train.num_workers * cluster.cpus_per_worker,
    )


def student_of(config: RunConfig) -> str:
    """Returns the checkpoint that the student starts from."""
    return config.models.student or config.models.aligned


def num_params(spec: str) -> int | None:
    """Counts the parameters of a checkpoint folder or of an organism; None where that is not possible from here."""
    folder = local_folder(spec)
    return None if folder is None else count_parameters(folder) or None


def local_folder(spec: str) -> Path | None:
    """Finds the folder of a checkpoint that needs no conversion and no download; None for any other."""
    scheme, _, rest = spec.partition(":")
    if scheme in ORGANISMS and rest:
        with suppress(CheckpointError):  # which the check of the checkpoint itself reports
            return ORGANISMS[scheme].find_checkpoint(rest)
        return None
    path = Path(spec).expanduser()
    return path if path.is_dir() else None


def check_cpu(context: Context) -> Finding:
    """Checks cores, affinity, quota, and instructions for bfloat16."""
    usable, present, affinity = available_cpus(), os.cpu_count() or 1, len(os.sched_getaffinity(0))
    flags = bfloat16_units()
    reasons = [f"affinity leaves {affinity} of {present}"] if affinity < present else []
    if usable < affinity:
        reasons.append(f"the container's quota leaves {usable}")
    why = f" ({', '.join(reasons)})" if reasons else ""
    words = f"{usable} usable cores{why}, bfloat16 instructions: {', '.join(flags) or 'none'}."
    values: dict[str, Any] = {"usable": usable, "present": present, "affinity": affinity, "bf16": list(flags)}
    if usable < 2:
        return warn(words, "Give it two cores: engines and trainer share one by turns.", **values)
    if context.config is not None:
        asked, (dtype, because) = context.config.models.dtype, auto_dtype(context.config)
        values["dtype"] = dtype if asked == "auto" else asked
        if asked == "auto":
            words += f" models.dtype: auto takes {dtype} here, since {because}."
        elif (asked, dtype) == ("bfloat16", "float32"):
            return warn(words, f"models.dtype is bfloat16, and {because}: set it to auto.", **values)
    return ok(words, **values)


def _dtype(config: RunConfig) -> Dtype:
    return auto_dtype(config)[0] if config.models.dtype == "auto" else config.models.dtype


def auto_dtype(config: RunConfig) -> tuple[Dtype, str]:
    """Returns what `models.dtype: auto` takes on this machine, and why."""
    return choose_dtype(use_gpu=config.cluster.use_gpu != "never" and bool(gpus()), units=bfloat16_units())


def check_gpu(context: Context) -> Finding:
    """Compares the driver's GPUs with those that torch can use, and with the run's needs."""
    found = gpus()
    torch: dict[str, Any] = import_report(context).merged.get("torch", {})
    seen, wanted = torch.get("devices", []), context.config.cluster.use_gpu if context.config else "auto"
    cuda, driver = torch.get("cuda_build"), found[0]["driver"] if found else None
    values = {"driver": driver, "cuda_build": cuda, "devices": seen or found}
    if wanted == "never":
        return ok(f"{len(found)} present, and cluster.use_gpu is 'never'.", **values)
    if not found and not seen:
        if wanted == "always" and context.address is None:
            return fail("No GPU, and cluster.use_gpu is 'always'.", "Set it to auto or never.", **values)
        return ok("None; everything runs on the processor.", **values)
    if not seen:
        names = ", ".join(f"{device['name']} (driver {device['driver']})" for device in found)
        if cuda is None:
            return warn(f"{names}, and this torch is a CPU build.", "make setup EXTRA=gpu", **values)
        words, oldest = f"{names}, and torch for CUDA {cuda} cannot use it", _OLDEST_DRIVERS.get(cuda.partition(".")[0])
        if oldest and driver and driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) < oldest:
            return fail(f"{words}: that needs driver {oldest} or newer.", "Update the driver.", **values)
        return fail(f"{words}.", "CUDA_VISIBLE_DEVICES may be empty, or a container may hide the device.", **values)
    smallest, free = (min(device[name] for device in seen) for name in ("total_bytes", "free_bytes"))
    words = f"{len(seen)} x {seen[0]['name']}, {smallest / GIB:.0f} GiB ({free / GIB:.0f} free)"
    words += f", driver {driver or 'unknown'}, CUDA {cuda}"
    if min(device["capability"] for device in seen) < [7, 5]:
        return fail(f"{words}.", "vLLM needs compute capability 7.5 or more; set cluster.use_gpu to never.", **values)
    if context.config is not None and context.address is None and len(seen) == 1:
        needs = needs_of(context.config)
        if needs.gpu_share * smallest + needs.gpu_bytes > free:
            words += f"; engines reserve {needs.gpu_share:.0%} of it and the trainer holds "
            remedy = "Lower teacher.gpu_memory_utilization and rollout.gpu_memory_utilization, end what else uses the "
            remedy += "GPU, or set train.lora_rank."
            return fail(f"{words}{needs.gpu_bytes / GIB:.1f} GiB.", remedy, **values)
    return ok(f"{words}.", **values)


def check_compiler(context: Context) -> Finding:
    """Checks for what Triton compiles its launcher with: vLLM and the loss need it on a GPU."""
    uses_gpu = bool(gpus()) and (context.config is None or context.config.cluster.use_gpu != "never")
    problem = compiler_problem()
    if not problem:
        return ok("A C compiler and Python's headers are there.")
    if not uses_gpu:
        return ok(f"Nothing here uses a GPU, so it does not matter that {problem}.")
    remedy = "Debian, Ubuntu: apt install gcc python3-dev, with the version of this Python."
    return fail(f"Triton cannot start on the GPU: {problem}.", remedy)


def check_memory(context: Context) -> Finding:
    """Checks free memory, under the limit of the container where there is one."""
    free, total, limit = free_memory()
    needs, who = (needs_of(context.config), "this run") if context.config else (_DEMO, "the demo")
    needed, reserved = needs.host_bytes, needs.reserved_bytes
    where = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}" + (" (the container's limit)" if limit else "")
    values = {"free_bytes": free, "total_bytes": total, "container_limit": limit, "needed_bytes": needed}
    if context.address is not None:
        return ok(f"{where}; a cluster carries the run.", **values)
    if total < needed - reserved:
        words = f"{where}, and {who} needs about {(needed - reserved) / GIB:.1f} GiB and room for caches."
        remedy = "Use a machine with more memory, a smaller model, fewer engines or workers, or train.lora_rank."
        return fail(words, remedy, **values)
    if free < needed:
        words = f"{where}, and {who} needs about {needed / GIB:.1f} GiB once its caches are full"
        return warn(f"{words} ({reserved / GIB:.1f} of it).", "End other processes, or use fewer engines.", **values)
    return ok(f"{where}; {who} needs about {needed / GIB:.1f} GiB.", **values)


def check_disk(context: Context) -> Finding:
    """Checks space for checkpoints in the run folder, for converted models, and for Ray's files."""
    needed = (needs_of(context.config) if context.config else _DEMO).disk_bytes + _MIN_FREE_DISK
    places = {
        "run folder": context.root,
        "cache": cache_folder(),
        "Ray's folder": Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())),
    }
    problems, remedies, shown, values = [], [], [], {}
    for name, folder in places.items():
        floor = needed if name == "run folder" else _MIN_FREE_DISK
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        shown.append(f"{name} {usage.free / GIB:.0f} GiB free ({existing})")
        values[name] = {"path": str(folder), "free_bytes": usage.free, "needed_bytes": floor}
        if not os.access(existing, os.W_OK):
            problems.append(f"{existing} cannot be written to")
            remedies.append(f"change the owner of {existing}, or the folder")
        if usage.free < floor:
            problems.append(f"{name} {existing} has {usage.free / GIB:.1f} GiB free and needs {floor / GIB:.1f}")
            remedies.append("free some space, or set output.root, RAYCOMPLETE_CACHE or RAY_TMPDIR to another disk")
        elif name == "Ray's folder" and (full := 1 - usage.free / usage.total) > _RAY_DISK_LIMIT:
            problems.append(f"{existing} is {full:.0%} full, and Ray stops at 95 %")
            remedies.append("free some space, or set RAY_TMPDIR to another disk")
    if problems:
        words = "; ".join(dict.fromkeys(remedies))
        return fail("; ".join(problems) + ".", f"{words[:1].upper()}{words[1:]}.", **values)
    return ok("; ".join(shown) + ".", **values)


def check_shared_memory(context: Context) -> Finding:
    """Checks /dev/shm, where Ray keeps its objects."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return warn("There is no /dev/shm, so Ray keeps its objects on disk, slowly.", "Mount a tmpfs there.")
    usage, needed = shutil.disk_usage(folder), OBJECT_STORE_BYTES
    if (config := context.config) is not None:
        needed = object_store_bytes(config, num_params(student_of(config)) or 0, _dtype(config))
    there = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm"
    words = f"{there}; Ray's object store takes {needed / GIB:.3g} GiB"
    values = {"free_bytes": usage.free, "total_bytes": usage.total, "needed_bytes": needed}
    if usage.free < needed:
        remedy = f"Containers: docker run --shm-size={2 + needed // GIB}g; Kubernetes: an emptyDir of medium Memory."
        return warn(f"{words}, so some of it would lie on disk, slowly.", remedy, **values)
    return ok(f"{words}.", **values)


def check_open_files(context: Context) -> Finding:
    """Checks the limit of open files: Ray holds a few for each process and connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _OPEN_FILES if context.address is not None else _FEW_OPEN_FILES
    if soft == resource.RLIM_INFINITY:
        return ok("At most any number of open files.", soft=soft)
    if soft < enough:
        remedy = f"ulimit -n {enough}"
        if hard != resource.RLIM_INFINITY and hard < enough:
            remedy += f", after raising nofile ({hard}) in /etc/security/limits.conf"
        return warn(f"At most {soft} open files; {enough} are better.", f"{remedy}, before Ray starts.", soft=soft)
    return ok(f"At most {soft} open files.", soft=soft)


def gpus() -> list[dict[str, Any]]:
    """Lists the GPUs that the NVIDIA driver reports; none where there is no driver."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [
        # The total is "[N/A]" on devices that share memory.
        {"name": name, "driver": driver, "total_bytes": int(total) * 2**20 if total.isdigit() else 0}
        for name, driver, total in (row for row in rows if len(row) == 3)
    ]


def free_memory() -> tuple[int, int, bool]:
    """Returns the bytes free and in all for this process, and True where a container's limit decides."""
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = list(_limits())
    free = min([free, *(max(limit - used, 0) for limit, used in limits)])
    smallest = min((limit for limit, _ in limits), default=total)
    return free, min(total, smallest), smallest < total


def _limits() -> Iterator[tuple[int, int]]:
    """Yields (limit, use) of every control group around this process, of both versions; cached files count as free."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, version, path = line.split(":", 2)
        root, *names = _CGROUPS.get(version, ("",))
        group = Path(root) / path.lstrip("/")
        for folder in (group, *group.parents) if names else ():
            limit, used = ("".join(_lines(folder / name)[:1]) for name in names[:2])
            cached = dict(line.split() for line in _lines(folder / "memory.stat")).get(names[2], "0")
            if limit.isdigit() and used.isdigit():  # "max": no limit
                yield int(limit), max(int(used) - int(cached), 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
