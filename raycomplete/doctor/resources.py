"""Memory, disk, shared memory and open files, against what the run file needs where one is given."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.doctor.needs import DRIVER_GIB, ENGINE_GIB, GIB, OBJECT_STORE_GIB, WORKER_GIB, needs_of

_DEMO_RESERVED = (3 + OBJECT_STORE_GIB) * GIB
_DEMO_BYTES = int((3 * ENGINE_GIB + WORKER_GIB + DRIVER_GIB) * GIB) + _DEMO_RESERVED
_RAY_DISK_LIMIT = 0.95  # of its temporary folder: above it Ray neither spills objects nor starts what needs space
_MIN_FREE_DISK = 1 * GIB
_OPEN_FILES = 65536  # what Ray asks for on a node of a cluster
_FEW_OPEN_FILES = 4096


def check_memory(context: Context) -> Finding:
    """Free memory, under the limit of the container where there is one."""
    free, total, limit = free_memory()
    needed, reserved = _DEMO_BYTES, _DEMO_RESERVED
    if context.config:
        needs = needs_of(context.config)
        needed, reserved = needs.host_bytes, needs.reserved_bytes
    where = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}" + (" (the container's limit)" if limit else "")
    who = "this run" if context.config else "the demo"
    values = {"free_bytes": free, "total_bytes": total, "container_limit": limit, "needed_bytes": needed}
    if context.address is not None:
        return ok(f"{where}; a cluster carries the run.", **values)
    if total < needed - reserved:
        return fail(
            f"{where}, and {who} needs about {(needed - reserved) / GIB:.1f} GiB and room for caches.",
            "Use a machine with more memory, a smaller model, fewer engines or workers, or train.lora_rank.",
            **values,
        )
    if free < needed:
        words = f"{where}, and {who} needs about {needed / GIB:.1f} GiB once its caches are full"
        return warn(f"{words} ({reserved / GIB:.1f} of it).", "End other processes, or use fewer engines.", **values)
    return ok(f"{where}; {who} needs about {needed / GIB:.1f} GiB.", **values)


def check_disk(context: Context) -> Finding:
    """Space for checkpoints in the run folder, for converted models, and for Ray's files."""
    config = context.config
    run_folder = (config.output.root if config else Path("runs")).absolute()
    cache = Path(os.environ.get("RAYCOMPLETE_CACHE", Path.home() / ".cache" / "raycomplete"))
    ray_folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    needed = (needs_of(config).disk_bytes if config else 0) + _MIN_FREE_DISK
    problems, remedies, shown, values = [], [], [], {}
    for name, folder, floor in (
        ("run folder", run_folder, needed),
        ("cache", cache, _MIN_FREE_DISK),
        ("Ray's folder", ray_folder, _MIN_FREE_DISK),
    ):
        existing = _existing(folder)
        usage = shutil.disk_usage(existing)
        shown.append(f"{name} {usage.free / GIB:.0f} GiB free ({existing})")
        values[name] = {"path": str(folder), "free_bytes": usage.free, "needed_bytes": floor}
        if not os.access(existing, os.W_OK):
            problems.append(f"{existing} cannot be written to")
            remedies.append(f"change the owner of {existing}, or the folder")
        if usage.free < floor:
            problems.append(f"{name} {existing} has {usage.free / GIB:.1f} GiB free and needs {floor / GIB:.1f}")
            remedies.append("free some space, or set output.root, RAYCOMPLETE_CACHE or RAY_TMPDIR to another disk")
        elif name == "Ray's folder" and 1 - usage.free / usage.total > _RAY_DISK_LIMIT:
            problems.append(f"{existing} is {1 - usage.free / usage.total:.0%} full, and Ray stops at 95 %")
            remedies.append("free some space, or set RAY_TMPDIR to another disk")
    if problems:
        return fail("; ".join(problems) + ".", _sentence(remedies), **values)
    return ok("; ".join(shown) + ".", **values)


def check_shared_memory(_: Context) -> Finding:
    """/dev/shm, where Ray keeps its objects."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return warn("There is no /dev/shm, so Ray keeps its objects on disk, slowly.", "Mount a tmpfs there.")
    usage = shutil.disk_usage(folder)
    words = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm; Ray's object store takes "
    words += f"{OBJECT_STORE_GIB} GiB"
    values = {"free_bytes": usage.free, "total_bytes": usage.total, "needed_bytes": OBJECT_STORE_GIB * GIB}
    if usage.free < OBJECT_STORE_GIB * GIB:
        return warn(
            f"{words}, so it would lie on disk, slowly.",
            "Containers: docker run --shm-size=4g, or an emptyDir of medium Memory under Kubernetes.",
            **values,
        )
    return ok(f"{words}.", **values)


def check_open_files(context: Context) -> Finding:
    """The limit of open files: Ray holds a few for each process and connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _OPEN_FILES if context.address is not None else _FEW_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < enough:
        can = hard == resource.RLIM_INFINITY or hard >= enough
        remedy = f"ulimit -n {enough}" + (
            "" if can else f", after raising nofile ({hard}) in /etc/security/limits.conf"
        )
        return warn(f"At most {soft} open files; {enough} are better.", f"{remedy}, before Ray starts.", soft=soft)
    return ok(f"At most {'any number of' if soft == resource.RLIM_INFINITY else soft} open files.", soft=soft)


def free_memory() -> tuple[int, int, bool]:
    """Bytes free and in all for this process, and whether a container's limit decides."""
    total = free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            size = int(value.split()[0]) * 1024
            total, free = (size, free) if name == "MemTotal" else (total, size)
    limited = False
    for limit, used in _limits():
        if limit < total:
            total, limited = limit, True
        free = min(free, max(limit - used, 0))
    return free, total, limited


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, use) of every control group around this process, both versions; the cache of files counts as free."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, names = (
            (Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file"))
            if controllers == ""
            else (
                Path("/sys/fs/cgroup/memory"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            cached = dict(line.split() for line in _lines(folder / "memory.stat")).get(names[2], "0")
            if limit is not None and used is not None:
                yield limit, max(used - int(cached), 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None  # "max": no limit


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _sentence(parts: list[str]) -> str:
    words = "; ".join(dict.fromkeys(parts))
    return words[:1].upper() + words[1:] + "."
